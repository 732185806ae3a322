"""How fast is one layer of attention that is capped, clipped, measured?

Question: what do a cap, a clip and exact statistics cost in our kernels, beside
the kernels without them that a user has, and beside the formula written out?
Does their time grow with the length as that of those kernels does? Forward and
backward, one after the other many times, the median of blocks.

    python recipes/benchmark_attention.py
    python recipes/benchmark_attention.py --lengths 2048,4096,8192,16384
    python recipes/benchmark_attention.py --head-dims 64,96,128,256

All shapes have the same number of tokens and, in all heads together, the same
width. The first length and head size have all rows; the other lengths, of the
first head size, and the other head sizes, of the first length, those of `SOME`.

Needs a GPU. Every backend has a process of its own; those that are not
installed are left out, rows that fail are recorded. `growth` is the time of a
token relative to the same row's at the first length. `error` is the largest
deviation of outputs from those of the formula in float32, of short sequences of
the same numbers in bfloat16, relative to the largest output; that of gradients
likewise. Writes a JSON file, a figure beside it, and prints a table.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CAP, CLIP = 50.0, (-0.03, 1.03)
SHORT = 333  # For the errors: no multiple of any block.
BACKENDS = ("jax", "torch")
# The formula takes too long, and too much memory, where sequences are long;
# flex_attention takes minutes to compile for other shapes than its first.
SOME = "cuDNN", "SDPA", "ours, cap, statistics"


def numbers_in(text):
    return [int(part) for part in text.split(",")]


def shapes_of(args):
    """Dictionaries of what is timed one after the other."""
    lengths, sizes = numbers_in(args.lengths), numbers_in(args.head_dims)
    pairs = [(length, sizes[0]) for length in lengths]
    pairs += [(lengths[0], size) for size in sizes[1:]]
    return [
        {
            "batch": max(args.tokens // length, 1),
            "length": length,
            "heads": max(args.width // size, 1),
            "head_dim": size,
        }
        for length, size in pairs
    ]


def arrays_of(shapes, batch, length):
    rng = np.random.default_rng(0)
    shape = batch, length, shapes["heads"], shapes["head_dim"]
    # Logits of up to about 25, for a cap to bend.
    q, k, v, dy = (rng.standard_normal(shape, "float32") for _ in range(4))
    return 2 * q, 2 * k, v, dy


def numbers(x):
    x = x.detach().float().cpu() if hasattr(x, "detach") else x
    return np.asarray(x, "float32")


def deviation(found, true):
    pairs = [(numbers(x), numbers(y)) for x, y in zip(found, true)]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def errors(name, run, how, made, shapes):
    """Those of a row's outputs and gradients."""
    _, step, make, _, formula, _ = made
    short = arrays_of(shapes, 1, SHORT)
    exact = {key: how[key] for key in ("cap", "clip") if key in how}
    if "flex" in name:
        exact = {"cap": CAP}
    # The same numbers, which bfloat16 has rounded.
    rounded = [numbers(x) for x in make(short, "bfloat16")]
    true = step(functools.partial(formula, **exact))(make(rounded, "float32"))
    found = run(make(short, "bfloat16"))
    return {
        "error": deviation([found[0]], [true[0]]),
        "gradient_error": deviation(found[1], true[1]),
    }


def measure(name, function, how, made, shapes, calls, compared):
    _, step, make, wait, *_ = made
    run = step(functools.partial(function, **how) if how else function)
    found = {}
    # cuDNN has no odd lengths.
    if compared and "cuDNN" not in name:
        found = errors(name, run, how, made, shapes)
    tensors = make(
        arrays_of(shapes, shapes["batch"], shapes["length"]), "bfloat16"
    )
    for _ in range(3):
        wait(run(tensors))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(calls):
            last = run(tensors)
        wait(last)
        times.append(1e3 * (time.perf_counter() - begun) / calls)
    return {**found, "milliseconds": statistics.median(times), "times": times}


def child(backend, shapes, calls, out):
    os.environ["KERAS_BACKEND"] = backend
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import keras

    import keras_stable as ks

    peer = importlib.import_module(f"peer_attention_{backend}")
    found, compared = [], set()
    for i, shape in enumerate(json.loads(shapes)):
        H = shape["head_dim"]
        query = keras.KerasTensor(tuple(shape.values()), "bfloat16")
        kernel = ks.backend.attention_kernel(query, CAP, None)
        if kernel is None:
            sys.exit(f"{backend}: no kernel for {shape}, or no GPU")
        made = peer.rows(H**-0.5, CAP, CLIP, kernel[1])
        for name, (function, how) in made[0].items():
            if i and name not in SOME:
                continue
            given = name, function, how, made, shape, int(calls)
            try:
                entry = measure(*given, compared=H not in compared)
            except Exception as error:
                entry = {"error_message": f"{error}"[:300]}
            time_taken = entry.get("milliseconds")
            print(f"{backend:6} {name:24} {shape} {time_taken}", flush=True)
            found.append({"backend": backend, "row": name, **shape, **entry})
            record = {"rows": found, "device": made[-1]}
            record |= ks.records.software()
            Path(out).write_text(json.dumps(record))
        compared.add(H)


