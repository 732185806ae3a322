r"""Pretrains one method at several learning rates and seeds in one program.

Question: does it pay to train small runs together? On a GPU, which a small
model leaves idle, and wherever compiling takes longer than training.
Takes the flags of `pretrain.py`, and once for each run its learning rate,
seed and run directory; writes what `pretrain.py --save none` writes there.

    python recipes/sweep.py --experiment paper-lr --together 6 --out runs/b
    python recipes/pretrain_many.py --variant qk_norm --steps 400 \
        --run 3e-3 0 runs/a --run 3e-3 1 runs/b --run 3e-2 0 runs/c

Nothing is saved before the end. What was stopped or killed is begun again
from the first step by the same command with `--resume`; runs that have a
result are left out. jax alone.
"""

import argparse
import signal
import sys
import time

import pretrain
from pretrain_flags import choose_backend
from pretrain_flags import parse

STOPPED = 75  # As `pretrain.py`: try again.


def split(arguments):
    """The runs, `(learning rate, seed, directory)`, and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run", nargs=3, action="append", default=[])
    known, others = parser.parse_known_args(arguments)
    if not known.run and not {"-h", "--help"} & {*others}:
        sys.exit("pretrain_many: give --run RATE SEED DIRECTORY for each run.")
    return known.run, others


def of_one(run, others):
    """The flags of `pretrain.py` for one run."""
    rate, seed, out = run
    own = ["--learning-rate", rate, "--seed", seed, "--out", out]
    return ["--save", "none", *others, *own]


def prepare(runs, others, ks, keras):
    """`(args, what `pretrain.prepare` returns)` of each without a result."""
    found = []
    for run in runs:
        args, before = parse(of_one(run, others), __doc__, ks)
        if args.save != "none":
            raise ValueError(
                "Samples and files of models are for single runs: leave out "
                f"--save {args.save}, or use pretrain.py."
            )
        status = (before or {}).get("status")
        if status in ("finished", "diverged"):
            print(f"The run in {args.out} has {status}.")
            continue
        found.append((args, pretrain.prepare(args, before, ks, keras)))
    return found


def main(arguments=None):
    begin = time.perf_counter()
    arguments = sys.argv[1:] if arguments is None else arguments
    runs, others = split(arguments)
    choose_backend(of_one(runs[0], others) if runs else others)
    import keras

    import keras_stable as ks

    if keras.backend.backend() != "jax":
        sys.exit(
            "pretrain_many: several runs in one program are for jax. On "
            f"{keras.backend.backend()}, give each to pretrain.py."
        )
    if not runs:
        parse(others, __doc__, ks)  # Prints the help.
    try:
        found = prepare(runs, others, ks, keras)
        if not found:
            return
        models, data, evaluations, records, callbacks = zip(
            *(prepared for _, prepared in found)
        )
        data = [
            batches.repeat()[: args.steps - (checkpoints.step or 0)]
            for batches, (args, _), (_, checkpoints) in zip(
                data, found, callbacks
            )
        ]
        monitors = [monitor for monitor, _ in callbacks]
        for monitor in monitors:
            monitor.verbose = 0  # Whose step it was would not be told.
        print(
            f"{len(models)} runs of {found[0][0].label}, "
            f"{models[0].count_params():,} parameters each, on "
            f"{records[0].record['device']}, ready in "
            f"{time.perf_counter() - begin:.1f} s",
            flush=True,
        )
        begin = time.perf_counter()
        # One that was killed in its evaluation has no steps left.
        left = [i for i, batches in enumerate(data) if len(batches)]
        if left:
            ks.train_many(
                *([x[i] for i in left] for x in (models, data, monitors))
            )
    except (ValueError, OSError, ImportError, ks.CheckpointError) as error:
        sys.exit(f"pretrain_many: {error}")
    steps = sum(monitor.step for monitor in monitors)
    seconds = time.perf_counter() - begin
    losses = [ks.losses_of_many(models, data) for data in evaluations[0]]
    for i, (record, monitor) in enumerate(zip(records, monitors)):
        own = [(float(x[i].mean()), x[i].tolist()) for x in losses]
        loss = pretrain.conclude(record, monitor, own)
        print(
            f"{record.path}: {monitor.verdict}, {monitor.step} steps, "
            f"validation loss {loss:.4f}"
        )
    print(
        f"{steps} steps in {seconds:.1f} s, {1e3 * seconds / steps:.2f} ms "
        f"each; evaluated in {time.perf_counter() - begin - seconds:.1f} s"
    )


def stop(number, frame):
    sys.exit(STOPPED)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    main()
