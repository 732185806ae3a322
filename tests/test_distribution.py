"""Distributions on simulated devices and in several processes; refusals."""

import functools
import re

import distributed
import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable.distribution import LAYOUTS
from keras_stable.telemetry import STATISTICS

BACKEND = keras.backend.backend()
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="jax has meshes")
NAMES = [name for name in ks.DISTRIBUTIONS if name != "none"]
PAPER = list(ks.VARIANTS)[:10]


def train(distribution, variant, count=1, **settings):
    import jax

    keras.utils.clear_session(free_memory=False)
    settings |= {"devices": jax.devices()[:count]}
    settings |= {"distribution": distribution, "variant": variant}
    return distributed.train(settings)


@functools.cache
def alone(variant):
    lm, found = train("none", variant)
    return [w.numpy() for w in lm.weights], found


def same(found, expected):
    np.testing.assert_allclose(
        found["losses"], expected["losses"], rtol=1e-5
    )
    np.testing.assert_allclose(found["evaluated"], expected["evaluated"], 1e-5)
    if not expected["tables"]:
        return
    found, expected = np.array(found["tables"]), np.array(expected["tables"])
    # Means and kurtosis near zero are differences of large numbers.
    scale = np.abs(expected[..., STATISTICS.index("rms")])[..., None]
    np.testing.assert_array_less(
        np.abs(found - expected), 1e-3 * (np.abs(expected) + scale)
    )


@on_jax
@pytest.mark.parametrize(
    "name, variant", list(zip(NAMES, ["sigma_reparam", "qk_norm_cap"] * 2))
)
def test_four_devices_equal_one(name, variant):
    weights, expected = alone(variant)
    lm, found = train(name, variant, 4)
    same(found, expected)
    for a, b in zip(weights, lm.weights):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-5)


@on_jax
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", PAPER)
def test_any_number_of_devices_equals_one(variant, name, count):
    same(train(name, variant, count)[1], alone(variant)[1])


@on_jax
@pytest.mark.parametrize("name, parts", list(zip(NAMES, (1, 4, 2, 4))))
def test_each_device_holds_its_part(name, parts):
    """Of weights and slots alike; and of the compiled step's arguments."""
    import jax

    tensor_parallel = 2 if "tensor" in name else None
    ks.set_distribution(name, 8, tensor_parallel, jax.devices()[:4])
    lm = ks.StableCausalLM(ks.StableBackbone(64, 2, 4, 64))
    lm.compile(ks.AdamW(1e-2))
    lm.optimizer.build(lm.trainable_variables)
    slots = lm.optimizer.variables[-2 * len(lm.trainable_variables) :]
    for v in [*lm.weights, *slots]:
        held = {s.data.size for s in v.value.addressable_shards}
        matrix = len(v.shape) == 2
        assert held == {v.value.size // (parts if matrix else 1)}, v.path


@pytest.mark.parametrize("name", ks.VARIANTS)
def test_one_rule_for_each_weight(name):
    layers = 11 if name == "baseline" else 2
    backbone = ks.StableBackbone(
        31, layers, 2, 16, variant=name, max_sequence_length=8
    )
    lm = ks.StableCausalLM(backbone)
    backbone.enable_lora(2)
    used = set()
    for v in lm.weights:
        rules = [p for p in LAYOUTS if re.fullmatch(f"(.*/)?{p}", v.path)]
        assert len(rules) == 1, (v.path, rules)
        assert len(LAYOUTS[rules[0]]) in (0, len(v.shape)), v.path
        if len(v.shape) == 2 and "lora" not in v.path:
            assert set(LAYOUTS[rules[0]]) & {"model", "batch"}, v.path
        used |= set(rules)
    assert len(used) >= 5


@on_jax
def test_two_processes_equal_one():
    expected = alone("qk_norm")[1]
    settings = {"distribution": "fsdp", "variant": "qk_norm"}
    found = distributed.launch(2, 2, **settings)
    check_processes(found, expected, 2)


@on_jax
@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, devices, name, tensor_parallel, shards",
    [
        (2, 1, "data", None, 2),
        (4, 1, "fsdp", None, 4),
        (4, 1, "tensor", 4, 1),  # One model over all processes.
        (2, 2, "tensor", 2, 2),
        (4, 2, "fsdp+tensor", 4, 2),  # A model over two processes.
    ],
)
def test_more_processes_equal_one(
    processes, devices, name, tensor_parallel, shards
):
    settings = {"distribution": name, "tensor_parallel": tensor_parallel}
    found = distributed.launch(
        processes, devices, variant="sigma_reparam", **settings
    )
    check_processes(found, alone("sigma_reparam")[1], shards)


