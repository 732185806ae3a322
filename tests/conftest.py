"""Shared by all tests: one process tests one backend, KERAS_BACKEND."""

import os

import pytest

# Eight simulated devices, before jax starts.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402


@pytest.fixture(autouse=True)
def fresh():
    """The same random numbers in every test, no state from the one before."""
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy("float32")
    yield
    keras.distribution.set_distribution(None)
    keras.utils.clear_session(free_memory=False)
