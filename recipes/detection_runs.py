r"""Real trainings, healthy and lost, for detection.py to judge by.

Question: which curves do trainings have that should never be stopped, and
those that should? Five kinds: byte language models of this package, a
KerasHub GPT-2, an LSTM, a convolutional classifier, a regression (its loss is
no cross-entropy). The healthy ones meet what looks like trouble: warm-ups,
none, learning rates that restart, bad batches, label noise, a burst of it,
mixed precision, tiny batches, resuming. The others are given too high a
learning rate, a jump of it, a broken weight, float16 without loss scaling.
Names say what was planned; what became of a run, its curve says.

    python recipes/detection_runs.py --jobs 14
    python recipes/detection_runs.py --only "mlp|conv|lstm"
    python recipes/detection_runs.py --scale small --out runs/small

Each run is a process of its own and leaves a run directory in `--out`; those
that are there are not run again, so that the command continues where it
stopped. One H200 and 16 cores run 14 of the language models at a time in two
and a half minutes. On one of two CPU cores a regression takes 10 to 50
seconds, a classifier 35 to 160, an LSTM 160 to 190; of `small` ones (500
steps, width 64) a GPT-2 takes 60 to 100, another language model 50 to 240.
"""

import argparse
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import time
from pathlib import Path

from child_runs import last_line
from child_runs import launch
from detection_models import CHANGES
from detection_models import KINDS
from detection_models import SEQUENCE
from detection_models import spoil

# Fractions of the steps, so that `--scale tiny` has everything too.
DEFAULTS = {
    "steps": 1000,
    "optimizer": "ours",  # Or a name in `keras.optimizers`.
    "settings": {},  # Of the optimizer.
    "learning_rate": 3e-3,
    "warmup": 0.05,
    "schedule": "cosine",
    "factor": 30.0,  # Of a jump or pulse of the learning rate.
    "at": 0.5,  # When it comes, and when `change` is made.
    "change": None,
    "targets": None,  # What is wrong with some of them: see TARGETS.
    "precision": "float32",
    "scale_loss": True,
    "batch_size": 32,
    "layers": 4,
    "width": 128,
    "variant": "baseline",
    "seed": 0,
}
STOCK = {"optimizer": "Adam", "schedule": "constant", "warmup": 0.0}
SGD = {
    "optimizer": "SGD",
    "settings": {"momentum": 0.9},
    "schedule": "constant",
    "warmup": 0.0,
}
DEEP = {**STOCK, "layers": 12, "width": 256, "steps": 700}
JUMP = {**STOCK, "schedule": "jump"}
FLOAT16 = {"precision": "mixed_float16"}
UNSCALED = {"settings": {"loss_scale_factor": 2.0**24}, "scale_loss": False}

