r"""What a step of a run costs alone, and in one program with others.

Question: does it pay to train small runs of one method together, on this
device? For a GPU, where it should, and a CPU, where a loop over the runs only
saves compiling and the host's part of a step.

    python recipes/together.py --out results/together_h100.json
    PJRT_NPROC=1 python recipes/together.py --runs 4,8 --out one_thread.json

Each row is one program in this process: seconds until its first two steps are
made (models built, programs compiled), and then the time between steps,
divided by the number of runs. `cpu_ms` is the processor time of all threads:
on a machine that others use, with one thread, it is the number to trust.
Monitors are at work and measure the scalars of every step, and no tables.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

import keras_stable as ks


def make(args, tokens, seed):
    """Model, batches and monitor of a run."""
    keras.utils.set_random_seed(seed)
    lm = ks.StableCausalLM.from_size(
        "1m",
        256,
        args.variant,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        hidden_dim=args.hidden_dim,
        intermediate_dim=4 * args.hidden_dim,
        seed=seed,
    )
    rate = 1e-3 * (1 + seed % 5)
    lm.compile(ks.AdamW(ks.WarmupSchedule(rate, args.steps)))
    shape = (args.batch_size, args.sequence_length)
    data = ks.TokenBatches(tokens, *shape, seed=seed).repeat()[: args.steps]
    monitor = ks.StabilityMonitor(every=10 * args.steps, verbose=0)
    return lm, data, monitor


def now():
    return time.perf_counter(), time.process_time()


def row(args, tokens, runs, how):
    """The times of one program."""
    stamps, begin = [], now()
    made = [make(args, tokens, seed) for seed in range(runs)]
    if how == "alone":
        ((lm, data, monitor),) = made
        stamp = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: stamps.append(now())
        )
        lm.fit(data, callbacks=[monitor, stamp], verbose=0)
    else:

        def stamp(batch):
            stamps.append(now())
            return batch

        models, data, monitors = zip(*made)
        # The first run's batches are asked for once a step.
        data = [data[0].map(stamp), *data[1:]]
        ks.train_many(models, data, monitors, vectorised=how == "batched")
    # Batches are looked at before the first step as well.
    stamps = stamps[-args.steps :]
    # Two steps are compiled, the full one and the light one.
    steps = [
        [1e3 * (b - a) / runs for a, b in zip(*pair)]
        for pair in zip(stamps[5:-1], stamps[6:])
    ]
    wall, cpu = zip(*steps)
    found = {
        "how": how,
        "runs": runs,
        "start_seconds": stamps[3][0] - begin[0],
        "start_cpu_seconds": stamps[3][1] - begin[1],
        "ms": statistics.median(wall),
        "least_ms": min(wall),
        "cpu_ms": statistics.median(cpu),
    }
    return {
        name: round(value, 2) if isinstance(value, float) else value
        for name, value in found.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--variant", default="qk_norm", help="stability method (qk_norm)")
    add("--num-layers", type=int, default=3, help="(3)")
    add("--num-heads", type=int, default=4, help="(4)")
    add("--hidden-dim", type=int, default=128, help="(128)")
    add("--batch-size", type=int, default=16, help="(16)")
    add("--sequence-length", type=int, default=64, help="(64)")
    add("--precision", default="float32", help="(float32)")
    add("--runs", default="4,8,15", help="in one program (4,8,15)")
    add("--ways", default="loop,batched", help="(loop,batched)")
    add("--steps", type=int, default=40, help="of each (40)")
    add("--out", required=True, help="JSON file")
    args = parser.parse_args()
    keras.config.set_dtype_policy(args.precision)
    tokens = ks.tokenize_corpus("python", ks.ByteTokenizer()).training
    cases = [(1, "alone")]
    counts = [int(count) for count in args.runs.split(",")]
    cases += itertools.product(counts, args.ways.split(","))
    rows = []
    for runs, how in cases:
        rows.append(row(args, tokens, runs, how))
        print(json.dumps(rows[-1]), flush=True)
    threads = os.environ.get("PJRT_NPROC")
    found = {"config": vars(args), "threads": threads, **ks.environment()}
    text = json.dumps({**found, "rows": rows}, indent=1)
    Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
