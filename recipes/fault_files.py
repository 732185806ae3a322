"""What `faults.py` does to files between two starts of a training.

Each takes the directory of a half-done run, the digest of the weights that it
must end with, and a generator of random numbers; and tells how it went on.
"""

import hashlib
import json
import os

from fault_runs import last_step
from fault_runs import numbered
from fault_runs import outcome
from fault_runs import refusal


def files_of(checkpoint, rng, count=1):
    files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file()]
    return rng.sample([p for p in files if p.stat().st_size], count)


def truncate(file, rng):
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncated(path, reference, rng):
    *_, older, newest = numbered(path)
    truncate(*files_of(newest, rng), rng)
    told = f"step {int(newest.name)} passed over"
    made = last_step(path)
    return outcome(path, reference, made, int(older.name), told)


def bit_flip(path, reference, rng):
    *_, older, newest = numbered(path)
    flip(*files_of(newest, rng), rng)
    told = f"step {int(newest.name)} passed over"
    return outcome(path, reference, last_step(path), int(older.name), told)


def half_deleted(path, reference, rng):
    *_, older, newest = numbered(path)
    files = [p for p in newest.rglob("*") if p.is_file()]
    for file in rng.sample(files, rng.randrange(1, len(files))):
        file.unlink()
    told = f"step {int(newest.name)} passed over"
    return outcome(path, reference, last_step(path), int(older.name), told)


def all_damaged(path, reference, rng):
    for checkpoint in numbered(path):
        damage = rng.choice([truncate, flip])
        damage(*files_of(checkpoint, rng), rng)
    return refusal(path, ["No checkpoint in"])


def other_config(path, reference, rng):
    return refusal(
        path,
        ["config.run is 1 there"],
        config={"run": rng.randrange(2, 99)},
    )


def other_version(path, reference, rng):
    """Another library: told, and gone on. Another format: refused."""
    newest = numbered(path)[-1]
    if rng.random() < 0.5:
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["schema"] = rng.randrange(2, 9)
        seal(newest, manifest)
        return refusal(path, ["another version of keras_stable"])
    state = json.loads((newest / "state.json").read_text())
    package = rng.choice(["keras", "numpy", "grain"])
    state["versions"][package] = f"0.{rng.randrange(99)}"
    (newest / "state.json").write_text(json.dumps(state))
    content = (newest / "state.json").read_bytes()
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    seal(newest, manifest)
    told = "made by other versions"
    return outcome(path, reference, last_step(path), int(newest.name), told)


def seal(checkpoint, manifest):
    """Makes a changed manifest valid."""
    manifest.pop("sha256")
    text = json.dumps(manifest, sort_keys=True)
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def data_changed(path, reference, rng):
    file = path / "text.txt"
    text = file.read_text()
    place = rng.randrange(len(text))
    how = rng.choice(["replace", "remove", "add"])
    keep = {"replace": place + 1, "remove": place + 1, "add": place}[how]
    new = "" if how == "remove" else "~"
    file.write_text(text[:place] + new + text[keep:])
    return refusal(path, ["The state belongs to other batches"])


def data_removed(path, reference, rng):
    (path / "text.txt").unlink()
    return refusal(path, ["No file at"])
