"""The same numbers on jax, torch and tensorflow, for every variant."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_stable import VARIANTS

# Three processes are compared once, not once in each backend's test run.
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax"
    or not (find_spec("torch") and find_spec("tensorflow")),
    reason="runs under jax, where all three backends are installed",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    found = {}
    for backend in ("jax", "torch", "tensorflow"):
        file = folder / f"{backend}.npz"
        subprocess.run(
            [sys.executable, Path(__file__).with_name("probe.py"), file],
            env={**os.environ, "KERAS_BACKEND": backend},
            check=True,
            capture_output=True,
        )
        found[backend] = dict(np.load(file))
    return found


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
@pytest.mark.parametrize("name", VARIANTS)
def test_backends_agree(results, name, backend):
    ours, theirs = results["jax"], results[backend]
    assert ours.keys() == theirs.keys()
    key = f"{name}|logits"
    assert ours[key].std() > 0.1
    np.testing.assert_allclose(ours[key], theirs[key], atol=1e-5, rtol=1e-5)
    gradients = [k for k in ours if k.startswith(f"{name}|gradient|")]
    largest = max(np.abs(ours[key]).max() for key in gradients)
    for key in gradients:
        a, b = ours[key], theirs[key]
        assert np.abs(a - b).max() <= 1e-5 * largest, key
        # Adam's first update is lr * sign(g): only where g is more than noise.
        sure = np.abs(a) > max(1e-6, 1e-3 * largest)
        key = key.replace("gradient", "updated")
        np.testing.assert_allclose(
            ours[key][sure], theirs[key][sure], atol=1e-5, err_msg=key
        )
