"""Configurations of `transformers`, and variants; no weight is made here."""

import json

import pytest
import transformers

import keras_stable as ks
from keras_stable import families
from keras_stable.families import FAMILIES
from keras_stable.families import choose
from keras_stable.families import find
from keras_stable.layer_kinds import cycle
from keras_stable.layer_kinds import expand

# As on the Hugging Face Hub, without keys of other tasks.
HUB = {
    "openai-community/gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "vocab_size": 50257,
    },
    "google/gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 256000,
    },
    "google/gemma-3-1b-pt": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 262144,
    },
    "google/gemma-3-4b-pt": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen/Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "allenai/OLMo-2-1124-7B": {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": 100352,
    },
}
# V, layers, N, D, F, K, H, positions; and the variant's name.
READ = {
    "openai-community/gpt2": (50257, 12, 12, 768, 3072, 12, 64, 1024, "gpt2"),
    "google/gemma-2-2b": (256000, 26, 8, 2304, 9216, 4, 256, 8192, "gemma2"),
    "google/gemma-3-1b-pt": (
        *(262144, 26, 4, 1152, 6912, 1, 256, 32768),
        "gemma3+sliding_window=(512, 512, 512, 512, 512, None)",
    ),
    "google/gemma-3-4b-pt": (
        *(262208, 34, 8, 2560, 10240, 4, 256, 131072),
        "gemma3+rope_factor=(1.0, 1.0, 1.0, 1.0, 1.0, 8.0)",
    ),
    "Qwen/Qwen3-0.6B": (
        *(151936, 28, 16, 1024, 3072, 8, 128, 40960),
        "qwen3+tie_embeddings=True",
    ),
    "Qwen/Qwen3-8B": (151936, 36, 32, 4096, 12288, 8, 128, 40960, "qwen3"),
    "allenai/OLMo-2-1124-7B": (
        *(100352, 32, 32, 4096, 11008, 32, 128, 4096),
        "olmo2",
    ),
}
CLASSES = {
    "gpt2": transformers.GPT2Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "qwen3": transformers.Qwen3Config,
    "olmo2": transformers.Olmo2Config,
}
TINY = {
    "vocabulary_size": 61,
    "num_layers": 7,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 40,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_sequence_length": 64,
}
# GPT-2 has neither.
PLAIN = {**TINY, "num_key_value_heads": 4, "head_dim": 8}


def read(config, dropout=None):
    family, config, _ = find(config)
    return family.read(config, dropout)


