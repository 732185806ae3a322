"""How fast is one layer of attention that is capped, clipped, measured?

Question: what do a cap, a clip and exact statistics cost in our kernels, beside
the kernels without them that a user has, and beside the formula written out?
Forward and backward, one after the other many times, the median of blocks.

    python recipes/benchmark_attention.py
    python recipes/benchmark_attention.py --length 16384 --batch 2
    python recipes/benchmark_attention.py --heads 8 --head-dim 128

Needs a GPU. Every backend has a process of its own; those that are not
installed are left out, rows that fail are recorded. `error` is the largest
deviation of outputs from those of the formula in float32, of short sequences of
the same numbers in bfloat16, relative to the largest output; that of gradients
likewise. Writes a JSON file and prints a table.
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


def measure(name, function, how, made, shapes, calls):
    _, step, make, wait, formula, _ = made
    run = step(functools.partial(function, **how) if how else function)
    entry = {"row": name}
    short = arrays_of(shapes, 1, SHORT)
    exact = {key: how[key] for key in ("cap", "clip") if key in how}
    if "flex" in name:
        exact = {"cap": CAP}
    # The same numbers, which bfloat16 has rounded.
    rounded = [numbers(x) for x in make(short, "bfloat16")]
    true = step(functools.partial(formula, **exact))(make(rounded, "float32"))
    if how or "cuDNN" not in name:
        # It has no odd lengths.
        found = run(make(short, "bfloat16"))
        entry["error"] = deviation([found[0]], [true[0]])
        entry["gradient_error"] = deviation(found[1], true[1])
    tensors = make(
        arrays_of(shapes, shapes["batch"], shapes["length"]), "bfloat16"
    )
    for _ in range(3):
        wait(run(tensors))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(calls):
            found = run(tensors)
        wait(found)
        times.append(1e3 * (time.perf_counter() - begun) / calls)
    return {**entry, "milliseconds": statistics.median(times), "times": times}


def child(backend, shapes, calls, out):
    os.environ["KERAS_BACKEND"] = backend
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import keras

    import keras_stable as ks

    shapes, found = json.loads(shapes), []
    of = shapes["batch"], shapes["length"], shapes["heads"], shapes["head_dim"]
    kernel = ks.backend.attention_kernel(
        keras.KerasTensor(of, "bfloat16"), CAP, None
    )
    if kernel is None:
        sys.exit(f"{backend}: no kernel for {of}, or no GPU")
    peer = importlib.import_module(f"peer_attention_{backend}")
    made = peer.rows(shapes["head_dim"] ** -0.5, CAP, CLIP, kernel[1])
    for name, (function, how) in made[0].items():
        try:
            entry = measure(name, function, how, made, shapes, int(calls))
        except Exception as error:
            entry = {"row": name, "error_message": f"{error}"[:300]}
        print(f"{backend:6} {name:24} {entry.get('milliseconds')}", flush=True)
        found.append({"backend": backend, **entry})
        record = {"rows": found, "device": made[-1], **ks.records.software()}
        Path(out).write_text(json.dumps(record))


def table(result):
    """Markdown; times also relative to the backend's first row."""
    lines = [
        ("backend", "kernel", "ms", "to the first", "error", "of gradients")
    ]
    lines.append(("---",) * len(lines[0]))
    one = {}
    for row in result["rows"]:
        cells = [row["backend"], row["row"]]
        if "milliseconds" in row:
            first = one.setdefault(row["backend"], row["milliseconds"])
            cells += [f"{row['milliseconds']:.2f}"]
            cells += [f"{row['milliseconds'] / first:.2f}"]
            errors = (row.get(k) for k in ("error", "gradient_error"))
            cells += ["" if x is None else f"{x:.4f}" for x in errors]
        else:
            cells += ["failed: " + row["error_message"][:80], "", "", ""]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
    add("--batch", type=int, default=16)
    add("--length", type=int, default=2048)
    add("--heads", type=int, default=16)
    add("--head-dim", type=int, default=64)
    add("--calls", type=int, default=10, help="of a block")
    add("--out", default="runs/attention.json")
    args = parser.parse_args(arguments)
    names = ("batch", "length", "heads", "head_dim")
    shapes = {name: getattr(args, name) for name in names}
    result = {
        "schema": 1,
        "command": shlex.join(
            ["python", "recipes/benchmark_attention.py", *arguments]
        ),
        **{"git_commit": None, "versions": {}, "hardware": None},
        **{"shapes": shapes, "rows": []},
    }
    for backend in args.backends.split(","):
        if backend not in BACKENDS:
            parser.error(f"--backends has {list(BACKENDS)}, not {backend!r}")
        if importlib.util.find_spec(backend) is None:
            print(f"{backend} is not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "rows.json")
            command = [sys.executable, __file__, "--child", backend]
            command += [json.dumps(shapes), str(args.calls), str(out)]
            subprocess.run(command)
            if not out.exists():
                print(f"{backend}: no row", file=sys.stderr)
                continue
            found = json.loads(out.read_text())
        result["rows"] += found["rows"]
        result["hardware"] = found["device"]
        result["git_commit"] = found["git_commit"]
        result["versions"] |= found["versions"]
    if not result["rows"]:
        sys.exit("benchmark_attention: no backend could be measured.")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\n{args.out}")


if __name__ == "__main__":
    main()
