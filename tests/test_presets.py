"""Presets, LoRA and quantisation, by us and by stock KerasHub."""

import json

import fresh
import keras
import keras_hub
import numpy as np
import pytest

import keras_stable as ks

IDS = np.random.default_rng(0).integers(1, 256, (2, 8)).astype("int32")


def numpy(x):
    return keras.ops.convert_to_numpy(x)


def small(variant="qk_norm_cap"):
    backbone = ks.StableBackbone(256, 2, 2, 16, variant=variant)
    preprocessor = ks.StableCausalLMPreprocessor(ks.ByteTokenizer())
    return ks.StableCausalLM(backbone, preprocessor)


def logits(lm):
    return numpy(lm({"token_ids": IDS}))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_stock_keras_hub_loads_a_preset(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    lm, path = small(), str(tmp_path / "preset")
    lm.save_to_preset(path)
    for again in (
        ks.StableCausalLM.from_preset(path),
        keras_hub.models.CausalLM.from_preset(path),
    ):
        assert again.dtype_policy.name == policy
        np.testing.assert_array_equal(logits(again), logits(lm))
        assert again.backbone.variant == lm.backbone.variant
    backbone = keras_hub.models.Backbone.from_preset(path)
    assert type(backbone) is ks.StableBackbone
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(path)
    assert tokenizer.detokenize(tokenizer.tokenize("hé")) == "hé"


def test_a_preset_loads_in_a_fresh_process(tmp_path):
    lm, path = small("gemma3"), str(tmp_path / "preset")
    lm.save_to_preset(path)
    np.savez(tmp_path / "x.npz", ids=IDS, logits=logits(lm))
    code = (
        "import sys, keras, keras_hub, numpy as np, keras_stable\n"
        "d = sys.argv[1]\n"
        "lm = keras_hub.models.CausalLM.from_preset(d + '/preset')\n"
        "x = np.load(d + '/x.npz')\n"
        "y = keras.ops.convert_to_numpy(lm({'token_ids': x['ids']}))\n"
        "np.testing.assert_allclose(y, x['logits'], atol=1e-6)\n"
        "lm.compile(sampler='greedy')\n"
        "assert lm.generate('ab', max_length=8).startswith('ab')\n"
    )
    fresh.run(code, tmp_path)


@pytest.mark.parametrize("variant", ["baseline", "sigma_reparam"])
def test_lora_trains_alone_and_is_saved_merged(variant, tmp_path):
    lm, path = small(variant), str(tmp_path / "preset")
    lm.backbone.enable_lora(2)
    names = {v.path.rsplit("/", 1)[1] for v in lm.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b"}
    before = logits(lm)
    lm.compile(ks.AdamW(1e-1))
    lm.fit({"token_ids": IDS}, IDS, epochs=2, verbose=0)
    assert np.abs(logits(lm) - before).max() > 1e-3
    lm.save_to_preset(path)
    again = ks.StableCausalLM.from_preset(path)
    np.testing.assert_allclose(logits(again), logits(lm), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_int8_is_near_and_is_saved(tmp_path):
    lm, path = small("qk_norm"), str(tmp_path / "preset")
    before = logits(lm)
    lm.quantize("int8")
    after = logits(lm)
    assert any(str(v.dtype) == "int8" for v in lm.weights)
    assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()
    lm.save_to_preset(path)
    again = ks.StableCausalLM.from_preset(path)
    np.testing.assert_allclose(logits(again), after, atol=1e-6)


def test_layout_map_has_every_matrix():
    if keras.backend.backend() != "jax":
        pytest.skip("only jax has devices that Keras can lay weights on")
    mesh = keras.distribution.DeviceMesh(
        (1, 1), ("batch", "model"), keras.distribution.list_devices()[:1]
    )
    layout = ks.StableBackbone.get_layout_map(mesh)
    for variant in ("baseline", "gpt2", "gemma3"):
        for v in small(variant).weights:
            if len(v.shape) == 2 and "position" not in v.path:
                assert sorted(layout[v.path].axes) == ["batch", "model"]
    with pytest.raises(ValueError, match="no axis 'heads'"):
        ks.StableBackbone.get_layout_map(mesh, "heads")


def damaged(path, how):
    config = path / "config.json"
    content = json.loads(config.read_text())
    if how == "truncated weights":
        weights = path / "model.weights.h5"
        weights.write_bytes(weights.read_bytes()[:3000])
    elif how == "no weights":
        (path / "model.weights.h5").unlink()
    elif how == "not json":
        config.write_text("{")
    elif how == "a list":
        config.write_text("[]")
    elif how == "another class":
        content["registered_name"] = content["class_name"] = "system"
        content["module"] = "os"
        config.write_text(json.dumps(content))
    elif how == "another shape":
        content["config"]["hidden_dim"] = 32
        config.write_text(json.dumps(content))
    elif how == "outside":
        (path / "model.weights.h5").unlink()
        shards = {"weight_map": {"/layers": ["../../secret.weights.h5"]}}
        (path / "model.weights.json").write_text(json.dumps(shards))


@pytest.mark.parametrize(
    "how",
    [
        "truncated weights",
        "no weights",
        "not json",
        "a list",
        "another class",
        "another shape",
        "outside",
    ],
)
@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_a_damaged_preset_is_an_error(how, tmp_path):
    path = tmp_path / "preset"
    small().backbone.save_to_preset(str(path))
    damaged(path, how)
    with pytest.raises(ValueError) as error:
        ks.StableBackbone.from_preset(str(path))
    assert len(str(error.value)) > 20


# Learned positions; windows, tied embeddings and caps; a length in a formula.
@pytest.mark.parametrize("variant", ["gpt2", "gemma3", "soft_clip"])
@pytest.mark.filterwarnings("ignore:The `native_serialization`")  # Keras's.
def test_an_export_runs_without_keras(variant, tmp_path):
    lm, on_torch = small(variant), keras.backend.backend() == "torch"
    ids = np.random.default_rng(1).integers(1, 256, (3, 13)).astype("int32")
    np.savez(tmp_path / "x.npz", ids=ids, logits=numpy(lm({"token_ids": ids})))
    path = tmp_path / ("program.pt2" if on_torch else "program")
    lm.export(path, verbose=False)
    load = (
        "import torch\n"
        "program = torch.export.load(path).module()\n"
        "y = program({'token_ids': torch.tensor(x['ids'])}).detach()\n"
        if on_torch
        else "import tensorflow as tf\n"
        "program = tf.saved_model.load(path)\n"
        "y = program.serve({'token_ids': x['ids']})\n"
    )
    code = (
        "import sys, numpy as np\n"
        "path, x = sys.argv[1], np.load(sys.argv[2])\n"
        + load
        + "np.testing.assert_allclose(y.numpy(), x['logits'], atol=1e-5)\n"
        "assert 'keras_stable' not in sys.modules\n"
    )
    fresh.run(code, path, tmp_path / "x.npz")


def test_export_names_what_a_backend_can_write(tmp_path):
    with pytest.raises(ValueError, match="torch writes torch"):
        small().export(tmp_path / "x.onnx", format="onnx")
