"""sigma-Reparam against the singular value decomposition."""

import keras
import numpy as np
import pytest
from keras import ops
from reference import gradient

import keras_stable as ks
from keras_stable.linear import power_iteration


def dense(gamma_init="one", shape=(7, 5), **kwargs):
    layer = ks.SigmaReparamDense(shape[1], gamma_init=gamma_init, **kwargs)
    layer.build((None, shape[0]))
    return layer


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 4), (64, 48)])
def test_starts_with_spectral_norm_one(shape):
    layer = dense(shape=shape)
    y = ops.convert_to_numpy(layer(np.eye(shape[0], dtype="float32")))
    # Half a percent: the subspace iteration on a kernel without a gap.
    assert np.linalg.norm(y, 2) == pytest.approx(1, rel=5e-3)


def test_spectral_gamma_starts_as_the_plain_layer():
    layer = dense("spectral", use_bias=False)
    x = np.random.default_rng(0).normal(size=(3, 7)).astype("float32")
    y = ops.convert_to_numpy(layer(x))
    assert np.abs(y - x @ layer.kernel.numpy()).max() < 1e-5


def test_vector_advances_in_training_only_and_finds_the_norm():
    layer = dense()
    kernel = np.random.default_rng(1).normal(size=(7, 5)).astype("float32")
    layer.kernel.assign(kernel)
    x = np.ones((1, 7), "float32")
    before = layer.u.numpy().copy()
    layer(x, training=False)
    assert np.array_equal(layer.u.numpy(), before)
    for _ in range(60):
        sigma = layer.next_state(training=True)
    assert not np.array_equal(layer.u.numpy(), before)
    top = np.linalg.norm(kernel.astype("float64"), 2)
    assert float(ops.convert_to_numpy(sigma)) == pytest.approx(top, rel=1e-5)


def test_gradient_of_sigma_is_the_outer_product_of_singular_vectors():
    kernel = np.random.default_rng(2).normal(size=(6, 4)).astype("float32")
    left, _, right = np.linalg.svd(kernel.astype("float64"))
    u = left[:, 0].astype("float32")
    found = gradient(lambda w: power_iteration(w, ops.array(u))[0], kernel)
    assert np.abs(found - np.outer(left[:, 0], right[0])).max() < 1e-5


def test_unknown_gamma_is_refused():
    with pytest.raises(ValueError, match="gamma_init='two'"):
        ks.SigmaReparamDense(3, gamma_init="two")


def test_weights_survive_saving(tmp_path):
    model = keras.Sequential([keras.Input((7,)), ks.SigmaReparamDense(5)])
    model.layers[0].gamma.assign(3.0)
    model.layers[0].next_state(training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for a, b in zip(model.get_weights(), loaded.get_weights()):
        assert np.array_equal(a, b)
    assert len(model.get_weights()) == 4
