r"""Broken trainings, with and without the monitor's rescue.

Question: how many runs that meet a fault end as if it had not been? Language
models of this package, a KerasHub GPT-2, an LSTM, a convolutional classifier
are trained clean, and then with a fault half-way: batches whose weights are
NaN or huge, wrong targets, bursts of them, a learning rate that is a hundred
times too high for ten steps, a NaN in a weight, float16 that overflows, a
warm-up that is left out. Each broken run is made with the policies "observe",
"guard" and "recover" and judged by the loss on held-out batches, beside its
clean twin's.

    python recipes/rescue_runs.py --jobs 2
    python recipes/rescue_runs.py --save recipes/results/rescue.json

Each run is a process of its own, and a file in `--out`; those that are there
are not run again. About 20 seconds a run on one CPU core; the whole suite an
hour on two.
"""

import argparse
import json
import logging
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path

from child_runs import last_line
from child_runs import launch
from detection_models import CHANGES
from detection_models import KINDS

POLICIES = ("observe", "guard", "recover")
STEPS, EVALUATION = 1000, 16
CLOSE = 0.05  # Nats: as good as the clean twin.
NOT_KEPT = ("command", "git_commit", "started")  # Of each run.
DEFAULTS = {
    "kind": "lm",
    "scale": "small",
    "variant": "baseline",
    "optimizer": "ours",
    "learning_rate": 3e-3,
    "warmup": 0.05,
    "precision": "float32",
    "loss_scale": None,
    "constant": False,
    "batch_size": 8,
    "layers": 2,
    "width": 64,
    "steps": STEPS,
    "seed": 0,
}
# What is wrong with batches: from `at` on, so many, and how.
FAULTS = {
    "none": {},
    "nan-batch": {"batches": 1, "weight": math.nan},
    "nan-burst": {"batches": 30, "weight": math.nan},
    "huge-batch": {"batches": 1, "weight": 1e6},
    "huge-burst": {"batches": 20, "weight": 1e4},
    "wrong-targets": {"batches": 3, "shuffled": True},
    "noise-burst": {"batches": 40, "shuffled": True},
    "rate-jump": {"steps": 10, "rate": 300.0},
    "nan-weight": {"change": "nan_weight"},
    "no-warmup": {"changes": {"warmup": 0.0}},
}
MODELS = {
    "lm": {},
    "gpt2": {"kind": "gpt2", "optimizer": "AdamW", "learning_rate": 1e-3},
    "lstm": {"kind": "lstm", "optimizer": "Adam"},
    "conv": {"kind": "conv", "optimizer": "Adam", "learning_rate": 1e-3},
}
# Those that have faults of their own.
OTHERS = {
    "lm-hot": (
        {"learning_rate": 0.03, "warmup": 0.1, "optimizer": "Adam"},
        ("no-warmup",),
        (0, 1, 2),
    ),
    "lm-half": (
        {"precision": "mixed_float16", "loss_scale": 2.0**10},
        ("nan-batch", "huge-batch", "huge-burst"),
        (0, 1),
    ),
    "lm-constant": ({"constant": True}, ("rate-jump",), (0, 1)),
    "gpt2-constant": (
        {**MODELS["gpt2"], "constant": True},
        ("rate-jump",),
        (0, 1),
    ),
    "conv-constant": (
        {**MODELS["conv"], "constant": True},
        ("rate-jump",),
        (0, 1),
    ),
    # To be left alone.
    "lm-norms": ({"variant": "qkv_norm", "learning_rate": 1e-2}, (), (0, 1)),
    "lstm-constant": ({**MODELS["lstm"], "constant": True}, (), (0, 1)),
}


def planned():
    """All runs but for the policy, by name: settings and the fault."""
    # The last two are of learning rates, for which others were chosen.
    common = [x for x in FAULTS if x not in ("rate-jump", "no-warmup")]
    models = {
        name: (changes, common, (0, 1) if name == "lm" else (0,))
        for name, changes in MODELS.items()
    }
    runs = {}
    for model, (changes, faults, seeds) in {**models, **OTHERS}.items():
        for seed in seeds:
            for fault in dict.fromkeys(("none", *faults)):
                run = {**DEFAULTS, **changes, "seed": seed, "fault": fault}
                run |= FAULTS[fault].get("changes", {})
                run["at"] = STEPS // 2 + 37 * seed
                runs[f"{model}-{seed}-{fault}"] = run
    return runs


