"""Code in a fresh process, on the backend of the tests."""

import os
import subprocess
import sys


def run(code, *arguments):
    """Runs Python code; it finds the arguments in `sys.argv`."""
    subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
