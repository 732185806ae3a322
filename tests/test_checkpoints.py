"""Weights of `transformers`: the same logits, and back; hostile files."""

import json
import os
import shutil
import sys

import fresh
import keras
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import keras_stable as ks
from keras_stable import checkpoints
from keras_stable import tensor_files
from keras_stable.checkpoints import read
from keras_stable.checkpoints import write
from keras_stable.families import FAMILIES
from keras_stable.subwords import BPETokenizer

V, T = 61, 17
IDS = np.random.default_rng(0).integers(0, V, (2, T)).astype("int32")
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Not 32 / 4.
    "head_dim": 12,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {
    **{"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4},
    **{"n_positions": 40, "n_inner": 48, "bos_token_id": 0, "eos_token_id": 0},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
STRETCHED = {
    "full_attention": {
        "rope_type": "linear",
        "factor": 8.0,
        "rope_theta": 1e6,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2_untied": lambda: transformers.GPT2Config(
        **GPT2, tie_word_embeddings=False, scale_attn_weights=False
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES,
        sliding_window=5,
        query_pre_attn_scalar=9,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 7},
        sliding_window=5,
        query_pre_attn_scalar=9,
        rope_parameters=STRETCHED,
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        **SIZES,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3_biased": lambda: transformers.Qwen3Config(
        **SIZES, attention_bias=True, rope_parameters=LINEAR
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
}


def make(config, seed=0):
    """A random model of `transformers`; norms and biases are random too."""
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def theirs():
    """Models by name, each made once; none is changed."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = make(CONFIGS[name]())
        return models[name]

    return get


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.int64)).logits.numpy()


def our_logits(backbone, ids=IDS):
    logits = ks.StableCausalLM(backbone)({"token_ids": ids})
    return keras.ops.convert_to_numpy(logits)


def values(backbone):
    return {
        w.path: keras.ops.convert_to_numpy(w.value) for w in backbone.weights
    }


def assert_equal_weights(a, b):
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(value, b[path], err_msg=path)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_theirs(name, theirs, record_property):
    model = theirs(name)
    backbone, tokenizer = read(model)
    assert tokenizer is None
    expected = logits_of(model)
    # Logits of an ordinary size, that differ.
    assert 0.5 < expected.std() < 3
    difference = np.abs(our_logits(backbone) - expected).max()
    record_property("difference", float(difference))
    print(f"{name}: {difference:.1e} of {np.abs(expected).max():.1f}")
    assert difference < 1e-5


MATTERS = [
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"activation_function": "gelu"}),
    ("gemma2", {"sliding_window": T}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 12}),
    ("gemma3", {"sliding_window": T}),
    ("gemma3", {"rope_parameters": None}),
    ("qwen3", {"sliding_window": T}),
    ("qwen3_biased", {"rope_parameters": None}),
    ("olmo2", {"rms_norm_eps": 1e-2}),
]


@pytest.mark.parametrize("name, changes", MATTERS)
def test_the_logits_depend_on_what_is_tested(name, changes, theirs):
    config = theirs(name).config.to_dict() | changes
    other = transformers.AutoModelForCausalLM.from_config(
        type(theirs(name).config)(**config), attn_implementation="eager"
    ).eval()
    other.load_state_dict(theirs(name).state_dict())
    difference = np.abs(logits_of(other) - logits_of(theirs(name))).max()
    assert difference > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_to_transformers_and_back(name, theirs, tmp_path):
    model = theirs(name)
    backbone, _ = read(model)
    path = write(backbone, None, tmp_path / "written")
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    again = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert type(again) is type(model)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[key]), key
    family = FAMILIES[name.split("_")[0]]
    keys = {*family.sizes.values(), *family.keys, "rope_parameters"}
    keys |= {"layer_types", "sliding_window", *family.dropouts}
    mine, original = again.config.to_dict(), model.config.to_dict()
    for key in keys:
        assert mine.get(key) == original.get(key), key
    with safe_open(path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    # And into ours.
    ours, _ = read(path)
    assert ours.get_config()["variant"] == backbone.get_config()["variant"]
    assert_equal_weights(ours, backbone)


def test_shards(theirs, tmp_path, monkeypatch):
    model = theirs("olmo2")
    backbone, _ = read(model)
    most = 20_000
    held = []

    def counted(arrays, path, **kwargs):
        held.append(sum(a.nbytes for a in arrays.values()))
        save_file(arrays, path, **kwargs)

    monkeypatch.setattr(checkpoints, "save_file", counted)
    path = write(backbone, None, tmp_path / "a", max_shard_size=most)
    assert len(held) > 3 and max(held) <= most
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(held)
    again = transformers.AutoModelForCausalLM.from_pretrained(path)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])
    assert_equal_weights(read(path)[0], backbone)
    # And those that `transformers` makes.
    model.save_pretrained(tmp_path / "b", max_shard_size=most)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert_equal_weights(read(tmp_path / "b")[0], backbone)
    # A tensor that is larger than a shard has one of its own.
    path = write(backbone, None, tmp_path / "c", max_shard_size=1)
    assert_equal_weights(read(path)[0], backbone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, theirs, tmp_path):
    model = theirs("gemma2")
    backbone, _ = read(model)
    path = write(backbone, None, tmp_path / "a", dtype=dtype)
    half = getattr(torch, dtype)
    again = transformers.AutoModelForCausalLM.from_pretrained(path)
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == half
        assert torch.equal(tensor, model.state_dict()[key].to(half))
    # Files, and a live model in half precision.
    ours, _ = read(path)
    assert {w.dtype for w in ours.weights} == {"float32"}
    assert_equal_weights(ours, read(again)[0])
    for path, value in values(backbone).items():
        rounded = torch.tensor(value).to(half).float().numpy()
        np.testing.assert_array_equal(values(ours)[path], rounded)


def test_arguments_of_the_backbone(tiny):
    backbone, _ = read(tiny, dtype="bfloat16", remat=True, dropout=0.25)
    dtypes = {w.path.split("/")[-1]: w.dtype for w in backbone.weights}
    assert dtypes["kernel"] == "bfloat16"
    config = backbone.get_config()
    assert (config["remat"], config["dropout"]) == ("block", 0.25)
    with pytest.raises(TypeError, match="multiple values.*num_layers"):
        read(tiny, num_layers=3)


def test_too_large_for_float16(theirs, tmp_path):
    backbone, _ = read(theirs("gpt2"))
    weight = backbone.weights[0]
    weight.assign(weight * 1e6)
    with pytest.raises(ValueError, match="wte.*too large for float16"):
        write(backbone, None, tmp_path / "a", dtype="float16")
    assert os.listdir(tmp_path) == []
    write(backbone, None, tmp_path / "a", dtype="bfloat16")


def test_live_models_share_no_memory():
    model = make(CONFIGS["gpt2"]())
    backbone, _ = read(model)
    before = our_logits(backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(our_logits(backbone), before)


def test_lora_is_merged(tmp_path):
    backbone = ks.StableBackbone(V, 1, 2, 16, variant="qwen3")
    backbone.enable_lora(2)
    for weight in backbone.weights:
        if "lora" in weight.path:
            noise = keras.random.normal(weight.shape, seed=len(weight.path))
            weight.assign(noise)
    again, _ = read(write(backbone, None, tmp_path / "a"))
    assert len(again.weights) < len(backbone.weights)
    for name in ("query", "value"):
        ours, new = (
            keras.ops.convert_to_numpy(
                getattr(b.transformer_layers[0].attention, name).kernel
            )
            for b in (backbone, again)
        )
        assert np.abs(ours).max() > 1
        np.testing.assert_array_equal(ours, new)


def test_quantized_models_are_refused(tmp_path):
    backbone = ks.StableBackbone(V, 1, 2, 16, variant="qwen3")
    backbone.quantize("int8", filters=["fc1"])
    with pytest.raises(ValueError, match="is quantized.*'int8'"):
        write(backbone, None, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_loads_in_a_fresh_process(theirs, tmp_path):
    backbone, _ = read(theirs("gemma2"))
    path = write(backbone, None, tmp_path / "a", max_shard_size=20_000)
    np.save(tmp_path / "logits.npy", our_logits(backbone))
    np.save(tmp_path / "ids.npy", IDS)
    code = (
        "import sys, keras, numpy as np, keras_stable as ks\n"
        "from keras_stable.checkpoints import read\n"
        "d = sys.argv[1]\n"
        "lm = ks.StableCausalLM(read(d + '/a')[0])\n"
        "y = lm({'token_ids': np.load(d + '/ids.npy')})\n"
        "y = keras.ops.convert_to_numpy(y)\n"
        "np.testing.assert_allclose(y, np.load(d+'/logits.npy'), atol=1e-5)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    fresh.run(code, tmp_path)
    assert path.is_dir()


def test_tokenizers_travel(tmp_path):
    tokenizer = BPETokenizer.train(["banana bandana"] * 9, 262)
    size = tokenizer.vocabulary_size()
    backbone = ks.StableBackbone(size, 1, 2, 16, variant="gpt2")
    path = write(backbone, tokenizer, tmp_path / "a")
    end = tokenizer.end_token_id
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == end
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    text = "ban 漢字 banana"
    assert theirs(text)["input_ids"] == list(tokenizer.tokenize(text))
    assert theirs.eos_token_id == theirs.bos_token_id == end
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert model.config.eos_token_id == end
    assert model.generation_config.eos_token_id == end
    again = read(path)[1]
    assert again.get_vocabulary() == tokenizer.get_vocabulary()
    roles = ("start_token_id", "end_token_id", "pad_token_id")
    for role in roles:
        assert getattr(again, role) == getattr(tokenizer, role)
    # Other tokens, from either file.
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"pad_token": {"content": "b"}, "bos_token": "n"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    again = read(path)[1]
    assert (again.pad_token, again.start_token) == ("b", "n")
    (path / "tokenizer_config.json").unlink()
    assert read(path)[1].end_token_id == end
    # Ids alone travel of a tokenizer without a file.
    backbone = ks.StableBackbone(256, 1, 2, 16, variant="gpt2")
    path = write(backbone, ks.ByteTokenizer(), tmp_path / "b")
    assert not (path / "tokenizer.json").exists()
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == 0
    assert read(path)[1] is None


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"added_tokens": [1, {"id": []}]}', "\ud800"]
)
def test_broken_tokenizers_are_left_out_with_a_warning(tiny, text):
    data = text.encode("utf-8", errors="surrogatepass")
    (tiny / "tokenizer.json").write_bytes(data)
    with pytest.warns(UserWarning, match="The model has no tokenizer"):
        assert read(tiny)[1] is None


# Files as others write them.


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with a tiny GPT-2, in one file."""
    backbone = ks.StableBackbone(
        V, 1, 2, 16, variant="gpt2", max_sequence_length=8
    )
    return write(backbone, None, tmp_path_factory.mktemp("gpt2") / "gpt2")


@pytest.fixture
def tiny(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def rewrite(directory, change):
    """Saves the tensors of a directory again, after `change(tensors)`."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


def reconfigure(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_published_gpt2s_names(tiny):
    expected = values(read(tiny)[0])

    def publish(tensors):
        # No prefix, a mask in each block, a tied head, written out.
        plain = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        plain["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), "uint8"))
        plain["h.0.attn.masked_bias"] = np.array(-1e4, "float32")
        plain["lm_head.weight"] = plain["wte.weight"]
        return plain

    rewrite(tiny, publish)
    found = values(read(tiny)[0])
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["wte.weight"] + 1

    rewrite(tiny, untie)
    with pytest.raises(ValueError, match="ties the head.*tie_word_embeddings"):
        read(tiny)
    reconfigure(tiny, tie_word_embeddings=False)
    backbone, _ = read(tiny)
    assert not backbone.variant.architecture.tie_embeddings
    np.testing.assert_array_equal(
        values(backbone)["token_embedding/reverse_embeddings"],
        expected["token_embedding/embeddings"].T + 1,
    )


@pytest.mark.parametrize(
    "outer, head",
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_the_text_part_of_a_model_with_images(outer, head, theirs, tmp_path):
    backbone, _ = read(theirs("gemma3"))
    path = write(backbone, None, tmp_path / "a")
    text = json.loads((path / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (path / "config.json").write_text(json.dumps(config))

    def nest(tensors):
        nested = {
            outer + k.removeprefix("model."): v for k, v in tensors.items()
        }
        nested[head] = tensors["model.embed_tokens.weight"]
        vision = np.zeros((2, 2), "float32")
        nested["vision_tower.vision_model.post_layernorm.weight"] = vision
        nested["model.multi_modal_projector.mm_soft_emb_norm.weight"] = vision
        return nested

    rewrite(path, nest)
    assert_equal_weights(read(path)[0], backbone)


def test_missing_values_are_values(tiny):
    def spoil(tensors):
        tensors["transformer.wte.weight"] *= np.nan

    rewrite(tiny, spoil)
    found = values(read(tiny)[0])["token_embedding/embeddings"]
    assert np.isnan(found).all()


def test_the_hub(tiny, monkeypatch):
    import huggingface_hub

    calls = []

    def download(name, **kwargs):
        calls.append((name, kwargs))
        if name == "no/such":
            raise RuntimeError("404")
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_equal_weights(read("hf:openai/gpt2")[0], read(tiny)[0])
    read("hf:openai/gpt2?revision=refs/pr/1")
    patterns = {"allow_patterns": ["*.json", "*.safetensors"]}
    assert calls == [
        ("openai/gpt2", {"revision": None, **patterns}),
        ("openai/gpt2", {"revision": "refs/pr/1", **patterns}),
    ]
    with pytest.raises(OSError, match="Cannot download 'hf:no/such'.*404"):
        read("hf:no/such")
    for bad in ("hf:", "hf:a/b/c", "hf:../x", "hf:a b", "hf:a?branch=b"):
        with pytest.raises(ValueError, match="hf:OWNER/NAME"):
            read(bad)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        read("hf:openai/gpt2")


# What is wrong with a checkpoint is found before anything is allocated.


@pytest.fixture
def nothing_built(monkeypatch):
    def build(*args, **kwargs):
        raise AssertionError("a backbone was built")

    monkeypatch.setattr(checkpoints, "StableBackbone", build)


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _index(directory, weight_map, **more):
    """One tensor in each of two shards, as an index says."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    names = list(tensors)
    for i, part in enumerate((names[:5], names[5:])):
        shard = {name: tensors[name] for name in part}
        shard |= more if i == 1 else {}
        save_file(shard, directory / f"part-{i}.safetensors")
    whole = {n: f"part-{int(i >= 5)}.safetensors" for i, n in enumerate(names)}
    if callable(weight_map):
        weight_map = weight_map(whole)
    path.unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def shard_at(place):
    def change(directory):
        _index(directory, lambda whole: {**whole, "x": place})
        shutil.copy(
            directory / "part-0.safetensors", directory.parent / "x.safetensors"
        )

    return change


def pickled(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def without(name):
    return lambda d: rewrite(d, lambda t: t.pop(name) is None)


def with_tensor(name, array):
    def add(tensors):
        tensors[name] = array

    return lambda d: rewrite(d, add)


def file_of(name, data):
    return lambda d: (d / name).write_bytes(data)


WTE, BIAS = "transformer.wte.weight", "transformer.h.0.attn.c_attn.bias"
ZEROS = np.zeros((V, 16), "float32")
HUGE = (2**63).to_bytes(8, "little")
HOSTILE = {
    "pickled": (pickled, "only as pytorch_model.bin.*may run code"),
    "truncated": (truncate, "damaged or incomplete"),
    "empty": (file_of("model.safetensors", b""), "damaged or incomplete"),
    "garbage": (file_of("model.safetensors", b"\0" * 99), "damaged or"),
    "header": (file_of("model.safetensors", HUGE + b"{}"), "damaged or"),
    "text": (file_of("model.safetensors", b"<html>" * 9), "damaged or"),
    "missing": (without(BIAS), "lacks 1 tensors.*c_attn.bias"),
    "unexpected": (with_tensor("transformer.x", ZEROS), "1 tensors that are"),
    "twice": (with_tensor("wte.weight", ZEROS), "twice.*'wte.weight'"),
    "shape": (with_tensor(WTE, ZEROS[1:]), r"\(61, 16\).*Received: \(60, 16"),
    "rank": (with_tensor(WTE, ZEROS[None]), r"\(1, 61, 16\)"),
    "transposed": (with_tensor(WTE, ZEROS.T.copy()), r"\(16, 61\)"),
    "integers": (with_tensor(WTE, ZEROS.astype("int8")), "quantized.*I8"),
    "no object": (file_of("config.json", b"[1]"), "JSON object.*list"),
    "no JSON": (file_of("config.json", b"{"), "config.json is not JSON"),
    "no text": (file_of("config.json", b"\xff\xfe"), "is not JSON"),
    "deep": (file_of("config.json", b'{"a":' + b"[" * 10**5), "not JSON"),
    "digits": (file_of("config.json", b'{"a":' + b"1" * 10**4), "not JSON"),
    "kind": (file_of("config.json", b"{}"), "Unknown `model_type`"),
    "wide": (lambda d: reconfigure(d, n_embd=2**30), r"shape \(61, 1073741824"),
    "deeper": (lambda d: reconfigure(d, n_layer=9999), "lacks 1199"),
    "endless": (lambda d: reconfigure(d, n_layer=10**9), "`n_layer`"),
    "negative": (lambda d: reconfigure(d, vocab_size=-61), "`vocab_size`"),
    "string": (lambda d: reconfigure(d, vocab_size="61"), "`vocab_size`"),
    "boolean": (lambda d: reconfigure(d, n_layer=True), "`n_layer`"),
    "up": (shard_at("../x.safetensors"), "safetensors files beside it"),
    "root": (shard_at("/tmp/x.safetensors"), "safetensors files beside it"),
    "folder": (shard_at("a/x.safetensors"), "safetensors files beside it"),
    "windows": (shard_at("..\\x.safetensors"), "safetensors files beside it"),
    "suffix": (shard_at("x.bin"), "safetensors files beside it"),
    "number": (shard_at(7), "safetensors files beside it"),
    "null": (shard_at(None), "safetensors files beside it"),
    "absent": (shard_at("part-0.safetensors"), "lacks tensor 'x'"),
    "no map": (lambda d: _index(d, []), "no `weight_map`"),
    "empty map": (lambda d: _index(d, {}), "no `weight_map`"),
    "two files": (
        lambda d: _index(d, lambda whole: whole, **{BIAS: ZEROS}),
        "is in two files",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints(name, tiny, nothing_built):
    spoil, message = HOSTILE[name]
    spoil(tiny)
    with pytest.raises(ValueError, match=message):
        read(tiny)


def test_missing_files(tiny, nothing_built):
    with pytest.raises(FileNotFoundError, match="must be a directory"):
        read(tiny / "nowhere")
    with pytest.raises(FileNotFoundError, match="must be a directory"):
        read(str(tiny / "config.json"))
    with pytest.raises(FileNotFoundError, match="hf:OWNER/NAME"):
        read("openai/gpt2")
    _index(tiny, lambda whole: whole)
    (tiny / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part-1.*is incomplete"):
        read(tiny)
    (tiny / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="Neither model.safetensors"):
        read(tiny)
    (tiny / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="No config.json"):
        read(tiny)
    with pytest.raises(TypeError, match="A checkpoint is a directory"):
        read(7)


def test_live_models_amiss(nothing_built):
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(CONFIGS["gpt2"]())
    with pytest.raises(ValueError, match="on the meta device"):
        read(model)
    config = transformers.LlamaConfig(
        **{k: v for k, v in SIZES.items() if not k.endswith("id")}
    )
    with pytest.raises(ValueError, match="Unknown `model_type`.*'llama'"):
        read(transformers.LlamaForCausalLM(config))
    config = CONFIGS["gpt2"]()
    config.num_labels, config.pad_token_id = 2, 0
    model = transformers.GPT2ForSequenceClassification(config)
    with pytest.raises(ValueError, match="1 tensors that are no part.*score"):
        read(model)


# A write leaves all or nothing.


def test_nothing_is_overwritten(tmp_path):
    backbone = ks.StableBackbone(V, 1, 2, 16, variant="qwen3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="There is something at"):
            write(backbone, None, tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write(backbone, None, tmp_path / "empty")
    write(backbone, None, tmp_path / "new" / "deep")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full", "new"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    backbone = ks.StableBackbone(V, 1, 2, 16, variant="qwen3")
    written = []

    def fail(arrays, path, **kwargs):
        written.append(path)
        if len(written) > 1:
            raise OSError("No space left on device")
        save_file(arrays, path, **kwargs)

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        write(backbone, None, tmp_path / "a", max_shard_size=5000)
    assert len(written) == 2 and os.listdir(tmp_path) == []


def test_bad_arguments(tmp_path):
    backbone = ks.StableBackbone(V, 1, 2, 16, variant="qwen3")
    with pytest.raises(ValueError, match="Did you mean 'bfloat16'"):
        write(backbone, None, tmp_path / "a", dtype="bfloat")
    for size in (0, 1.5, "5GB", True):
        with pytest.raises(ValueError, match="`max_shard_size` must be"):
            write(backbone, None, tmp_path / "a", max_shard_size=size)
    backbone = ks.StableBackbone(V, 1, 2, 16, variant="qk_norm")
    with pytest.raises(ValueError, match="'qk_norm' with.*nearest, gpt2.*qk="):
        write(backbone, None, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_only_files_that_hold_no_code_are_read():
    assert set(tensor_files._PATTERNS) == {"*.json", "*.safetensors"}