# Kind, name, what differs from the defaults.
HEALTHY = [
    ("lm", "baseline", {"learning_rate": 1e-3}),
    ("lm", "baseline-seed-1", {"learning_rate": 1e-3, "seed": 1}),
    ("lm", "qk-norm-cap", {"variant": "qk_norm_cap"}),
    ("lm", "qk-norm-edge", {"variant": "qk_norm", "learning_rate": 3e-2}),
    ("lm", "sigma-reparam", {"variant": "sigma_reparam"}),
    ("lm", "soft-cap", {"variant": "soft_cap"}),
    ("lm", "layer-scale", {"variant": "layer_scale"}),
    ("lm", "long", {"steps": 1500, "schedule": "wsd"}),
    ("lm", "deep", {"layers": 10, "width": 256, "learning_rate": 1e-3}),
    ("lm", "no-warmup", {"warmup": 0.0, "learning_rate": 1e-3}),
    ("lm", "stock-adam", {**STOCK, "learning_rate": 1e-3}),
    ("lm", "stock-adamw", {**STOCK, "optimizer": "AdamW"}),
    ("lm", "lion", {**STOCK, "optimizer": "Lion", "learning_rate": 1e-4}),
    ("lm", "restarts", {"schedule": "restarts"}),
    (
        "lm",
        "restarts-high",
        {
            "schedule": "restarts",
            "learning_rate": 1e-2,
            "variant": "qk_norm",
        },
    ),
    ("lm", "pulse", {"schedule": "pulse", "learning_rate": 1e-3}),
    ("lm", "bad-batches", {"targets": "bad_batches"}),
    ("lm", "burst", {"targets": "burst"}),
    ("lm", "label-noise", {"targets": "noise"}),
    ("lm", "tiny-batch", {"batch_size": 2, "learning_rate": 1e-3}),
    (
        "lm",
        "accumulation",
        {"settings": {"gradient_accumulation_steps": 4}},
    ),
    ("lm", "bfloat16", {"precision": "mixed_bfloat16"}),
    ("lm", "float16", FLOAT16),
    ("lm", "resume", {"change": "resume"}),
    ("gpt2", "stock", {"optimizer": "AdamW", "learning_rate": 1e-3}),
    ("gpt2", "no-warmup", {**STOCK, "learning_rate": 3e-4}),
    ("gpt2", "restarts", {"schedule": "restarts", "learning_rate": 1e-3}),
    ("gpt2", "bad-batches", {"targets": "bad_batches"}),
    ("lstm", "adam", {"optimizer": "Adam"}),
    ("lstm", "clipped-sgd", {**SGD, "learning_rate": 0.3}),
    ("conv", "adam", {**STOCK, "learning_rate": 1e-3}),
    ("conv", "sgd", {**SGD, "learning_rate": 0.03, "schedule": "cosine"}),
    ("conv", "restarts", {**SGD, "schedule": "restarts"}),
    ("conv", "bad-batches", {**STOCK, "targets": "bad_batches"}),
    ("conv", "label-noise", {**STOCK, "targets": "noise"}),
    ("conv", "float16", {**STOCK, **FLOAT16, "learning_rate": 1e-3}),
    ("mlp", "adam", {**STOCK, "learning_rate": 1e-3}),
    ("mlp", "sgd", {**SGD, "learning_rate": 0.003}),
    ("mlp", "restarts", {**STOCK, "schedule": "restarts"}),
    ("mlp", "burst", {**STOCK, "targets": "burst"}),
]
LOST = [
    ("lm", "hot-0.03", {**DEEP, "learning_rate": 0.03}),
    ("lm", "hot-0.1", {**DEEP, "learning_rate": 0.1}),
    ("lm", "hot-0.3", {**DEEP, "learning_rate": 0.3}),
    ("lm", "hot-1", {**DEEP, "learning_rate": 1.0}),
    ("lm", "hot-clipped", {"learning_rate": 0.3, "layers": 8, "width": 256}),
    ("lm", "hot-lion", {**DEEP, "optimizer": "Lion", "learning_rate": 0.03}),
    ("lm", "hot-sgd", {**SGD, "learning_rate": 3.0, "layers": 8}),
    ("lm", "hotter-sgd", {**SGD, "learning_rate": 30.0, "layers": 8}),
    ("lm", "jump-30", {**JUMP, "learning_rate": 1e-3}),
    ("lm", "jump-100", {**JUMP, "learning_rate": 1e-3, "factor": 100.0}),
    ("lm", "jump-1000", {**JUMP, "learning_rate": 1e-3, "factor": 1000.0}),
    (
        "lm",
        "jump-100-early",
        {
            **JUMP,
            "learning_rate": 1e-3,
            "factor": 100.0,
            "steps": 2000,
            "at": 0.25,
        },
    ),
    (
        "lm",
        "jump-clipped",
        {"schedule": "jump", "learning_rate": 1e-3, "factor": 300.0},
    ),
    ("lm", "nan-weight", {"change": "nan_weight"}),
    ("lm", "hot-softmax", {"change": "hot_softmax", "schedule": "constant"}),
    ("lm", "broken-norms", {"change": "broken_norms", "learning_rate": 1e-3}),
    ("lm", "float16", {**STOCK, **FLOAT16, **UNSCALED}),
    ("gpt2", "hot", {**STOCK, "learning_rate": 0.1}),
    ("gpt2", "jump", {**JUMP, "learning_rate": 3e-4, "factor": 1000.0}),
    ("gpt2", "nan-weight", {"change": "nan_weight", "learning_rate": 1e-3}),
    ("gpt2", "float16", {**STOCK, **FLOAT16, **UNSCALED}),
    ("lstm", "hot", {**STOCK, "learning_rate": 1.0}),
    ("lstm", "jump", {**JUMP, "learning_rate": 3e-3, "factor": 300.0}),
    ("conv", "hot-sgd", {**SGD, "learning_rate": 10.0}),
    ("conv", "hot", {**STOCK, "learning_rate": 1.0}),
    ("conv", "jump", {**SGD, "schedule": "jump", "factor": 3000.0}),
    ("conv", "nan-weight", {**STOCK, "change": "nan_weight"}),
    ("mlp", "hot-sgd", {**SGD, "learning_rate": 0.3}),
    ("mlp", "hot", {**STOCK, "learning_rate": 1.0}),
    ("mlp", "jump", {**SGD, "schedule": "jump", "factor": 300.0}),
    ("mlp", "jump-adam", {**JUMP, "learning_rate": 1e-3, "factor": 1000.0}),
    ("mlp", "nan-weight", {**STOCK, "change": "nan_weight"}),
]


