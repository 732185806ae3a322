"""A run directory: what was run, and what happened at every step.

```
run.json       configuration, versions, device, commit, results; one object
health.jsonl   one JSON object a training step: {"step": 1, "loss": 5.54}
model.keras    the trained model
```

Numbers that JSON does not have are the strings "nan", "inf" and "-inf".
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import keras

from keras_stable import backend

SCHEMA = 1
PACKAGES = "keras keras-hub numpy grain jax torch tensorflow tensorflow-cpu"


def _to_json(value):
    """`value` with non-finite floats as strings, ready for strict JSON."""
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _from_json(record):
    return {
        key: float(value) if value in ("nan", "inf", "-inf") else value
        for key, value in record.items()
    }


def environment():
    """Where a run takes place: what another needs to repeat it.

    Returns:
        Dictionary with `"versions"` (of Python, of the backend, of the
        packages that are installed), `"backend"`, `"device"`, `"git_commit"`
        (of the working directory, None outside a repository; `"+changes"` if
        files differ from it), `"command"` and `"started"` (UTC).
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES.split():
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "backend": keras.backend.backend(),
        "device": backend.device_name(),
        "versions": versions,
        "git_commit": _git_commit(),
        "command": " ".join(["python", *sys.argv]),
        "started": now.isoformat(timespec="seconds"),
    }


def _git_commit():
    def git(*arguments):
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class RunDirectory:
    """One run's directory, written as the run goes.

    Args:
        path: the directory. Made, with its parents, if it is not there.
        config: dictionary of JSON values: what was asked for.

    Attributes:
        record: dictionary, the content of `run.json`.

    Raises:
        FileExistsError: if it holds a run already.
        OSError: if it cannot be written.

    Example:

    >>> run = RunDirectory("runs/a", {"variant": "qk_norm"})  # doctest: +SKIP
    >>> run.update(status="finished", val_loss=1.9)           # doctest: +SKIP
    """

    def __init__(self, path, config):
        self.path = Path(path)
        file = self.path / "run.json"
        if file.exists():
            raise FileExistsError(
                f"{self.path} already holds another run (its {file.name} is "
                f"of variant {_variant_of(file)}). Give a new directory, or "
                "delete this one."
            )
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(
                f"{self.path} is a file. Give a directory for the run."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.record = {"schema": SCHEMA, "status": "running"}
        self.update(config=config, **environment())

    def update(self, **entries):
        """Adds entries to `run.json`, or replaces them."""
        self.record.update(_to_json(entries))
        file = self.path / "run.json"
        # A reader, or a full disk, never sees half a file.
        part = file.with_suffix(".part")
        part.write_text(json.dumps(self.record, indent=2) + "\n")
        os.replace(part, file)


def _variant_of(file):
    try:
        return repr(json.loads(file.read_text())["config"]["variant"])
    except (ValueError, KeyError, TypeError):
        return "unknown"


def read_run(path):
    """The content of a directory's `run.json`."""
    return json.loads((Path(path) / "run.json").read_text())


def read_health(path):
    """The records of a directory's `health.jsonl`, in the order of steps.

    A last line cut off by a crash is left out.
    """
    records = []
    with open(Path(path) / "health.jsonl") as file:
        for line in file:
            try:
                records.append(_from_json(json.loads(line)))
            except ValueError:
                if line.endswith("\n"):
                    raise
    return sorted(records, key=lambda record: record["step"])


class LossRecorder(keras.callbacks.Callback):
    """Writes the true loss of every training step to `health.jsonl`.

    `logs["loss"]` of Keras is the mean since the epoch began. This callback
    takes `logs["batch_loss"]`, which `StableCausalLM` reports.

    Args:
        path: the run directory; must exist.

    Attributes:
        last_loss: float, of the last step recorded; None before the first.
    """

    # Keras may then call it from other threads, several at once, while the
    # device goes on with the next step.
    async_safe = True

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)
        self.last_loss = None
        self._lock = threading.Lock()
        self._ended = self._before = 0

    def on_train_begin(self, logs=None):
        self._file = open(self.path / "health.jsonl", "a", buffering=1)

    def on_epoch_begin(self, epoch, logs=None):
        self._before = self._ended

    def on_train_batch_end(self, batch, logs=None):
        if "batch_loss" not in logs:
            self._file.close()
            raise ValueError(
                "`LossRecorder` needs a model that reports `batch_loss`, as "
                f"`StableCausalLM` does. Received logs: {list(logs)}"
            )
        step, loss = self._before + batch + 1, float(logs["batch_loss"])
        line = json.dumps(_to_json({"step": step, "loss": loss}))
        with self._lock:
            self._file.write(line + "\n")
            if step > self._ended:
                self._ended, self.last_loss = step, loss

    def on_train_end(self, logs=None):
        self._file.close()
