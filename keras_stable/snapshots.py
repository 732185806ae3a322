"""Checkpoints as directories: which are whole, and which may be deleted.

```
DIRECTORY/
    00000100/            one checkpoint, by its step
        arrays/          weights and slots, as Orbax writes them
        state.json       all else
        manifest.json    bytes and SHA-256 of each file; written last
    00000150.damaged/    what `set_aside` found of no use
    latest.json          the last that was completed
```

A directory without a manifest was never completed, or was being deleted. One
whose files are not those of its manifest is damaged.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from keras_stable.records import read_json
from keras_stable.records import write_json

MANIFEST, STATE, ARRAYS = "manifest.json", "state.json", "arrays"
SCHEMA = 1


def folder(directory, step):
    """The path of a step's checkpoint."""
    return Path(directory) / f"{step:08d}"


def steps(directory):
    """Steps of all checkpoints, complete or not, in order."""
    found = Path(directory).glob("*/")
    return sorted(int(p.name) for p in found if p.name.isdecimal())


def is_sealed(directory, step):
    """Whether a checkpoint was completed; it may have been damaged since."""
    return (folder(directory, step) / MANIFEST).exists()


def was_completed(directory):
    """Whether there ever was a complete checkpoint."""
    sealed = any(is_sealed(directory, step) for step in steps(directory))
    return sealed or (Path(directory) / "latest.json").exists()


def _files(path):
    """The files of a checkpoint but its manifest, `{name: path}`."""
    return {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*"))
        if not file.is_dir() and file != path / MANIFEST
    }


def _measure(file, sync=False):
    if file.is_symlink() or not file.is_file():
        return None
    with open(file, "rb") as content:
        if sync:
            os.fsync(content.fileno())
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _digest(content):
    """SHA-256 of a manifest's content."""
    content = {k: v for k, v in content.items() if k != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(directory, step):
    """Completes a checkpoint: its files are on the disk, then the manifest.

    Raises:
        OSError: if the disk is full.
    """
    path = folder(directory, step)
    files = _files(path)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda file: _measure(file, sync=True), files.values())
        content = {"schema": SCHEMA, "step": step}
        content["files"] = dict(zip(files, found))
    content["sha256"] = _digest(content)
    write_json(path / MANIFEST, content)
    write_json(Path(directory) / "latest.json", {"step": step})


def verify(directory, step):
    """Reads all of a checkpoint.

    Returns:
        What is wrong with it; None if it is as it was sealed.

    Raises:
        ValueError: if it was written by another version.
    """
    path = folder(directory, step)
    if not is_sealed(directory, step):
        return "it was never completed"
    try:
        content = read_json(path / MANIFEST)
        if content["sha256"] != _digest(content):
            return f"{MANIFEST} is damaged"
        schema = content["schema"]
        if schema != SCHEMA:
            raise ValueError(
                f"{path} was written by another version of keras_stable: its "
                f"schema is {schema!r}, this one reads {SCHEMA}."
            )
        if content["step"] != step:
            return f"it is of step {content['step']!r}"
        return _compare(content["files"], _files(path))
    except OSError as error:
        return f"it cannot be read: {error}"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"{MANIFEST} is damaged"
    except (TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is no manifest"


def _compare(wanted, files):
    for name in sorted(wanted.keys() | files.keys()):
        if name not in files:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} does not belong to it"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, found in zip(files, pool.map(_measure, files.values())):
            if found is None:
                return f"{name} is not a plain file"
            if found["bytes"] != wanted[name]["bytes"]:
                return (
                    f"{name} has {found['bytes']} bytes instead of "
                    f"{wanted[name]['bytes']}"
                )
            if found != wanted[name]:
                return f"{name} is damaged"
    return None


def set_aside(directory, step):
    """Renames what is damaged, so that it is not counted among the good."""
    path = folder(directory, step)
    if is_sealed(directory, step):
        with contextlib.suppress(OSError):
            path.rename(path.with_name(path.name + ".damaged"))


def remove(directory, step):
    """Deletes a checkpoint; one that is half deleted counts as incomplete."""
    path = folder(directory, step)
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def prune(directory, step, keep_last, keep_every):
    """Deletes what the newest checkpoint, just sealed, has made superfluous.

    Kept are it, `keep_last - 1` before it, all at multiples of `keep_every`,
    and the last whose monitor had nothing to say: one that was saved while a
    loss spike was growing does not replace it. Incomplete ones go.

    Returns:
        List of the steps deleted.
    """
    earlier = [s for s in steps(directory) if s <= step]
    sealed = [s for s in earlier if is_sealed(directory, s)]
    keep = {step, *sealed[-keep_last:]}
    if keep_every is not None:
        keep |= {s for s in sealed if s % keep_every == 0}
    for s in reversed(sealed):
        if _is_calm(directory, s):
            keep.add(s)
            break
    gone = [s for s in earlier if s not in keep]
    for s in gone:
        remove(directory, s)
    return gone


def _is_calm(directory, step):
    try:
        state = read_json(folder(directory, step) / STATE)
        return state.get("verdict") in (None, "OK")
    except (OSError, ValueError, AttributeError):
        return False


def differences(theirs, ours, name=""):
    """What differs between two JSON values, as sentences.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    ['a.b is 1 there and 2 here']
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in {**theirs, **ours}:
            path = f"{name}.{key}" if name else key
            found += differences(theirs.get(key), ours.get(key), path)
        return found
    if theirs == ours:
        return []
    return [f"{name} is {theirs!r} there and {ours!r} here"]
