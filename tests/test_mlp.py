"""Each activation against its formula in float64."""

import math

import keras
import numpy as np
import pytest
from reference import randomize
from reference import weights_of
from reference import with_gradients

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
@pytest.mark.parametrize("inner", [None, "rms"])
def test_is_its_formula(kind, use_bias, inner):
    baseline = ks.get_variant("baseline")
    architecture = ks.Architecture(activation=kind, use_bias=use_bias)
    variant = baseline.replace(architecture=architecture, inner=inner)
    mlp = ks.MLP(24, variant=variant)
    mlp.build((None, None, 8))
    randomize(mlp)
    w = weights_of(mlp)
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype("float32")

    def linear(x, name):
        return x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0)

    h = linear(x, "fc1")
    if inner:
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
        h = h * w["inner_norm/scale"]
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gelu_in_sixteen_bits_is_rounded_once(dtype):
    x = np.linspace(-9, 9, 4001).astype("float32")
    x = keras.ops.convert_to_tensor(x, dtype=dtype)
    exact = keras.ops.convert_to_numpy(keras.ops.cast(x, "float32"))
    exact = exact.astype("float64")
    expected = exact * 0.5 * (1 + erf(exact / 2**0.5))
    y = ACTIVATIONS["gelu"][0](x)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    found = keras.ops.convert_to_numpy(keras.ops.cast(y, "float32"))
    # Half of the last place, and what float32 loses before it is rounded.
    digits = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(found, expected, rtol=digits, atol=2e-6)

    def total(x):
        y = ACTIVATIONS["gelu"][0](keras.ops.cast(x, dtype))
        return keras.ops.sum(keras.ops.cast(y, "float32"))

    _, (gradient,) = with_gradients(total, exact.astype("float32"))
    bell = np.exp(-(exact**2) / 2) / (2 * np.pi) ** 0.5
    slope = 0.5 * (1 + erf(exact / 2**0.5)) + exact * bell
    gradient = keras.ops.convert_to_numpy(gradient)
    np.testing.assert_allclose(gradient, slope, rtol=digits, atol=2e-6)
