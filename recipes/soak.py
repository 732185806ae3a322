r"""A soak: does a long run with full telemetry grow, leak or slow down?

Question: does training with the monitor's full table in every step, and its
records, take more memory, more open files or more time a step the longer it
goes on? A small model trains on real text; every few seconds the process is
looked at from outside of Python. After a warm-up the slope of each series is
estimated, with an interval that holds zero if nothing grows.

    python recipes/soak.py --minutes 30 --out recipes/results/soak-jax.json

Half an hour and one core; Linux, for it reads /proc. The figure is written
beside the results. Expected: zero in each interval.

How a slope is estimated. Neighbouring samples are alike (a neighbour on the
machine slows a whole minute; an allocator keeps what it took), so that
ordinary regression would be far too sure. Batch means, made robust: the series
is cut into 12 blocks in time, each is replaced by its midmean (the mean of the
half in its middle), a line is fitted to the 12, and its interval is Student's
with 10 degrees of freedom. Disturbances of less than a quarter of a block do
not move a midmean, and unlike a median it is no coarser than the average of
memory's few levels. Correlation within a block costs nothing; that between
neighbouring blocks is small if a block is long against the time in which the
series forgets. Block bootstrap and Newey-West would need that time, and are
too sure where it is a good part of the series.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

# 97.5 % point of Student's t with BLOCKS - 2 degrees of freedom.
BLOCKS, STUDENT = 12, 2.228
# What is sampled, and its unit. Three are judged; the others explain them.
SERIES = {
    "resident": "MiB",
    "files": "open files",
    "step": "ms",
    "cpu": "ms of processor time a step",
    "threads": "threads",
    "blocks": "thousand blocks of Python's allocator",
}
JUDGED = ("resident", "files", "step")


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30, help="of training (30)")
    add("--interval", type=float, default=4, help="seconds a sample (4)")
    add("--warmup", type=float, default=0.2, help="share left out (0.2)")
    add("--size", default="1m", help="named size (1m)")
    add("--variant", default="qk_norm", help="(qk_norm)")
    add("--batch-size", type=int, default=2, help="sequences (2)")
    add("--sequence-length", type=int, default=64, help="(64)")
    add("--epoch", type=int, default=2000, help="steps in an epoch (2000)")
    add("--backend", default=os.environ.get("KERAS_BACKEND", "jax"))
    add("--again", help="an earlier result file, whose series are judged anew")
    add("--out", help="result file; the figure is beside it")
    return parser.parse_args(arguments)


def midmean(values):
    """The mean of those between the quartiles."""
    values = sorted(values)
    cut = len(values) // 4
    return statistics.fmean(values[cut : len(values) - cut])


def slope(times, values):
    """Slope per unit of `times`, and the ends of its 95 % interval."""
    import numpy as np

    blocks = np.array_split(np.arange(len(times)), BLOCKS)
    x = np.array([np.mean(times[block]) for block in blocks])
    y = np.array([midmean(values[block]) for block in blocks])
    x, y = x - x.mean(), y - y.mean()
    found = x @ y / (x @ x)
    rest = y - found * x
    half = STUDENT * np.sqrt(rest @ rest / (BLOCKS - 2) / (x @ x))
    return float(found), float(found - half), float(found + half)


def look():
    """Resident MiB, open files, threads and Python's blocks, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        # The listing itself has one open.
        len(os.listdir("/proc/self/fd")) - 1,
        len(os.listdir("/proc/self/task")),
        sys.getallocatedblocks() / 1e3,
    )


def sampler(keras, np, minutes, interval):
    """A callback, and the rows that it fills until time is over."""
    # Made before, so that looking is not what grows.
    rows = np.zeros((int(60 * minutes / interval) + 2, 1 + len(SERIES)))
    state = {"row": 0, "begin": None, "last": 0.0, "cpu": 0.0, "steps": []}

    def step(batch, logs):
        now = time.perf_counter()
        if state["begin"] is None:
            # The first step compiled.
            state.update(begin=now, due=now + interval, last=now)
            state["cpu"] = time.process_time()
            return
        state["steps"].append(now - state["last"])
        state["last"] = now
        if now < state["due"]:
            return
        cpu = time.process_time()
        resident, files, threads, blocks = look()
        rows[state["row"]] = (
            now - state["begin"],
            resident,
            files,
            1e3 * statistics.median(state["steps"]),
            1e3 * (cpu - state["cpu"]) / len(state["steps"]),
            threads,
            blocks,
        )
        state["steps"].clear()
        state.update(row=state["row"] + 1, due=now + interval, cpu=cpu)
        over = now - state["begin"] >= 60 * minutes
        if over or state["row"] == len(rows):
            callback.model.stop_training = True
        # Looking is no part of a step.
        state["last"] = time.perf_counter()

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=step)
    return callback, rows, state