def broken(run, batch):
    """Batches with weights, by their number; some of them bad."""
    import numpy as np

    fault = FAULTS[run["fault"]]
    bad = range(run["at"], run["at"] + fault.get("batches", 0))

    def weighted(place):
        x, y = batch(place)
        weights = np.ones(y.shape, "float32")
        if place in bad:
            weights = weights * np.float32(fault.get("weight", 1.0))
            if fault.get("shuffled"):
                rng = np.random.default_rng([run["seed"], place])
                y = rng.permutation(y.reshape(-1)).reshape(y.shape)
        return x, y, weights

    return weighted


def intrude(run, model, keras):
    """A callback that breaks the model or its learning rate, once."""
    fault, step = FAULTS[run["fault"]], [0]

    def change(batch, logs=None):
        now, step[0] = step[0] - run["at"], step[0] + 1
        if now == 0 and "change" in fault:
            synchronize(model)
            CHANGES[fault["change"]](model)
        if "rate" in fault and now in (0, fault["steps"]):
            synchronize(model)
            # Whoever made the mistake sets it right again.
            factor = fault["rate"] if now == 0 else 1.0
            model.optimizer.learning_rate = run["learning_rate"] * factor

    return keras.callbacks.LambdaCallback(on_train_batch_begin=change)


def synchronize(model):
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def train(name, policy, out):
    """One run, from its data to its record."""
    import grain
    import keras

    import keras_stable as ks

    logging.getLogger("absl").setLevel(logging.ERROR)
    run = planned()[name]
    keras.utils.set_random_seed(run["seed"])
    keras.config.set_dtype_policy(run["precision"])
    data, build = KINDS[run["kind"]]
    batch, _ = data(run, ks)
    batches = grain.MapDataset.range(4 * STEPS).map(broken(run, batch))
    rate = run["learning_rate"]
    if not run["constant"]:
        warmup = int(run["warmup"] * STEPS)
        rate = ks.WarmupSchedule(rate, STEPS, warmup_steps=warmup)
    optimizer = ks.AdamW
    if run["optimizer"] != "ours":
        optimizer = getattr(keras.optimizers, run["optimizer"])
    model = build(run, keras, ks)
    model.compile(
        optimizer(rate, loss_scale_factor=run["loss_scale"]),
        loss=keras.losses.SparseCategoricalCrossentropy(True),
        auto_scale_loss=run["loss_scale"] is None,
    )
    monitor = ks.StabilityMonitor(
        policy=policy,
        every=10**6,
        data=batches if policy == "recover" else None,
        verbose=0,
    )
    begun, halted, made = time.time(), None, 0
    callbacks = [monitor, intrude(run, model, keras)]
    try:
        while (left := STEPS + monitor.undone - made) > 0:
            place = monitor.position
            model.fit(
                batches[place : place + left],
                steps_per_epoch=left,
                shuffle=False,
                callbacks=callbacks,
                verbose=0,
            )
            made += left
    except ks.TrainingHalted as error:
        halted = str(error)
    held_out = [batch(5 * STEPS + i) for i in range(EVALUATION)]
    losses = [
        model.evaluate(*held, verbose=0, return_dict=True)["loss"]
        for held in held_out
    ]
    record = {
        "name": name,
        "policy": policy,
        "run": run,
        "loss": in_json(statistics.fmean(losses)),
        "halted": halted,
        "verdict": str(monitor.verdict),
        "worst": str(monitor.worst),
        "events": [
            (event.step, event.detector, event.detail)
            for event in monitor.events
            if event.detector in ("guard", "back_off", "rewind", "verdict")
        ],
        "seconds": round(time.time() - begun, 1),
        **ks.environment(),
    }
    file = Path(out) / f"{name}.{policy}.json"
    file.with_suffix(".part").write_text(json.dumps(record))
    file.with_suffix(".part").rename(file)


def in_json(number):
    return number if math.isfinite(number) else str(number)


# What became of them.


def summarize(records):
    """Numbers of each policy, and of each fault."""
    losses = {(r["name"], r["policy"]): finite(r["loss"]) for r in records}
    faults = {r["name"]: r["run"]["fault"] for r in records}
    rows = []
    for name, fault in sorted(faults.items()):
        twin = name.removesuffix(fault) + "none"
        clean = losses.get((twin, "observe"))
        if fault == "none" or clean is None:
            continue
        row = {"name": name, "fault": fault, "clean": clean}
        row |= {p: losses.get((name, p)) for p in POLICIES}
        rows.append(row)
    return rows


