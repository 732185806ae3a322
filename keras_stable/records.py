"""A run directory: what was run, and what happened at every step.

```
run.json       configuration, versions, device, commit, results; one object
health.jsonl   what the monitor saw, one JSON object a line, each of a "kind":
    layout     names of what the tables hold, with the schema's version
    step       {"kind": "step", "step": 1, "loss": 5.54, ...} of every step
    table      all statistics of a step, in the order of the last layout
    event      what a detector found
    verdict    a change of the run's verdict
    overhead   what the monitor measured of its own cost
events/        black boxes: STEP-DETECTOR.npz, the steps before an event
monitor.json   the state of the detectors, for resuming
checkpoints/   states of the whole training, see `snapshots`
model.keras    the trained model
```

Numbers that JSON does not have are the strings "nan", "inf" and "-inf".
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np

from keras_stable import backend
from keras_stable.choices import check_choice
from keras_stable.events import Event

SCHEMA = 2
PACKAGES = (
    "keras keras-hub numpy grain orbax-checkpoint jax torch tensorflow "
    "tensorflow-cpu"
)


def _to_json(value):
    """`value` with non-finite floats as strings, ready for strict JSON."""
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        # Five digits: more than the noise of any of them.
        return [_to_json(float(f"{x:.5g}")) for x in value.ravel().tolist()]
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _from_json(value):
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def write_json(file, value, indent=2):
    """Writes a file whole: a reader, or a full disk, never sees half of it."""
    part = Path(file).with_suffix(".part")
    part.write_text(json.dumps(_to_json(value), indent=indent) + "\n")
    os.replace(part, file)


def read_json(file):
    """The content of a file that `write_json` wrote."""
    return _from_json(json.loads(Path(file).read_text()))


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
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "backend": keras.backend.backend(),
        "device": backend.device_name(),
        "versions": versions(),
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
        begin: int. The step after which the run that it holds goes on; 0
            deletes what the monitor recorded. Defaults to None: a new run.

    Attributes:
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
        file = self.path / "run.json"
        if begin is not None:
            if begin == 0:
                cut(path, 0, 0)
            self.record = read_run(path)
            again = [{"step": begin, **environment()}]
            again = self.record.get("resumed", []) + again
            self.update(status="running", resumed=again)
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
        self.record = {"schema": SCHEMA, "status": "running"}
        self.update(config=config, **environment())

    def update(self, **entries):
        """Adds entries to `run.json`, or replaces them."""
        self.record.update(_to_json(entries))
        write_json(self.path / "run.json", self.record)


def _variant_of(file):
    try:
        return repr(json.loads(file.read_text())["config"]["variant"])
    except (ValueError, KeyError, TypeError):
        return "unknown"


def read_run(path):
    """The content of a directory's `run.json`."""
    return json.loads((Path(path) / "run.json").read_text())