def planned(seeds=1, scale="full"):
    """All runs: dictionaries of settings, by name; one seed after another."""
    runs = {}
    declared = [("healthy", *run) for run in HEALTHY]
    declared += [("lost", *run) for run in LOST]
    for seed in range(seeds):
        for fate, kind, name, changes in declared:
            run = {**DEFAULTS, **changes, "kind": kind, "scale": scale}
            run["seed"] += 100 * seed
            if scale == "small":
                run.update(steps=max(500, run["steps"] // 2), width=64)
                run["layers"] //= 2
                run["batch_size"] = min(run["batch_size"], 16)
            if scale == "tiny":
                run.update(steps=240, layers=2, width=32)
                run["batch_size"] = min(run["batch_size"], 8)
            full = f"{fate}-{kind}-{name}" + (f"-{seed}" if seed else "")
            assert full not in runs, full
            runs[full] = run
    return runs


def schedule_of(run, keras, ks):
    stock = keras.optimizers.schedules
    peak, steps = run["learning_rate"], run["steps"]
    at, hot = int(run["at"] * steps), run["factor"] * run["learning_rate"]
    if run["schedule"] == "restarts":
        return stock.CosineDecayRestarts(peak, steps // 5, alpha=0.02)
    if run["schedule"] == "jump":
        return stock.PiecewiseConstantDecay([at], [peak, hot])
    if run["schedule"] == "pulse":
        return stock.PiecewiseConstantDecay([at, at + 10], [peak, hot, peak])
    return ks.WarmupSchedule(
        peak,
        steps,
        warmup_steps=int(run["warmup"] * steps),
        shape=run["schedule"],
    )


def train(name, run, out):
    """One run, from its data to its records."""
    import grain
    import keras

    import keras_stable as ks

    logging.getLogger("absl").setLevel(logging.ERROR)
    keras.utils.set_random_seed(run["seed"])
    keras.config.set_dtype_policy(run["precision"])
    data, build = KINDS[run["kind"]]
    batch, chance = data(run, ks)
    batches = grain.MapDataset.range(run["steps"]).map(spoil(run, batch))
    schedule = schedule_of(run, keras, ks)
    optimizer = ks.AdamW
    if run["optimizer"] != "ours":
        optimizer = getattr(keras.optimizers, run["optimizer"])
    model = build(run, keras, ks)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(True)
    model.compile(
        optimizer(schedule, **run["settings"]),
        loss="mse" if run["kind"] == "mlp" else cross_entropy,
        auto_scale_loss=run["scale_loss"],
    )
    part = Path(out) / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)  # Of a run that was cut off.
    warmup = getattr(schedule, "warmup_steps", 0)
    record = ks.RunDirectory(part, {**run, "warmup_steps": warmup})
    record.update(chance=chance, parameters=model.count_params())
    middle = int(run["at"] * run["steps"]) if run["change"] else run["steps"]
    begin = time.time()
    for first, last in ((0, middle), (middle, run["steps"])):
        if first == last:
            continue
        if first and run["change"] == "resume":
            model.save(part / "model.keras")
            model = keras.models.load_model(part / "model.keras")
            (part / "model.keras").unlink()
        elif first:
            CHANGES[run["change"]](model)
        monitor = ks.StabilityMonitor(part, every=10**6, verbose=0)
        model.fit(
            batches[first:last],
            steps_per_epoch=last - first,  # Keras does not ask for the length.
            shuffle=False,
            callbacks=[monitor],
            verbose=0,
        )
    record.update(
        status="finished",
        verdict=str(monitor.verdict),
        worst_verdict=str(monitor.worst),
        seconds=round(time.time() - begin, 1),
    )
    part.rename(Path(out) / name)


# The parent, which imports neither Keras nor a backend.


def start(name, args, share):
    command = [sys.executable, __file__, "--one", name, "--out", args.out]
    command += ["--scale", args.scale, "--seeds", str(args.seeds)]
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"}
    log = Path(args.out) / f"{name}.log"
    return launch(command, log, args.backend, args.jobs, **memory)


def finish(name, process, begun, out):
    """Prints how a run ended; True if it did well."""
    seconds = f"{time.time() - begun:5.0f} s"
    if process.returncode:
        said = last_line(Path(out) / f"{name}.log")
        print(f"{seconds}  {name}: failed: {said}")
        return False
    record = json.loads((Path(out) / name / "run.json").read_text())
    print(f"{seconds}  {name}: {record['worst_verdict']}", flush=True)
    return True


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="runs/detection", help="folder of run directories")
    add("--jobs", type=int, default=1, help="processes at once (1)")
    add("--only", default="", help="regular expression for names")
    add("--seeds", type=int, default=1, help="of each run (1)")
    add(
        "--minutes",
        type=float,
        default=1e9,
        help="then no more are begun and those at work are stopped",
    )
    add("--backend", default=os.environ.get("KERAS_BACKEND", "jax"))
    add("--scale", choices=tuple(SEQUENCE), default="full")
    add("--list", action="store_true", help="print the names and end")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    runs = planned(args.seeds, args.scale)
    if args.one:
        return train(args.one, runs[args.one], args.out)
    names = [name for name in runs if re.search(args.only, name)]
    if args.list:
        return print(*names, sep="\n")
    if importlib.util.find_spec(args.backend) is None:
        sys.exit(f"detection_runs: {args.backend} is not installed.")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    waiting = [n for n in names if not (Path(args.out) / n).exists()]
    print(f"{len(names)} runs, {len(names) - len(waiting)} are there already")
    deadline = time.time() + 60 * args.minutes
    # What one process may take of the GPU's memory, if there is one.
    share = min(0.8 / args.jobs, 0.25)
    working, failed = {}, []
    while (waiting or working) and time.time() < deadline:
        while waiting and len(working) < args.jobs:
            name = waiting.pop(0)
            working[name] = start(name, args, share), time.time()
        time.sleep(0.2)
        for name, (process, begun) in list(working.items()):
            if process.poll() is not None:
                del working[name]
                if not finish(name, process, begun, args.out):
                    failed.append(name)
    for process, _ in working.values():
        process.terminate()
        process.wait()
    cut = len(waiting) + len(working)
    print(f"{len(failed)} failed, {cut} were not finished")
    return sys.exit(1) if failed else None


if __name__ == "__main__":
    main()