def finite(loss):
    """A loss, be it a number or "nan"; infinite if it is not finite."""
    return float(loss) if math.isfinite(float(loss)) else math.inf


def saved(row, policy):
    return row[policy] is not None and row[policy] <= row["clean"] + CLOSE


def table(rows):
    """Markdown: of each fault, how many ended as their clean twins."""
    lines = [("fault", "runs", *POLICIES, "worse with recover")]
    lines.append(("---",) * len(lines[0]))
    kinds = [*dict.fromkeys(row["fault"] for row in rows), "all"]
    for kind in kinds:
        mine = [r for r in rows if kind in (r["fault"], "all")]
        counts = [sum(saved(r, p) for r in mine) for p in POLICIES]
        worse = sum(
            r["recover"] is not None
            and r["observe"] is not None
            and r["recover"] > r["observe"] + CLOSE
            for r in mine
        )
        lines.append((kind, len(mine), *counts, worse))
    return "\n".join(f"| {' | '.join(map(str, x))} |" for x in lines)


def same(records):
    """How many clean runs with a policy end with the loss of those without."""
    losses = {(r["name"], r["policy"]): r["loss"] for r in records}
    return sum(
        loss == losses.get((name, "observe"))
        for (name, policy), loss in losses.items()
        if name.endswith("-none") and policy != "observe"
    )


def interventions(records):
    """Of clean runs: how many there are, and how many were touched."""
    clean = [
        r for r in records if r["run"]["fault"] == "none"
        and r["policy"] != "observe"
    ]
    touched = [
        r["name"] for r in clean
        if any(e[1] in ("guard", "back_off", "rewind") for e in r["events"])
    ]
    return len(clean), touched


# The parent, which imports neither Keras nor a backend.


def start(name, policy, args):
    command = [sys.executable, __file__, "--out", args.out]
    command += ["--one", name, policy]
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    log = Path(args.out) / f"{name}.{policy}.log"
    return launch(command, log, args.backend, args.jobs, **memory)


def finish(name, policy, process, out):
    stem = f"{name}.{policy}"
    if process.returncode:
        said = last_line(Path(out) / f"{stem}.log")
        print(f"{stem}: failed: {said}", flush=True)
        return
    record = json.loads((Path(out) / f"{stem}.json").read_text())
    print(
        f"{record['seconds']:6.1f} s  {stem}: {float(record['loss']):.4f} "
        f"{record['worst']}{' halted' if record['halted'] else ''}",
        flush=True,
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="runs/rescue", help="folder of records")
    add("--jobs", type=int, default=1, help="processes at once (1)")
    add("--only", default="", help="regular expression for NAME.POLICY")
    add("--minutes", type=float, default=1e9, help="then no more are begun")
    add("--backend", default=os.environ.get("KERAS_BACKEND", "jax"))
    add("--save", help="result file, of all that is in --out")
    add("--list", action="store_true", help="print the names and end")
    add("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        return train(*args.one, args.out)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    wanted = [
        (name, policy)
        for name in planned()
        for policy in POLICIES
        if re.search(args.only, f"{name}.{policy}")
    ]
    if args.list:
        print("\n".join(f"{name}.{policy}" for name, policy in wanted))
        return
    todo = [
        run
        for run in wanted
        if not Path(args.out, f"{'.'.join(run)}.json").exists()
    ]
    end, active = time.time() + 60 * args.minutes, {}
    while active or (todo and time.time() < end):
        while todo and len(active) < args.jobs and time.time() < end:
            run = todo.pop(0)
            active[run] = start(*run, args)
        for run, process in list(active.items()):
            if process.poll() is not None:
                finish(*run, active.pop(run), args.out)
        time.sleep(0.2)
    files = sorted(Path(args.out).glob("*.json"))
    records = [json.loads(file.read_text()) for file in files]
    rows = summarize(records)
    print(table(rows))
    count, touched = interventions(records)
    print(f"clean runs with a policy: {count}; touched: {touched}")
    if args.save:
        made = {k: records[0][k] for k in ("versions", "device", "backend")}
        result = {
            "schema": 1,
            "command": "python recipes/rescue_runs.py",
            "git_commit": records[0]["git_commit"],
            **made,
            "clean": {"runs": count, "touched": touched, "same": same(records)},
            "runs": [
                {k: v for k, v in r.items() if k not in (*made, *NOT_KEPT)}
                for r in records
            ],
        }
        Path(args.save).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