def per_token(row):
    return row["milliseconds"] / (row["batch"] * row["length"])


def growth(row, rows):
    """Time of a token, relative to that at the first length; or None."""
    keys = ("backend", "row", "head_dim")
    same = [x for x in rows if all(x[key] == row[key] for key in keys)]
    times = [per_token(x) for x in (row, same[0]) if "milliseconds" in x]
    if len(times) < 2 or same[0]["length"] == row["length"]:
        return None
    return times[0] / times[1]


def table(result):
    """Markdown; times also relative to the first row of backend and shape."""
    heads = "backend|kernel|length|head|ms|to the first|growth|error|"
    lines = [(heads + "of gradients").split("|")]
    lines.append(["---"] * len(lines[0]))
    rows, first = result["rows"], {}
    for row in rows:
        shape = row["backend"], row["length"], row["head_dim"]
        one = first.setdefault(shape, row)
        cells = [row["backend"], row["row"], *map(str, shape[1:])]
        if "milliseconds" in row:
            ratios = [None, growth(row, rows)]
            if "milliseconds" in one:
                ratios[0] = row["milliseconds"] / one["milliseconds"]
            cells += [f"{row['milliseconds']:.2f}"]
            cells += ["" if x is None else f"{x:.2f}" for x in ratios]
            found = (row.get(k) for k in ("error", "gradient_error"))
            cells += ["" if x is None else f"{x:.4f}" for x in found]
        else:
            text = row["error_message"].partition("\n")[0][:80]
            cells += ["failed: " + text.replace("|", "/"), "", "", "", ""]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(result, path):
    """Times at the first length and head size; growth with the length."""
    # Not pyplot's: drawn by Agg, whatever display there is.
    from matplotlib.figure import Figure

    good = [row for row in result["rows"] if "milliseconds" in row]
    length, head_dim = (good[0][key] for key in ("length", "head_dim"))
    good = [row for row in good if row["head_dim"] == head_dim]
    first = [row for row in good if row["length"] == length]
    long = any(row["length"] != length for row in good)
    size = (11 if long else 6, 1.5 + 0.35 * len(first))
    figure = Figure(figsize=size, layout="tight")
    axes = figure.subplots(1, 1 + long, squeeze=False)[0]
    bars = axes[0].barh(
        [f"{row['backend']}: {row['row']}" for row in first[::-1]],
        [row["milliseconds"] for row in first[::-1]],
    )
    axes[0].bar_label(bars, fmt="%.2f", padding=2, fontsize="small")
    axes[0].set(xlabel=f"ms, length {length}, heads of {head_dim}")
    axes[0].margins(x=0.15)
    for backend, name in dict.fromkeys((x["backend"], x["row"]) for x in good):
        same = [x for x in good if (x["backend"], x["row"]) == (backend, name)]
        if len(same) > 1:
            axes[-1].plot(
                [row["length"] for row in same],
                [per_token(row) / per_token(same[0]) for row in same],
                marker="o",
                label=f"{backend}: {name}",
            )
    if long:
        axes[1].set(xlabel="length", ylabel="time of a token, to the first")
        axes[1].set(ylim=(0, None))
        axes[1].legend(fontsize="small")
    figure.suptitle(result["hardware"])
    figure.savefig(path, dpi=150)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--child"]:
        return child(*arguments[1:])
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--backends", default="jax,torch")
    add("--lengths", default="2048", help="e.g. 2048,16384 (2048)")
    add("--head-dims", default="64", help="e.g. 64,128 (64)")
    add("--tokens", type=int, default=32768, help="of a batch (32768)")
    add("--width", type=int, default=1024, help="of all heads (1024)")
    add("--calls", type=int, default=10, help="of a block (10)")
    add("--timeout", type=float, default=1800.0, help="s a backend (1800)")
    add("--out", default="runs/attention.json")
    args = parser.parse_args(arguments)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "schema": 2,
        "command": shlex.join(
            ["python", "recipes/benchmark_attention.py", *arguments]
        ),
        **{"git_commit": None, "versions": {}, "hardware": None, "rows": []},
    }
    for backend in args.backends.split(","):
        if backend not in BACKENDS:
            parser.error(f"--backends has {list(BACKENDS)}, not {backend!r}")
        if importlib.util.find_spec(backend) is None:
            print(f"{backend} is not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder, "rows.json")
            command = [sys.executable, __file__, "--child", backend]
            command += [json.dumps(shapes_of(args)), str(args.calls), str(rows)]
            try:
                subprocess.run(command, timeout=args.timeout)
            except subprocess.TimeoutExpired:
                print(f"{backend}: out of time", file=sys.stderr)
            if not rows.exists():
                print(f"{backend}: no row", file=sys.stderr)
                continue
            found = json.loads(rows.read_text())
        result["rows"] += found["rows"]
        result["hardware"] = found["device"]
        result["git_commit"] = found["git_commit"]
        result["versions"] |= found["versions"]
        out.write_text(json.dumps(result, indent=1) + "\n")
    if not result["rows"]:
        sys.exit("benchmark_attention: no backend could be measured.")
    print(f"\n{table(result)}\n\n{out}")
    plot(result, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
