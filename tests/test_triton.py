"""The kernels of GPUs, without one: interpreted, and compiled for a Hopper.

Triton lies in a folder that nothing else sees, see the Makefile: imported
where jax or TensorFlow is, its LLVM and theirs end the process.
"""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

HERE = Path(__file__).parent
FOLDER = Path(sys.prefix, "triton")

if keras.backend.backend() != "torch":
    pytest.skip("Triton's kernels are torch's", allow_module_level=True)
if not (FOLDER / "triton").exists():
    pytest.skip(f"needs Triton in {FOLDER}", allow_module_level=True)


@pytest.mark.parametrize("way", ["interpreted", "compiled"])
def test_kernels(way, tmp_path):
    paths = [str(FOLDER), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_INTERPRET": "1" if way == "interpreted" else "0",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, HERE / f"triton_{way}.py"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
