"""Shipped models as values: `FAMILIES`, `find` and `choose`.

The table says how `transformers` writes their configurations down. `find`
recognises a configuration, `choose` finds the family of a model of ours.
"""

from keras_stable import config_keys
from keras_stable.choices import nearest
from keras_stable.config_keys import refuse
from keras_stable.config_keys import whole
from keras_stable.family import FOREIGN
from keras_stable.family import Family

_SIZES = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_sequence_length": "max_position_embeddings",
}
_KEYS = {
    "rms_norm_eps": config_keys.EPSILON,
    "attention_bias": config_keys.ATTENTION_BIAS,
    "tie_word_embeddings": config_keys.TIED,
}
_GEMMA_KEYS = {
    **_KEYS,
    "hidden_activation": config_keys.GATED,
    "query_pre_attn_scalar": config_keys.SCALAR,
    "final_logit_softcapping": config_keys.OUTPUT_CAP,
}
_GEMMA_NORMS = {
    "attention_residual/pre_norm": "input_layernorm",
    "attention_residual/branch_norm": "post_attention_layernorm",
    "mlp_residual/pre_norm": "pre_feedforward_layernorm",
    "mlp_residual/branch_norm": "post_feedforward_layernorm",
}
_GEMMA_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


def _num_heads(sizes):
    return sizes["num_heads"]


def _alternates(config, layer):
    return layer % 2 == 0


def _slides_but_one_in(config, layer):
    return (layer + 1) % whole(config, "sliding_window_pattern") != 0


def _slides_above(config, layer):
    lowest, key = config.get("max_window_layers"), "max_window_layers"
    if type(lowest) is not int:
        raise refuse(key, lowest, "an integer")
    return config_keys.flag(config, "use_sliding_window") and layer >= lowest


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="gpt2",
            model_type="gpt2",
            architecture="GPT2LMHeadModel",
            sizes={
                "vocabulary_size": "vocab_size",
                "num_layers": "n_layer",
                "num_heads": "n_head",
                "hidden_dim": "n_embd",
                "intermediate_dim": "n_inner",
                "max_sequence_length": "n_positions",
            },
            nulls={"n_inner": lambda sizes: 4 * sizes["hidden_dim"]},
            aliases={
                "hidden_size": "n_embd",
                "max_position_embeddings": "n_positions",
                "num_attention_heads": "n_head",
                "num_hidden_layers": "n_layer",
            },
            keys={
                "activation_function": config_keys.PLAIN,
                "layer_norm_epsilon": config_keys.EPSILON,
                "scale_attn_weights": config_keys.SCALED,
                "tie_word_embeddings": config_keys.TIED,
            },
            defaults={
                "vocab_size": 50257,
                "n_positions": 1024,
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "activation_function": "gelu_new",
                "resid_pdrop": 0.1,
                "embd_pdrop": 0.1,
                "attn_pdrop": 0.1,
                "layer_norm_epsilon": 1e-5,
                "scale_attn_weights": True,
                "tie_word_embeddings": True,
            },
            norms={
                "attention_residual/pre_norm": "ln_1",
                "mlp_residual/pre_norm": "ln_2",
            },
            dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
            wavelengths=(),
        ),
        Family(
            name="gemma2",
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            sizes=_SIZES,
            keys={**_GEMMA_KEYS, "attn_logit_softcapping": config_keys.CAP},
            defaults={
                **_GEMMA_DEFAULTS,
                "vocab_size": 256_000,
                "max_position_embeddings": 8192,
                "final_logit_softcapping": 30.0,
                "attn_logit_softcapping": 50.0,
            },
            norms=_GEMMA_NORMS,
            slides=_alternates,
            whole_heads=True,
        ),
        # `transformers` reads no cap on attention logits here.
        Family(
            name="gemma3",
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            sizes=_SIZES,
            keys=_GEMMA_KEYS,
            defaults={
                **_GEMMA_DEFAULTS,
                "vocab_size": 262_208,
                "max_position_embeddings": 131_072,
                "sliding_window_pattern": 6,
            },
            norms=_GEMMA_NORMS,
            slides=_slides_but_one_in,
            wavelengths=(1_000_000.0, 10_000.0),
            whole_heads=True,
        ),
        Family(
            name="qwen3",
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            sizes=_SIZES,
            nulls={"num_key_value_heads": _num_heads},
            keys={**_KEYS, "hidden_act": config_keys.GATED},
            defaults={
                "vocab_size": 151_936,
                "hidden_size": 4096,
                "intermediate_size": 22_016,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "hidden_act": "silu",
                "max_position_embeddings": 32_768,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
                "attention_bias": False,
                "use_sliding_window": False,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
            norms={
                "attention_residual/pre_norm": "input_layernorm",
                "mlp_residual/pre_norm": "post_attention_layernorm",
            },
            slides=_slides_above,
        ),
        Family(
            name="olmo2",
            model_type="olmo2",
            architecture="Olmo2ForCausalLM",
            sizes=_SIZES,
            nulls={
                "num_key_value_heads": _num_heads,
                "head_dim": lambda sizes: (
                    sizes["hidden_dim"] // sizes["num_heads"]
                ),
            },
            keys={**_KEYS, "hidden_act": config_keys.GATED},
            defaults={
                "vocab_size": 50_304,
                "hidden_size": 4096,
                "intermediate_size": 11_008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "hidden_act": "silu",
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": False,
                "attention_bias": False,
            },
            norms={
                "attention_residual/branch_norm": "post_attention_layernorm",
                "mlp_residual/branch_norm": "post_feedforward_layernorm",
            },
        ),
    )
}


def find(config):
    """The family of a configuration.

    Args:
        config: dictionary, as of `config.json` or `config.to_dict()`.

    Returns:
        Tuple of a `Family`, the configuration of its language model, and
        whether that is one part of a model of images and text (Gemma 3).

    Raises:
        ValueError: for any other kind of model.
    """
    kind = config.get("model_type")
    if kind == "gemma3":
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise refuse("text_config", text, "an object in Gemma 3's")
        if text.get("model_type", "gemma3_text") != "gemma3_text":
            raise refuse("text_config.model_type", text, "'gemma3_text'")
        outer = {"tie_word_embeddings", *FOREIGN} & set(config)
        text = {**text, **{key: config[key] for key in outer}}
        return FAMILIES["gemma3"], text, True
    for family in FAMILIES.values():
        if family.model_type == kind:
            return family, config, False
    allowed = [family.model_type for family in FAMILIES.values()]
    raise nearest(kind, [*allowed, "gemma3"], "`model_type`")


def choose(sizes, variant):
    """The family that can say all of a model.

    Args:
        sizes: dictionary of the sizes of `StableBackbone`, all given.
        variant: `Variant`.

    Raises:
        ValueError: if there is none, with what differs from the nearest.
    """
    lacks = {
        name: family.differences(sizes, variant)
        for name, family in FAMILIES.items()
    }
    # Its own family first, where several lack as much.
    own = variant.name.split("+")[0]
    name = min(lacks, key=lambda name: (len(lacks[name]), name != own))
    if lacks[name]:
        raise ValueError(
            f"None of the models {', '.join(FAMILIES)} of `transformers` is "
            f"the variant {variant.name!r} with these sizes. The nearest, "
            f"{name}, differs in: {'; '.join(lacks[name])}"
        )
    return FAMILIES[name]