class HealthWriter:
    """Appends to a directory's `health.jsonl`, each line flushed.

    Args:
        path: the directory. Made, with its parents, if it is not there. One
            with a `health.jsonl` is continued: the last of two lines on the
            same step counts.

    Raises:
        FileExistsError: if the path is a file, or `health.jsonl` is not ours.
        OSError: if it cannot be written.
    """

    def __init__(self, path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(
                f"{self.path} is a file. Give a directory for the records."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "health.jsonl"
        _check_ours(file)
        torn = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
        self._file = open(file, "a", buffering=1)
        if torn:
            # Cut off by a crash: the next line begins on its own.
            self._file.write("\n")

    def write(self, kind, **entries):
        line = json.dumps(_to_json({"kind": kind, **entries}))
        self._file.write(line + "\n")

    def position(self):
        """How many bytes were written."""
        self._file.flush()
        return self._file.tell()

    def black_box(self, event, arrays):
        """Writes `events/STEP-DETECTOR.npz`."""
        folder = self.path / "events"
        folder.mkdir(exist_ok=True)
        name = f"{event.step:08d}-{event.detector}.npz"
        np.savez_compressed(folder / name, **arrays)
        return folder / name

    def close(self):
        self._file.close()


def cut(path, step, size):
    """Deletes what was recorded after a step.

    Args:
        path: the run's directory.
        step: int.
        size: bytes of `health.jsonl` after that step, or None: it is left.
    """
    file = Path(path) / "health.jsonl"
    if size is not None and file.exists() and file.stat().st_size > size:
        _check_ours(file)
        os.truncate(file, size)
    for box in (Path(path) / "events").glob("*-*.npz"):
        number = box.name.partition("-")[0]
        if number.isdecimal() and int(number) > step:
            box.unlink()


def _check_ours(file):
    if not file.exists():
        return
    with open(file) as lines:
        first = lines.readline()
    try:
        record = json.loads(first) if first.strip() else {"kind": "step"}
        # Without telemetry there is no layout, which would name the schema.
        plain = SCHEMA if record.get("kind") == "step" else None
        schema = record.get("schema", plain)
    except (ValueError, AttributeError):
        schema = None
    if schema != SCHEMA:
        raise FileExistsError(
            f"{file} is not a record of schema {SCHEMA}, and is left alone. "
            "Give another directory."
        )


@dataclasses.dataclass
class Health:
    """What `health.jsonl` holds.

    Attributes:
        layout: dictionary: `"tensors"`, `"heads"` (name: number of heads),
            `"variables"`, `"labels"`, and the names of statistics.
        steps: list of dictionaries, by step; one a step.
        tables: dictionary from steps to dictionaries of arrays: `"tensors"`
            (L, 6), `"heads"` (a list of (3, N)), `"variables"` (V, 4).
        events: list of `Event`s.
        verdicts, overheads: lists of dictionaries, as written.
        black_boxes: list of paths, by step.
    """

    layout: dict
    steps: list
    tables: dict
    events: list
    verdicts: list
    overheads: list
    black_boxes: list

    def series(self, name):
        """`(steps, values)` of a scalar, e.g. `"loss"`: two arrays."""
        found = [(r["step"], r[name]) for r in self.steps if name in r]
        steps, values = zip(*found) if found else ((), ())
        values = [np.nan if v is None else v for v in values]
        return np.array(steps), np.array(values)

    def table(self, kind, name, statistic):
        """`(steps, values)` of one statistic of a tensor or variable.

        Args:
            kind: `"tensors"`, `"variables"`, or `"heads"`: values (steps, N).
            name: of the layer or variable.
            statistic: e.g. `"rms"`.
        """
        rows = list(self.layout[kind])
        columns = self.layout[f"{kind.rstrip('s')}_statistics"]
        for value, allowed in ((name, rows), (statistic, columns)):
            check_choice(value, allowed, f"name in {kind}")
        i, j = rows.index(name), columns.index(statistic)
        steps = sorted(self.tables)
        at = (j,) if kind == "heads" else (i, j)
        tables = [self.tables[step][kind] for step in steps]
        if kind == "heads":
            tables = [table[i] for table in tables]
        return np.array(steps), np.array([table[at] for table in tables])


def read_health(path):
    """What the monitor wrote to a directory, as a `Health`.

    A last line cut off by a crash is left out.

    Raises:
        OSError: if there is no `health.jsonl`.
        ValueError: for a line that is no JSON.
    """
    layout, steps, tables = {}, {}, {}
    others = {"event": [], "verdict": [], "overhead": []}
    lines = (Path(path) / "health.jsonl").read_text().splitlines(True)
    for number, line in enumerate(lines, 1):
        try:
            record = _from_json(json.loads(line))
            kind = record.pop("kind")
        except (ValueError, KeyError, AttributeError) as error:
            # Cut off: at the end, or before a resumed run went on.
            torn = not line.endswith("\n") or line.startswith("{")
            if torn or not line.strip():
                continue
            raise ValueError(
                f"{path}/health.jsonl, line {number}, is no record: {line!r}"
            ) from error
        if kind == "layout":
            layout = record
        elif kind == "step":
            steps[record["step"]] = record
        elif kind == "table":
            tables[record["step"]] = _table(record, layout)
        else:
            others[kind].append(record)
    return Health(
        layout,
        [steps[step] for step in sorted(steps)],
        tables,
        [Event(**record) for record in others["event"]],
        others["verdict"],
        others["overhead"],
        sorted((Path(path) / "events").glob("*.npz")),
    )


def _table(record, layout):
    def array(values, columns):
        values = np.array(values, "float64")
        return values.reshape(-1, columns)

    return {
        "tensors": array(
            record["tensors"], len(layout["tensor_statistics"])
        ),
        "variables": array(
            record["variables"], len(layout["variable_statistics"])
        ),
        "heads": [
            np.array(values, "float64").reshape(-1, count)
            for values, count in zip(record["heads"], layout["heads"].values())
        ],
    }