def soak(args):
    import keras
    import numpy as np

    import keras_stable as ks

    environment = ks.environment()
    keras.utils.set_random_seed(0)
    tokenizer = ks.ByteTokenizer()
    training, _ = ks.split(ks.load_corpus("python"))
    shape = (args.batch_size, args.sequence_length)
    data = ks.TokenBatches(ks.pack(training, tokenizer), *shape).repeat()
    lm = ks.StableCausalLM.from_size(args.size, 256, args.variant)
    lm.compile(ks.AdamW(3e-4))
    folder = tempfile.mkdtemp()
    monitor = ks.StabilityMonitor(folder, every=1, verbose=0)
    clock, rows, state = sampler(keras, np, args.minutes, args.interval)
    try:
        lm.fit(
            data,
            steps_per_epoch=args.epoch,
            epochs=10**9,
            verbose=0,
            callbacks=[monitor, clock],
        )
        written = sum(f.stat().st_size for f in Path(folder).rglob("*.*"))
    finally:
        shutil.rmtree(folder)
    rows = rows[: state["row"]]
    series = dict(zip(("seconds", *SERIES), rows.T))
    counts = {
        "steps": monitor.step,
        "parameters": lm.count_params(),
        "events": len(monitor.events),
        "verdict": str(monitor.worst),
        "megabytes_written": written / 1e6,
    }
    return {**environment, "config": vars(args), **counts}, series


def judge(series, warmup):
    """Slopes per hour after the warm-up, by series."""
    seconds = series["seconds"]
    kept = seconds >= warmup * seconds[-1]
    slopes = {}
    for name in SERIES:
        values = series[name][kept]
        found, low, high = slope(seconds[kept] / 3600, values)
        middle = statistics.median(values.tolist())
        slopes[name] = {
            "unit": SERIES[name],
            "median": middle,
            "slope_per_hour": found,
            "low": low,
            "high": high,
            "holds_zero": low <= 0 <= high,
        }
    return slopes


def draw(series, slopes, warmup, file):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    minutes = series["seconds"] / 60
    begin = warmup * minutes[-1]
    figure, axes = pyplot.subplots(
        3, 2, figsize=(10, 8), sharex=True, layout="constrained"
    )
    for axis, (name, found) in zip(axes.flat, slopes.items()):
        axis.plot(minutes, series[name], ".", color="0.6", markersize=2)
        axis.axvspan(0, begin, color="0.93")
        kept = minutes[minutes >= begin]
        rise = (kept - kept.mean()) / 60
        lines = {"slope_per_hour": "-", "low": ":", "high": ":"}
        for part, style in lines.items():
            axis.plot(kept, found["median"] + found[part] * rise, style + "C0")
        axis.set_ylabel(found["unit"])
        axis.set_title(
            f"{name}: {found['slope_per_hour']:+.3g} "
            f"[{found['low']:+.3g}, {found['high']:+.3g}] an hour",
            fontsize=10,
        )
        # Outliers are in the results; the slope is what is looked for.
        values = sorted(series[name])
        low, high = (values[int(q * (len(values) - 1))] for q in (0.01, 0.98))
        room = 0.3 * (high - low) + 0.002 * abs(high) + 1e-3
        axis.set_ylim(low - room, high + room)
    for axis in axes[-1]:
        axis.set_xlabel("minutes")
    figure.savefig(file, dpi=110)


def main(arguments=None):
    args = parse(arguments)
    os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # One thread: what else the machine does should not move the steps.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    )
    if args.again:
        import numpy as np

        run = json.loads(Path(args.again).read_text())
        series = {k: np.array(v) for k, v in run.pop("series").items()}
    else:
        run, series = soak(args)
    slopes = judge(series, args.warmup)
    print(
        f"{run['steps']} steps, {run['megabytes_written']:.0f} MB of "
        f"records, {run['events']} events, worst {run['verdict']}"
    )
    print(f"{'':10}{'median':>10}{'an hour':>10}   95 % interval")
    for name, s in slopes.items():
        mark = "" if s["holds_zero"] else "   does not hold zero"
        print(
            f"{name:10}{s['median']:10.4g}{s['slope_per_hour']:+10.3g}   "
            f"[{s['low']:+.3g}, {s['high']:+.3g}] {s['unit']}{mark}"
        )
    if args.out:
        out = Path(args.out)
        draw(series, slopes, args.warmup, out.with_suffix(".png"))
        rounded = {
            name: [float(f"{v:.6g}") for v in values.tolist()]
            for name, values in series.items()
        }
        content = {"schema": 1, **run, "slopes": slopes, "series": rounded}
        out.write_text(json.dumps(content) + "\n")
    return all(slopes[name]["holds_zero"] for name in JUDGED)


if __name__ == "__main__":
    sys.exit(not main())
