"""Runs of a recipe that are processes of their own, each with a log."""

import os
import subprocess


def launch(command, log, backend, jobs, **settings):
    """Begins one of `jobs` processes that share this machine.

    Args:
        command: list of strings.
        log: path of the file that takes what it prints.
        backend: Keras's.
        jobs: how many run at once.
        **settings: further variables of its environment.
    """
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **settings,
    }
    with open(log, "w") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def last_line(log):
    """What a process that failed said last."""
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "?"
