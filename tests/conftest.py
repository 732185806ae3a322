"""Shared by all tests: one process tests one backend, KERAS_BACKEND."""

import gc
import os
import signal
import tempfile

import pytest

# Before jax starts: eight simulated devices. Programs are small and run a few
# times, so that most of a test is their compilation: XLA, which TensorFlow
# uses too, leaves its expensive passes out.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_llvm_disable_expensive_passes=true",
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Tests compare runs of the same program: it is compiled once, for all
    # processes of the session.
    programs = tempfile.TemporaryDirectory(prefix="jax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests send it: a shell that starts them in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

import keras  # noqa: E402


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    # Modules stay: whoever collects garbage need not look at them again.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path:
        forget_programs()


def forget_programs():
    """Frees what backends keep of every program for as long as they live."""
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    if keras.backend.backend() == "tensorflow":
        from tensorflow.python.framework import ops

        # Of each custom gradient in each graph, and the model through it.
        known = ops.gradient_registry._registry
        for name in [*known]:
            if name.startswith("CustomGradient-"):
                del known[name]
    gc.collect()


@pytest.fixture(autouse=True)
def fresh():
    """The same random numbers in every test, no state from the one before."""
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy("float32")
    yield
    keras.distribution.set_distribution(None)
    keras.utils.clear_session(free_memory=False)
