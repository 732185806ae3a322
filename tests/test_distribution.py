"""Data parallelism on four simulated devices, and refusals elsewhere."""

import keras
import numpy as np
import pytest

import keras_stable as ks

ON_JAX = keras.backend.backend() == "jax"


def losses(distribution):
    keras.utils.set_random_seed(0)
    ks.set_distribution(distribution, batch_size=8)
    tokens = np.random.default_rng(0).integers(0, 31, 600)
    data = ks.TokenBatches(tokens, 8, 8, vocabulary_size=31)
    backbone = ks.StableBackbone(31, 2, 2, 16, variant="sigma_reparam")
    lm = ks.StableCausalLM(backbone)
    lm.compile(ks.AdamW(1e-2))
    found = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: found.append(logs["batch_loss"])
    )
    lm.fit(data, callbacks=[record], verbose=0)
    return lm, found


@pytest.mark.skipif(not ON_JAX, reason="jax alone distributes")
def test_four_devices_equal_one():
    import jax

    assert jax.device_count() == 4
    one, expected = losses("none")
    four, found = losses("data")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(one.weights, four.weights):
        assert len(b.value.sharding.device_set) == 4
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-5)


@pytest.mark.skipif(not ON_JAX, reason="jax alone distributes")
def test_a_batch_must_divide():
    with pytest.raises(ValueError, match="multiple of the 4 devices.*6"):
        ks.set_distribution("data", batch_size=6)


@pytest.mark.skipif(ON_JAX, reason="jax distributes")
def test_other_backends_refuse():
    with pytest.raises(ValueError, match="Use KERAS_BACKEND=jax"):
        ks.set_distribution("data", batch_size=8)
    ks.set_distribution("none", batch_size=8)


def test_unknown_name():
    with pytest.raises(ValueError, match="Did you mean 'data'"):
        ks.set_distribution("dta", batch_size=8)
