r"""Where the time of a training step goes, kernel by kernel.

Question: what is a GPU busy with in a step of a benchmark's row, and how long
is it idle? Rows and shapes are those of benchmark.py.

    python recipes/profile_step.py --setting h200 \
        --rows "ours/jax/baseline,hand/jax/baseline"

Prints a table for each row and writes a JSON file. About a minute a row on an
H100. On a CPU there are no kernels to see: it says so.
"""

import collections
import glob
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import benchmark

STEPS = 3
# Kinds of kernels by parts of their names; the first that fits.
KINDS = {
    "attention": ("sdpa", "flash", "fmha", "attention", "dot_do_o", "dq_to_16"),
    "matrix products": ("gemm", "nvjet", "cutlass", "matmul", "xmma"),
    "optimizer": ("adam", "multi_tensor"),
    "copies": ("memcpy", "memset"),
}


def trace_jax(folder):
    """Begins to record; returns what ends it and lists the kernels."""
    import jax

    jax.profiler.start_trace(folder)

    def end():
        jax.profiler.stop_trace()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
        return [
            (event.name, event.start_ns, event.duration_ns)
            for plane in data.planes
            if "GPU" in plane.name
            for line in plane.lines
            if "Stream" in line.name
            for event in line.events
        ]

    return end


def trace_torch(folder):
    """Begins to record; returns what ends it and lists the kernels."""
    import torch

    activities = [
        torch.profiler.ProfilerActivity.CPU,
        torch.profiler.ProfilerActivity.CUDA,
    ]
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()

    def end():
        torch.cuda.synchronize()
        profiler.stop()
        return [
            (e.name, 1e3 * e.time_range.start, 1e3 * e.time_range.elapsed_us())
            for e in profiler.events()
            if e.device_type == torch.autograd.DeviceType.CUDA
        ]

    return end


def watch(begin, folder, found):
    """A stopwatch of benchmark.py that records the last steps instead."""

    def stopwatch(config):
        first = config["warmup"] + 1
        marks = (1, first, first + STEPS)
        end = None

        def tick(step, loss=None):
            nonlocal end
            if step in marks and loss is not None:
                float(loss)
            if step == first:
                end = begin(folder)
            elif step == first + STEPS:
                found.extend(end())

        report = {"milliseconds": 1.0, "first_step_seconds": 0.0}
        return marks, tick, lambda: report

    return stopwatch


def union(spans):
    """How long at least one kernel runs; kernels of streams overlap."""
    total, until = 0.0, 0.0
    for begin, length in sorted(spans):
        total += max(begin + length - max(begin, until), 0.0)
        until = max(until, begin + length)
    return total


def kind_of(name):
    for kind, parts in KINDS.items():
        if any(part in name.lower() for part in parts):
            return kind
    return "elementwise and reductions"


def summarize(kernels):
    """Milliseconds a step, of each kind and of the largest kernels."""
    if not kernels:
        return {"error": "no kernels were recorded: is there a GPU?"}
    spans = [(begin, length) for _, begin, length in kernels]
    busy = union(spans) / STEPS / 1e6
    whole = max(b + n for b, n in spans) - min(b for b, _ in spans)
    times, counts = collections.Counter(), collections.Counter()
    kinds = collections.Counter()
    for name, _, length in kernels:
        times[name] += length / STEPS / 1e6
        counts[name] += 1
        kinds[kind_of(name)] += length / STEPS / 1e6
    return {
        "milliseconds": whole / STEPS / 1e6,
        "busy": busy,
        "idle": whole / STEPS / 1e6 - busy,
        "kinds": dict(kinds.most_common()),
        "kernels": [
            {
                "name": name[:120],
                "milliseconds": ms,
                "calls": counts[name] / STEPS,
            }
            for name, ms in times.most_common(25)
        ],
    }


def child(row, config, out):
    found = []
    begin = trace_jax if row.split("/")[1] == "jax" else trace_torch
    with tempfile.TemporaryDirectory() as folder:
        environment = benchmark.measure(
            row, json.loads(config), watch(begin, folder, found)
        )["environment"]
    where = {k: environment[k] for k in ("device", "versions", "git_commit")}
    result = {**where, **summarize(found)}
    Path(out).write_text(json.dumps(result))


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--child"]:
        return child(*arguments[1:])
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras_stable as ks

    args, rows, configs = benchmark.parse(arguments, ks)
    results, config = [], configs[0]
    for row in rows:
        result = benchmark.run(row, config, args.timeout, script=__file__)
        result = {"row": row, **result}
        results.append(result)
        if "error" in result:
            print(f"{row}: {result['error']}")
            continue
        print(f"\n{row}: {result['milliseconds']:.1f} ms a step while recorded")
        for name in ("busy", "idle"):
            print(f"{result[name]:9.2f} ms  {name}")
        for name, ms in result["kinds"].items():
            print(f"{ms:9.2f} ms    {name}")
        for k in result["kernels"]:
            print(f"{k['milliseconds']:9.2f} ms{k['calls']:7.0f} x {k['name']}")
    out = Path(args.out or "runs/profile.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "recipes/profile_step.py", *arguments])
    record = {"schema": 1, "command": command, "rows": results}
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{out}")


if __name__ == "__main__":
    main()