def check_processes(found, expected, shards):
    for one in found:
        same(one, expected)
    for step, batch in enumerate(expected["rows"]):
        parts = [one["rows"][step] for one in found]
        # Processes of one model see the same rows; of several, each its own.
        different = [p for i, p in enumerate(parts) if p not in parts[:i]]
        assert len(different) == shards
        assert [row for part in different for row in part] == batch


@on_jax
def test_what_does_not_divide():
    import jax

    four = jax.devices()[:4]
    with pytest.raises(ValueError, match="multiple of the 4 devices.*6"):
        ks.set_distribution("data", 6, devices=four)
    with pytest.raises(ValueError, match="must divide the 4 devices.*3"):
        ks.set_distribution("tensor", 8, 3, devices=four)
    with pytest.raises(ValueError, match="`tensor_parallel`.*Received: 0"):
        ks.set_distribution("tensor", 8, 0, devices=four)
    with pytest.raises(ValueError, match="is for 'tensor'.*'data'"):
        ks.set_distribution("data", 8, 2, devices=four)
    ks.set_distribution("tensor", 8, devices=four)
    with pytest.raises(ValueError, match="6 heads cannot be shared by 4"):
        ks.StableBackbone(32, 1, 6, 24)
    with pytest.warns(UserWarning, match="not cut in 4 parts"):
        backbone = ks.StableBackbone(31, 1, 4, 16)
    ids = np.ones((1, 3), "int32")
    # A prompt that does not divide either.
    assert np.isfinite(backbone({"token_ids": ids})).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_replicas_of_tensorflow_equal_one():
    settings = {"backend": "tensorflow", "variant": "sigma_reparam"}
    one, four = (
        distributed.launch(1, 4, distribution=name, **settings)[0]
        for name in ("none", "data")
    )
    np.testing.assert_allclose(four["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(four["evaluated"], one["evaluated"], 1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_tensorflow_has_data_parallelism_alone():
    for name in set(NAMES) - {"data"}:
        with pytest.raises(ValueError, match="only 'data'.*=jax"):
            ks.set_distribution(name, batch_size=8)
    with pytest.raises(ValueError, match="multiple of the 2 devices.*3"):
        ks.set_distribution("data", 3, devices=["CPU:0", "CPU:1"])


@pytest.mark.skipif(BACKEND != "torch", reason="torch.distributed")
def test_processes_of_torch_equal_one():
    settings = {"backend": "torch", "variant": "sigma_reparam"}
    (one,) = distributed.launch(1, 1, distribution="none", **settings)
    found = distributed.launch(2, 1, distribution="data", **settings)
    check_processes(found, one, 2)


@pytest.mark.skipif(BACKEND != "torch", reason="torch.distributed")
def test_torch_has_data_parallelism_alone(monkeypatch):
    for name in set(NAMES) - {"data"}:
        with pytest.raises(ValueError, match="only 'data'.*=jax"):
            ks.set_distribution(name, batch_size=8)
    with pytest.raises(ValueError, match="torchrun"):
        ks.set_distribution("data", batch_size=8)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="multiple of the 2 processes.*3"):
        ks.set_distribution("data", batch_size=3)


@pytest.mark.skipif(BACKEND == "jax", reason="jax hears of it")
def test_distributions_that_keras_ignores_are_refused():
    parallel = keras.distribution.DataParallel(devices=["cpu:0"])
    keras.distribution.set_distribution(parallel)
    with pytest.raises(ValueError, match="Keras ignores.*set_distribution"):
        ks.StableCausalLM(ks.StableBackbone(31, 1, 2, 16))


def test_unknown_name():
    with pytest.raises(ValueError, match="Did you mean 'data'"):
        ks.set_distribution("dta", batch_size=8)
