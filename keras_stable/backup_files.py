"""Copies of a training's state as files, and one copy: `Backup`."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from keras_stable.choices import check_integer

FORMAT = "keras_stable backup 1"
_FILE = re.compile(r"(\d{8,})(\.good)?\.npz")


@dataclasses.dataclass(eq=False)
class Backup:
    """One copy, from `Backups.newest`.

    Attributes:
        step: int. Steps that were made before it.
        place: int. The place in the data that comes next.
        extra: what `take` was given, as JSON reads it.
        certified: bool.
        nbytes: int. Bytes of its arrays, 0 until they are copied.
    """

    step: int
    place: int
    extra: Any = None
    certified: bool = False
    nbytes: int = 0
    seeds: dict = dataclasses.field(default=None, repr=False)
    # In memory, or else in a file.
    arrays: dict = dataclasses.field(default=None, repr=False)
    path: Path = dataclasses.field(default=None, repr=False)
    # What stands against it: found by the thread that copies.
    fault: str = dataclasses.field(default=None, repr=False)


def name_of(backup):
    return f"{backup.step:08d}{'.good' * backup.certified}.npz"


def _bits(array):
    """An array of a dtype that numpy itself has."""
    if array.dtype.isbuiltin == 1:
        return array
    return array.view(f"uint{8 * array.dtype.itemsize}")


def write(backup, arrays):
    meta = {
        "format": FORMAT,
        "step": backup.step,
        "place": backup.place,
        "extra": backup.extra,
        "nbytes": backup.nbytes,
        "seeds": backup.seeds,
        "dtypes": {name: str(array.dtype) for name, array in arrays.items()},
    }
    text = np.frombuffer(json.dumps(meta).encode(), "uint8")
    numbered = {f"{i}": _bits(x) for i, x in enumerate(arrays.values())}
    part = backup.path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            np.savez(file, meta=text, **numbered)
        os.replace(part, backup.path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read(path, headers=False):
    """What a file says, and its arrays, if it is one of ours and sound."""
    try:
        # Opened here: numpy leaves one open that is no archive.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            if meta["format"] != FORMAT:
                raise ValueError(f"its format is {meta['format']!r}")
            whole = [check_integer(meta[k], k, 0) for k in ("step", "place")]
            if whole[0] != int(_FILE.fullmatch(path.name)[1]):
                raise ValueError(f"it is of step {whole[0]}")
            meta["nbytes"], meta["seeds"], meta["extra"]
            arrays = {}
            for i, (name, dtype) in enumerate(meta["dtypes"].items()):
                if headers:
                    continue
                array = file[f"{i}"]
                if str(array.dtype) != dtype:
                    array = array.view(getattr(ml_dtypes, dtype))
                arrays[name] = array
    except Exception as error:
        # Whatever zip, npy, JSON and their values do not agree with.
        raise ValueError(
            f"{path} is no backup, or damaged: {type(error).__name__}: {error}."
            " Delete it; others, if there are, can be used."
        ) from error
    return meta, arrays


def find(directory):
    """The copies in a directory, left by a process before."""
    found = []
    for path in sorted(directory.iterdir()):
        if path.suffix == ".part" and _FILE.fullmatch(f"{path.stem}.npz"):
            path.unlink()  # Begun, and never completed.
            continue
        match = _FILE.fullmatch(path.name)
        if match:
            meta, _ = read(path, headers=True)
            keys = "step", "place", "extra", "nbytes", "seeds"
            more = {"certified": match[2] is not None, "path": path}
            found.append(Backup(**{k: meta[k] for k in keys}, **more))
    return found
