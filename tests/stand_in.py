"""Writes a run directory as `pretrain.py` does, slowly and without training.

    python stand_in.py SECONDS FOLDER LABEL RATE SEED [FOLDER ...]

An arm is stable up to 0.02, but for "weak", up to 0.004. Labels that say so
fail, always ("broken") or the first time ("shaky"), end in NaN ("nans"), or do
not end when they are told to ("stubborn").
A directory that two processes write gets a file `collision`.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 30


def write(file, content):
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content))
    os.replace(part, file)


def loss_at(step, lost, rate, seed):
    if lost and step > 10:
        return 6.0 + 0.01 * seed
    return 5.5 - 3 * step / STEPS - 10 * rate + 0.001 * seed


def at_work(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    # Killed ones may not have been waited for by anybody.
    return state.rpartition(")")[2].split()[0] not in "ZX"


def run(seconds, folder, label, rate, seed):
    folder, rate, seed = Path(folder), float(rate), int(seed)
    owner = folder / "owner"
    if owner.exists() and at_work(owner.read_text()):
        (folder / "collision").touch()
    owner.write_text(str(os.getpid()))
    if label == "broken" or (label == "shaky" and not (folder / "x").exists()):
        (folder / "x").touch()
        print("some words\nno memory for it")
        sys.exit(3)
    config = {"variant": "baseline", "label": label, "learning_rate": rate}
    config |= {"seed": seed, "steps": STEPS}
    config |= {"batch_size": 8, "sequence_length": 16}
    record = {"schema": 2, "status": "running", "config": config}
    record |= {"device": "cpu x 1", "versions": {}, "git_commit": None}
    write(folder / "run.json", record)

    def stop(number, frame):
        write(folder / "run.json", record | {"status": "interrupted"})
        sys.exit(75)

    signal.signal(signal.SIGTERM, stop)
    if label == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    lost = rate > (0.004 if label == "weak" else 0.02)
    with open(folder / "health.jsonl", "w", buffering=1) as file:
        for step in range(1, STEPS + 1):
            loss = loss_at(step, lost, rate, seed)
            line = {"kind": "step", "step": step, "loss": loss}
            file.write(json.dumps(line | {"gradient_norm": 1.0}) + "\n")
            time.sleep(seconds / STEPS)
    validation = "nan" if label == "nans" else loss_at(STEPS, lost, rate, seed)
    record |= {"status": "diverged" if lost else "finished"}
    record |= {"verdict": "DIVERGED" if lost else "OK", "steps_done": STEPS}
    record |= {"validation_loss": validation, "perplexity": 1.0}
    record |= {"validation_batch_losses": [validation] * 2}
    record |= {"corpus": {"unigram_entropy": math.log(200)}}
    owner.unlink()
    write(folder / "run.json", record)


if __name__ == "__main__":
    seconds, *words = sys.argv[1:]
    for i in range(0, len(words), 4):
        run(float(seconds), *words[i : i + 4])
