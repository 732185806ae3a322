"""Norms against their formulas in float64, and against Keras's layers."""

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable.norms import NORMS

DIM = 12


def built(kind, dtype="float32"):
    layer = NORMS[kind](epsilon=1e-6, dtype=dtype)
    layer.build((None, DIM))
    rng = np.random.default_rng(3)
    for v in layer.weights:
        v.assign(rng.normal(size=v.shape).astype("float32"))
    return layer


def formula(kind, x, w):
    x = x.astype("float64")
    if kind == "l2":
        length = np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
        return w["gain"] * x / length
    if kind.startswith("layer"):
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    if kind == "rms_plus_one":
        return y * (1 + w["scale"])
    return y * w.get("scale", 1) + w.get("bias", 0)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_is_its_formula(kind, size):
    layer = built(kind)
    x = np.random.default_rng(0).normal(size=(3, 5, DIM)) * size + size
    w = {v.name: v.numpy().astype("float64") for v in layer.weights}
    y = keras.ops.convert_to_numpy(layer(x.astype("float32")))
    expected = formula(kind, x.astype("float32"), w)
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "kind, peer",
    [
        ("layer", lambda: keras.layers.LayerNormalization(epsilon=1e-6)),
        ("rms", lambda: keras.layers.RMSNormalization(epsilon=1e-6)),
    ],
)
def test_is_kerass_layer(kind, peer):
    layer, peer = built(kind), peer()
    peer.build((None, DIM))
    values = {v.name: v.numpy() for v in layer.weights}
    for v in peer.weights:
        v.assign(values[{"gamma": "scale", "beta": "bias"}.get(v.name, v.name)])
    x = keras.random.normal((2, 3, DIM))
    y, expected = (keras.ops.convert_to_numpy(f(x)) for f in (layer, peer))
    assert np.abs(y - expected).max() < 1e-5


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_squares_do_not_overflow(kind, dtype):
    layer = built(kind, dtype)
    # The square of 3e4 is beyond float16; that of 1e-4 is below it.
    for size in (3e4, 1e-4):
        x = np.full((1, DIM), size, "float16")
        x[0, ::2] *= -1
        y = keras.ops.convert_to_numpy(keras.ops.cast(layer(x), "float32"))
        assert np.isfinite(y).all()
        w = {v.name: v.numpy().astype("float64") for v in layer.weights}
        expected = formula(kind, x, w)
        assert np.abs(y - expected).max() < 0.02 * np.abs(expected).max()
    assert all(v.dtype == "float32" for v in layer.weights)


def test_epsilon_must_be_positive():
    with pytest.raises(ValueError, match="epsilon=0"):
        ks.LayerNorm(epsilon=0)
