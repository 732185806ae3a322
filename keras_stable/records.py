"""A run directory: what was run, and what happened at every step.

```
run.json       configuration, versions, device, commit, results; one object
health.jsonl   what the monitor saw, one JSON object a line, each of a "kind":
    layout     names of what the tables hold, with the schema's version
    step       {"kind": "step", "step": 1, "loss": 5.54, ...} of every step
    table      all statistics of a step, in the order of the last layout
    event      what a detector found, or what was done: "guard", "back_off",
               "rewind", "autopsy"
    verdict    a change of the run's verdict
    overhead   what the monitor measured of its own cost
events/        black boxes: STEP-DETECTOR.npz, the steps before an event
monitor.json   the state of the detectors, for resuming
skipped.jsonl  the batches that a rewind passed over, a range a line
checkpoints/   states of the whole training, see `snapshots`
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
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np

from keras_stable import backend
from keras_stable import json_files

SCHEMA = 2
PACKAGES = (
    "keras keras-hub numpy grain orbax-checkpoint jax torch tensorflow "
    "tensorflow-cpu"
)


def to_json(value):
    """`value` with non-finite floats as strings, ready for strict JSON."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        # Five digits: more than the noise of any of them.
        return [to_json(float(f"{x:.5g}")) for x in value.ravel().tolist()]
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(value):
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def write_json(file, value, indent=2):
    """Writes a file whole: a reader, or a full disk, never sees half of it."""
    part = Path(file).with_suffix(".part")
    # Left by a crash, or a link to what is not ours.
    part.unlink(missing_ok=True)
    part.write_text(json.dumps(to_json(value), indent=indent) + "\n")
    os.replace(part, file)


def read_json(file):
    """The content of a file that `write_json` wrote."""
    return from_json(json_files.read_json(file))


def versions():
    """Versions of Python and of those of `PACKAGES` that are installed.

    Returns:
        Dictionary from names to versions.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES.split():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment():
    """Where a run takes place: what another needs to repeat it.

    Returns:
        Dictionary with `"versions"` (of Python, of the backend, of the
        packages that are installed), `"backend"`, `"device"`, `"git_commit"`
        (of the working directory, None outside a repository; `"+changes"` if
        files differ from it), `"command"` and `"started"` (UTC).
    """
    return {
        "backend": keras.backend.backend(),
        "device": backend.device_name(),
        **software(),
    }


def software():
    """The part of `environment` that touches no device.

    Returns:
        Dictionary with `"versions"`, `"git_commit"`, `"command"` and
        `"started"`.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    script = sys.argv[0]
    if os.path.isabs(script):
        # Not where the package happens to lie on this machine.
        script = min(script, os.path.relpath(script), key=len)
    return {
        "versions": versions(),
        "git_commit": _git_commit(),
        "command": " ".join(["python", script, *sys.argv[1:]]),
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
        begin: int. The step after which the run that it holds goes on; 0
            deletes what the monitor recorded. Defaults to None: a new run.

    Of several processes that train one model, one writes.

    Attributes:
        writes: bool. Whether this process does.
        record: dictionary, the content of `run.json`. Its `"resumed"` is a
            list: where and when it went on, after which step.

    Raises:
        FileExistsError: if it holds a run already, and `begin` is None.
        OSError: if it cannot be written.

    Example:

    >>> run = RunDirectory("runs/a", {"variant": "qk_norm"})  # doctest: +SKIP
    >>> run.update(status="finished", val_loss=1.9)           # doctest: +SKIP
    """

    def __init__(self, path, config, begin=None):
        self.path = Path(path)
        self.writes = backend.is_writer()
        file = self.path / "run.json"
        if begin is not None:
            if begin == 0 and self.writes:
                cut(path, 0, 0)
            self.record = read_run(path)
            again = [{"step": begin, **environment()}]
            again = self.record.get("resumed", []) + again
            self.update(status="running", resumed=again)
            return
        self.record = {"schema": SCHEMA, "status": "running"}
        if not self.writes:
            self.update(config=config, **environment())
            return
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
        self.update(config=config, **environment())

    def update(self, **entries):
        """Adds entries to `run.json`, or replaces them."""
        self.record.update(to_json(entries))
        if self.writes:
            write_json(self.path / "run.json", self.record)


def _variant_of(file):
    try:
        return repr(json_files.read_json(file)["config"]["variant"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def read_run(path):
    """The content of a directory's `run.json`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON object.
    """
    return json_files.read_json(Path(path) / "run.json")


def place_of(directory):
    """What the place of a sweep's run, `LABEL/lr-RATE/seed-SEED`, says of it.

    Returns:
        Dictionary of `"label"`, `"learning_rate"` and `"seed"`; empty for
        another place.

    >>> place_of("runs/qk_norm/lr-0.006/seed-1")
    {'label': 'qk_norm', 'learning_rate': 0.006, 'seed': 1}
    """
    path = Path(directory).resolve()
    found = re.search(r"/lr-([0-9.e+-]+)/seed-([0-9]+)$", path.as_posix())
    try:
        rate, seed = float(found[1]), int(found[2])
    except (TypeError, ValueError):
        return {}
    return {"label": path.parents[1].name, "learning_rate": rate, "seed": seed}


def directories_with(paths, *names):
    """The directories in `paths` that hold a file of one of the names.

    Returns:
        List of `Path`s, each once, sorted.
    """
    files = (Path(path).rglob(name) for path in paths for name in names)
    return sorted({file.parent for found in files for file in found})


def cut(path, step, size):
    """Deletes what was recorded after a step.

    Args:
        path: the run's directory.
        step: int.
        size: bytes of `health.jsonl` after that step, or None: it is left.
    """
    file = Path(path) / "health.jsonl"
    if size is not None and file.exists() and file.stat().st_size > size:
        check_ours(file)
        os.truncate(file, size)
    for box in (Path(path) / "events").glob("*-*.npz"):
        number = box.name.partition("-")[0]
        if number.isdecimal() and int(number) > step:
            box.unlink()


def check_ours(file):
    """Refuses to write to a `health.jsonl` that is another's."""
    if not file.exists():
        return
    with open(file, "rb") as lines:
        first = lines.readline()
    try:
        first = json_files.parse(first or b'{"kind": "step"}', file)
    except ValueError:
        first = {}
    # Without telemetry there is no layout.
    if first.get("schema") != SCHEMA and first.get("kind") != "step":
        raise FileExistsError(
            f"{file} is not a record of schema {SCHEMA}, and is left alone. "
            "Give another directory."
        )
