"""Each activation against its formula in float64."""

import math

import keras
import numpy as np
import pytest
from reference import randomize
from reference import weights_of

import keras_stable as ks
from keras_stable.mlp import ACTIVATIONS

erf = np.vectorize(math.erf)
FUNCTIONS = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / 2**0.5)),
    "gelu_tanh": lambda x: (
        x * 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": lambda x: x / (1 + np.exp(-x)),
}
FUNCTIONS["geglu"] = FUNCTIONS["gelu"]
FUNCTIONS["geglu_tanh"] = FUNCTIONS["gelu_tanh"]


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_is_its_formula(kind, use_bias):
    baseline = ks.get_variant("baseline")
    architecture = ks.Architecture(activation=kind, use_bias=use_bias)
    mlp = ks.MLP(24, variant=baseline.replace(architecture=architecture))
    mlp.build((None, None, 8))
    randomize(mlp)
    w = weights_of(mlp)
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype("float32")

    def linear(x, name):
        return x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0)

    h = linear(x, "fc1")
    if "gate/kernel" in w:
        h = FUNCTIONS[kind](linear(x, "gate")) * h
    else:
        h = FUNCTIONS[kind](h)
    expected = linear(h, "fc2")
    y = keras.ops.convert_to_numpy(mlp(x))
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()
    assert ("gate/kernel" in w) == kind.endswith(
        ("swiglu", "geglu", "geglu_tanh")
    )
    assert ("fc1/bias" in w) == use_bias
