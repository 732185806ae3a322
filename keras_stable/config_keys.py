"""Keys of `transformers` configurations, checked one by one.

`Key` turns the value of one key into a field of `Variant` and back. Standard
library and values only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from keras_stable.choices import check_number


def refuse(key, received, allowed):
    """The `ValueError` for one key of a configuration."""
    return ValueError(
        f"The configuration's `{key}` must be {allowed}. Received: {received!r}"
    )


def whole(config, key, most=2**31 - 1):
    """The integer from 1 to `most` that a key must have."""
    value = config.get(key)
    # Not isinstance: true is no size.
    if type(value) is not int or not 1 <= value <= most:
        raise refuse(key, value, f"an integer from 1 to {most}")
    return value


def number(config, key):
    """The positive number that a key must have."""
    check_number(config.get(key), f"The configuration's `{key}`", low=0)
    return float(config[key])


def number_or_none(config, key):
    return None if config.get(key) is None else number(config, key)


def flag(config, key):
    if not isinstance(config.get(key), bool):
        raise refuse(key, config.get(key), "true or false")
    return config[key]


def mapping(config, key):
    """The object that a key may have, without its nulls."""
    value = {} if config.get(key) is None else config[key]
    if not isinstance(value, dict):
        raise refuse(key, value, "an object or null")
    return {k: v for k, v in value.items() if v is not None}


@dataclass(frozen=True)
class Key:
    """A key of theirs that is one field of `Variant`.

    Args:
        field: ours.
        read: function `(config, key)`, their value as ours.
        write: function of our value and the sizes. It may return anything
            for a value that has no form there: reading it back shows that.
    """

    field: str
    read: Callable
    write: Callable = lambda value, sizes: value


def _one_of(field, table):
    """A `Key` by a table of their values and ours; of equals the first."""

    def read(config, key):
        value = config.get(key)
        # A list has no hash, and 1 is the hash of true.
        if not isinstance(value, (str, bool)) or value not in table:
            raise refuse(key, value, "one of " + ", ".join(map(repr, table)))
        return table[value]

    def write(value, sizes):
        found = [theirs for theirs, ours in table.items() if ours == value]
        return (found or list(table))[0]

    return Key(field, read, write)


def _read_scalar(config, key):
    scalar = number(config, key)
    return None if scalar == config["head_dim"] else scalar**-0.5


def _write_scalar(value, sizes):
    # An integer in `transformers`; of others reading it back differs.
    return sizes["head_dim"] if value is None else max(1, round(value**-2))


PLAIN = _one_of(
    "activation",
    {
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu": "gelu",
        "relu2": "relu_squared",
    },
)
GATED = _one_of(
    "activation",
    {
        "silu": "swiglu",
        "swish": "swiglu",
        "gelu_pytorch_tanh": "geglu_tanh",
        "gelu_new": "geglu_tanh",
        "gelu": "geglu",
    },
)
EPSILON = Key("epsilon", number)
TIED = Key("tie_embeddings", flag)
ATTENTION_BIAS = _one_of("use_bias", {False: False, True: "attention"})
CAP = Key("cap", number_or_none)
OUTPUT_CAP = Key("output_cap", number_or_none)
# GPT-2's `scale_attn_weights`, and Gemma's scalar, 1 / query_scale^2.
SCALED = _one_of("query_scale", {True: None, False: 1.0})
SCALAR = Key("query_scale", _read_scalar, _write_scalar)