@pytest.mark.parametrize("name", HUB)
def test_published_configurations(name):
    sizes, variant, dropout = read(HUB[name])
    assert (*sizes.values(), variant.name) == tuple(
        dict(zip((*TINY, "name"), READ[name])).get(key)
        for key in (*sizes, "name")
    )
    assert dropout == (0.1 if "gpt2" in name else 0.0)
    if variant.name in ks.VARIANTS:
        assert variant is ks.VARIANTS[variant.name]
    # Ours is how `transformers` understands it, in its own words of today.
    config = dict(HUB[name])
    theirs = transformers.AutoConfig.for_model(config.pop("model_type"))
    theirs = type(theirs)(**config).to_dict()
    assert read(theirs) == (sizes, variant, dropout)


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_are_the_defaults_of_transformers(name):
    theirs = CLASSES[name]()
    config = {"model_type": FAMILIES[name].model_type}
    assert read(config) == read(theirs.to_dict())
    # A list of layers would hide the rule that makes it.
    config = {**theirs.to_dict(), "layer_types": None}
    assert read(config) == read(theirs.to_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_other_names_of_keys_are_known(name):
    assert FAMILIES[name].aliases == CLASSES[name].attribute_map


@pytest.mark.parametrize("name", FAMILIES)
def test_named_variants_round_trip(name):
    variant, sizes = ks.VARIANTS[name], PLAIN if name == "gpt2" else TINY
    family = choose(sizes, variant)
    assert family is FAMILIES[name]
    config = json.loads(json.dumps(family.write(sizes, variant, 0.25)))
    again = read(config)
    assert again[0] == sizes and again[1] is variant
    assert again[2] == (0.25 if name == "gpt2" else 0.0)
    # And through `transformers`.
    theirs = CLASSES[name](**config).to_dict()
    assert read(theirs)[1] is variant


EXPRESSIBLE = [
    ("gpt2", {"activation": "gelu", "tie_embeddings": False}),
    ("gpt2", {"query_scale": 1.0, "epsilon": 1e-6}),
    ("gemma2", {"cap": None, "output_cap": 7.5}),
    ("gemma2", {"query_scale": 144**-0.5, "use_bias": "attention"}),
    ("gemma2", {"sliding_window": 8, "rope_factor": 2.0}),
    ("gemma2", {"sliding_window": None, "activation": "geglu"}),
    ("gemma3", {"sliding_window": (8, None), "rope_wavelength": (5.0, 50.0)}),
    ("gemma3", {"rope_factor": (*[1.0] * 5, 8.0), "output_cap": 30.0}),
    ("gemma3", {"activation": "swiglu", "tie_embeddings": False}),
    ("qwen3", {"sliding_window": (None, None, 9, 9, 9, 9, 9)}),
    ("qwen3", {"use_bias": "attention", "rope_factor": 4.0}),
    ("olmo2", {"tie_embeddings": True, "z_loss": 1e-5}),
    ("olmo2", {"use_bias": "attention", "rope_wavelength": 10_000.0}),
]


@pytest.mark.parametrize("name, changes", EXPRESSIBLE)
def test_changes_round_trip(name, changes):
    variant = ks.get_variant(name).replace(**changes)
    sizes = PLAIN if name == "gpt2" else TINY
    family = choose(sizes, variant)
    config = json.loads(json.dumps(family.write(sizes, variant)))
    theirs = CLASSES[name](**config).to_dict()
    for each in (config, theirs):
        found_sizes, found, _ = read(each)
        assert found_sizes == sizes
        expected = variant.replace(z_loss=0.0, name=found.name)
        # Tuples may be cycled in another way, so layer by layer.
        for layer in range(7):
            assert found.at(7, layer) == expected.at(7, layer)
    # The old style alone, for `transformers` 4.
    if "rope_parameters" in config and changes.get("rope_factor") is None:
        del config["rope_parameters"]
        assert read(config)[1] == found


@pytest.mark.parametrize("name", ks.VARIANTS)
def test_other_variants_are_refused_with_what_differs(name):
    variant = ks.VARIANTS[name]
    if name in FAMILIES:
        return
    with pytest.raises(ValueError, match=r"The nearest, \w+, differs in"):
        choose(PLAIN, variant)


INEXPRESSIBLE = [
    ("gpt2", {}, TINY, r"num_key_value_heads=2 \(there 4\).*head_dim=12"),
    ("gpt2", {"qk": "layer"}, PLAIN, "gpt2, differs in: qkv_norm.qk='layer'"),
    ("gpt2", {"query_scale": 0.3}, PLAIN, "query_scale=0.3"),
    ("gpt2", {"sliding_window": 4}, PLAIN, "sliding_window=4"),
    ("gpt2", {"use_bias": False}, PLAIN, r"use_bias=False \(there True\)"),
    ("gemma2", {"query_scale": 0.3}, TINY, "query_scale=0.3"),
    ("gemma2", {"query_scale": 1e-200}, TINY, "gemma2, differs in"),
    ("gemma2", {"sliding_window": (4, 8)}, TINY, r"sliding_window=\(4, 8\)"),
    ("gemma2", {"rope_wavelength": (1.0, 2.0)}, TINY, "rope_wavelength"),
    ("gemma2", {}, {**TINY, "num_heads": 6}, "hidden_size.*multiple"),
    ("gemma3", {"cap": 50.0}, TINY, "softmax.cap=50.0"),
    ("gemma3", {"rope_factor": (1.0, 2.0)}, TINY, "rope_factor"),
    ("qwen3", {"scale_embeddings": True}, TINY, "scale_embeddings=True"),
    ("qwen3", {"use_bias": True}, TINY, r"use_bias=True \(there"),
    ("qwen3", {"final_norm": "layer"}, TINY, "final_norm='layer'"),
    ("olmo2", {"scope": "head"}, TINY, "olmo2.*scope='head'"),
    ("olmo2", {"output_cap": 30.0}, TINY, "output_cap=30.0"),
    ("olmo2", {"temperature": 0.5}, TINY, "temperature=0.5"),
    ("olmo2", {"logits_dtype": "bfloat16"}, TINY, "logits_dtype='bfloat16'"),
]


@pytest.mark.parametrize("name, changes, sizes, message", INEXPRESSIBLE)
def test_what_no_family_can_say(name, changes, sizes, message):
    variant = ks.get_variant(name)
    variant = variant.replace(**changes) if changes else variant
    with pytest.raises(ValueError, match=message):
        choose(sizes, variant)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
LLAMA = {"type": "llama3", "factor": 8.0}
REFUSED = [
    ("gpt2", {"activation_function": "silu"}, "`activation_function`.*'silu'"),
    ("gpt2", {"activation_function": None}, "`activation_function`.*None"),
    ("gpt2", {"activation_function": ["gelu"]}, "`activation_function`"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "absent.*Received: T"),
    ("gpt2", {"add_cross_attention": True}, "`add_cross_attention` must be"),
    ("gpt2", {"is_encoder_decoder": True}, "`is_encoder_decoder` must be"),
    ("gpt2", {"attn_pdrop": 0.0}, "pass dropout=0.0.*'attn_pdrop': 0.0"),
    ("gpt2", {"n_head": 7}, "`n_embd`.*multiple of `n_head`, 7.*768"),
    ("gpt2", {"pruned_heads": {"1": [2]}}, "`pruned_heads`"),
    ("gpt2", {"layer_types": ["full_attention"]}, "list of 12 names"),
    ("gpt2", {"num_attention_heads": 8}, "absent, `n_head` instead.*8"),
    ("gpt2", {"scale_attn_weights": "no"}, "`scale_attn_weights`.*'no'"),
    ("gemma2", {"hidden_activation": "relu"}, "`hidden_activation`.*'relu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "`use_bidirectional"),
    ("gemma2", {"attention_dropout": 0.1}, "pass dropout=0.0"),
    ("gemma2", {"attention_dropout": "0"}, "pass dropout=0.0"),
    ("gemma2", {"sliding_window": None}, "`sliding_window`.*integer"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 26}, "'chunked_att"),
    ("gemma2", {"layer_types": "full_attention"}, "list of 26 names"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "`query_pre_attn_scalar`"),
    (
        "gemma2",
        {"num_attention_heads": 20},
        "multiple of `num_attention_heads`",
    ),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "`attn_logit_softcapping`"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping`"),
    ("gemma3", {"rope_parameters": {"rope_theta": 1.0}}, "`rope_parameters`"),
    ("gemma3", {"sliding_window_pattern": 0}, "`sliding_window_pattern`"),
    ("gemma3", {"head_dim": 255}, "`head_dim` must be even"),
    ("qwen3", {"rope_scaling": YARN}, "'default' or 'linear'.*'yarn'"),
    ("qwen3", {"rope_parameters": YARN}, "'default' or 'linear'.*'yarn'"),
    ("qwen3", {"rope_scaling": LLAMA}, "'default' or 'linear'.*'llama3'"),
    ("qwen3", {"rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
    ("qwen3", {"rope_scaling": {"type": "linear"}}, "`factor`"),
    ("qwen3", {"rope_scaling": {"factor": 2.0}}, "`factor`.*2.0"),
    ("qwen3", {"rope_parameters": {"mrope_section": [1]}}, "mrope_section"),
    ("qwen3", {"rope_scaling": "linear"}, "`rope_scaling`.*object"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "`partial_rotary_factor`"),
    ("qwen3", {"quantization_config": {"bits": 4}}, "`quantization_config`"),
    ("qwen3", {"auto_map": {"AutoModel": "x.Y"}}, "`auto_map`"),
    ("qwen3", {"per_layer_config": {"0": {}}}, "`per_layer_config`"),
    ("qwen3", {"head_dim": None}, "`head_dim` must be an integer.*None"),
    ("qwen3", {"num_key_value_heads": 5}, "multiple of `num_key_value_heads`"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": "1"}, "max_w"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 32}, "use_sliding_wind"),
    ("qwen3", {"tie_word_embeddings": 1}, "`tie_word_embeddings`.*1"),
    ("qwen3", {"attention_bias": 1}, "`attention_bias`.*1"),
    (
        "olmo2",
        {"hidden_act": "gelu_fast"},
        "`hidden_act` must be one of 'silu'",
    ),
    ("olmo2", {"sliding_window": 128}, "`sliding_window` must be absent"),
    ("olmo2", {"clip_qkv": 8.0}, "`clip_qkv`"),
    ("olmo2", {"final_logit_softcapping": 30.0}, "`final_logit_softcapping`"),
    ("olmo2", {"rms_norm_eps": 0}, "`rms_norm_eps`"),
    ("olmo2", {"rms_norm_eps": float("nan")}, "`rms_norm_eps`"),
    ("olmo2", {"rope_theta": True}, "`rope_theta`"),
    ("olmo2", {"rope_theta": "1e4"}, "`rope_theta`"),
]


@pytest.mark.parametrize("name, changes, message", REFUSED)
def test_what_a_variant_cannot_say(name, changes, message):
    config = {"model_type": FAMILIES[name].model_type, **changes}
    with pytest.raises(ValueError, match=message):
        read(config)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "value", [0, -1, "12", True, 2.0, None, [4], 10**12, float("inf")]
)
def test_absurd_sizes(name, value):
    family = FAMILIES[name]
    for key in family.sizes.values():
        if value is None and key in family.nulls:
            continue
        config = {"model_type": family.model_type, key: value}
        with pytest.raises(ValueError, match=f"`{key}` must be"):
            read(config)


def test_harmless_keys():
    gpt2 = {"model_type": "gpt2", "reorder_and_upcast_attn": True}
    assert read({**gpt2, "summary_type": "mean"})[1] is ks.VARIANTS["gpt2"]
    qwen3 = {**HUB["Qwen/Qwen3-8B"], "partial_rotary_factor": 1.0}
    qwen3 |= {"quantization_config": None, "auto_map": {}}
    qwen3["rope_scaling"] = {"rope_type": "default", "factor": 1.0}
    assert read(qwen3)[1] is ks.VARIANTS["qwen3"]


def test_dropout():
    uneven = {"model_type": "gpt2", "attn_pdrop": 0.0}
    assert read(uneven, dropout=0.2)[2] == 0.2
    assert read({"model_type": "gpt2"})[2] == 0.1
    gemma = {"model_type": "gemma2", "attention_dropout": 0.1}
    assert read(gemma, dropout=0.0)[2] == 0.0


def test_other_models():
    for kind in ("llama", "gpt3", None, 7, ["gpt2"], "gemma"):
        with pytest.raises(ValueError, match="Unknown `model_type`") as caught:
            find({"model_type": kind})
        for family in FAMILIES.values():
            assert repr(family.model_type) in str(caught.value)
    with pytest.raises(ValueError, match="Did you mean 'qwen3'"):
        find({"model_type": "qwen2"})
    with pytest.raises(ValueError, match="`text_config` must be an object"):
        find({"model_type": "gemma3"})
    with pytest.raises(ValueError, match="`text_config.model_type`"):
        find({"model_type": "gemma3", "text_config": {"model_type": "llama"}})
    quantized = {**HUB["google/gemma-3-4b-pt"], "quantization_config": {"b": 4}}
    with pytest.raises(ValueError, match="`quantization_config`"):
        read(quantized)


def test_cycles():
    assert cycle([4, None, 4]) == (4, None)
    assert cycle([None] * 3) is None
    assert cycle([1, 1, 2]) == (1, 1, 2)
    for values in ([1, 2, 1, 2, 1], [None, None, 3], [5]):
        assert expand(cycle(values), len(values)) == values


def test_families_are_variants():
    assert list(FAMILIES) == [v for v in ks.VARIANTS if v in families.FAMILIES]
