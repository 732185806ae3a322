"""What the monitor wrote of a run, `health.jsonl`: written, and read.

`records` says what it holds.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from keras_stable import json_files
from keras_stable.choices import check_choice
from keras_stable.events import Event
from keras_stable.records import SCHEMA
from keras_stable.records import check_ours
from keras_stable.records import from_json
from keras_stable.records import to_json

# What lines of tables begin with.
TABLE = b'{"kind": "table"'
_COLUMNS = ("tensor", "variable", "head")  # Of which there are statistics.


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
        for name in (file, self.path / "events"):
            if name.is_symlink():
                raise FileExistsError(
                    f"{name} is a link to {os.readlink(name)}, where nothing "
                    "is written. Give another directory."
                )
        check_ours(file)
        torn = file.exists() and _last_byte(file) not in (b"", b"\n")
        self._file = open(file, "a", buffering=1)
        if torn:
            # Cut off by a crash: the next line begins on its own.
            self._file.write("\n")

    def write(self, kind, **entries):
        line = json.dumps(to_json({"kind": kind, **entries}))
        self._file.write(line + "\n")

    def position(self):
        """How many bytes were written."""
        self._file.flush()
        return self._file.tell()

    def black_box(self, event, arrays):
        """Writes `events/STEP-DETECTOR.npz`."""
        folder = self.path / "events"
        folder.mkdir(exist_ok=True)
        file = folder / f"{event.step:08d}-{event.detector}.npz"
        file.unlink(missing_ok=True)  # It may be a link.
        np.savez_compressed(file, **arrays)
        return file

    def close(self):
        self._file.close()


def _last_byte(file):
    with open(file, "rb") as content:
        content.seek(max(0, file.stat().st_size - 1))
        return content.read()


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

        Raises:
            ValueError: for a name that is not there.
        """
        rows = list(self.layout.get(kind, ()))
        columns = list(self.layout.get(f"{kind.rstrip('s')}_statistics", ()))
        for value, allowed in ((name, rows), (statistic, columns)):
            check_choice(value, allowed, f"name in {kind}")
        i, j = rows.index(name), columns.index(statistic)
        steps = sorted(self.tables)
        at = (j,) if kind == "heads" else (i, j)
        tables = [self.tables[step][kind] for step in steps]
        if kind == "heads":
            tables = [table[i] for table in tables]
        return np.array(steps), np.array([table[at] for table in tables])


def read_health(path, tables=True):
    """What the monitor wrote to a directory, as a `Health`.

    A last line cut off by a crash is left out.

    Args:
        path: the directory.
        tables: which of the tables, nearly all of the file, are read: True
            (all), False (none) or `"last"`. Defaults to True.

    Raises:
        OSError: if there is no `health.jsonl`.
        ValueError: for a line that is no record.
    """
    layout, steps, measured = {}, {}, {}
    others = {"event": [], "verdict": [], "overhead": []}
    file = Path(path) / "health.jsonl"
    lines = [*enumerate(file.read_bytes().splitlines(True), 1)]
    if tables is not True:
        large = [i for i, line in lines if line.startswith(TABLE)]
        # Its last line may be cut off.
        large = set(large[:-2] if tables == "last" else large)
        lines = [(i, line) for i, line in lines if i not in large]
    for number, line in lines:
        where = f"{file}, line {number},"
        try:
            record = json_files.parse(line, where)
        except ValueError as error:
            # Cut off: at the end, or before a resumed run went on.
            torn = not line.endswith(b"\n") or line.startswith(b"{")
            if torn or not line.strip():
                continue
            raise ValueError(
                f"{where} is no record: {line[:200]!r}"
            ) from error
        try:
            record = from_json(record)
            kind = record.pop("kind")
            if kind == "layout":
                layout = _layout(record)
            elif kind == "step":
                steps[int(record["step"])] = record
            elif kind == "table":
                measured[int(record["step"])] = _table(record, layout)
            elif kind == "event":
                others[kind].append(Event(**record))
            else:
                others[kind].append(record)
        except json_files.WRONG as error:
            raise ValueError(
                f"{where} is no record of schema {SCHEMA}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return Health(
        layout,
        [steps[step] for step in sorted(steps)],
        measured,
        others["event"],
        others["verdict"],
        others["overhead"],
        sorted((Path(path) / "events").glob("*.npz")),
    )


def _layout(record):
    """The record, of whose entries all but the version are names."""
    for key, names in record.items():
        named = isinstance(names, (list, dict)) and {*map(type, names)} <= {str}
        if key != "schema" and not named:
            raise TypeError(f"{key!r} must hold names")
    return record


def _table(record, layout):
    def array(values, rows, columns):
        return np.array(values, "float64").reshape(rows, columns)

    columns = {k: len(layout[f"{k}_statistics"]) for k in _COLUMNS}
    heads = zip(record["heads"], layout["heads"].values(), strict=True)
    return {
        "tensors": array(
            record["tensors"], len(layout["tensors"]), columns["tensor"]
        ),
        "variables": array(
            record["variables"], len(layout["variables"]), columns["variable"]
        ),
        "heads": [array(values, columns["head"], n) for values, n in heads],
    }
