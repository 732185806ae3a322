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
LEFT_OUT = "not on this machine"


def rows_of_jax(shapes):
    import jax
    from jax import numpy as jnp
    from keras_stable.backend.jax_attention import attend_fused

    scale = shapes["head_dim"] ** -0.5

    def formula(q, k, v, cap=None, clip=None):
        z = scale * jnp.einsum(
            "btnh,bsnh->bnts", q, k, preferred_element_type="float32"
        )
        z = z if cap is None else cap * jnp.tanh(z / cap)
        T = q.shape[1]
        z = jnp.where(jnp.tril(jnp.ones((T, T), bool)), z, -1e30)
        p = jax.nn.softmax(z, axis=-1)
        if clip is not None:
            p = jnp.clip((clip[1] - clip[0]) * p + clip[0], 0.0, 1.0)
        return jnp.einsum("bnts,bsnh->btnh", p.astype(v.dtype), v)

    def stock(q, k, v):
        return jax.nn.dot_product_attention(
            *(q, k, v), scale=scale, is_causal=True, implementation="cudnn"
        )

    def ours(q, k, v, **how):
        y, rows = attend_fused(q, k, v, scale, **how)
        # Kept as the monitor keeps them: reduced over sequences and queries.
        return y, None if rows is None else [x.max((0, 2)) for x in rows]

    def step(function):
        def total(q, k, v, dy):
            found = function(q, k, v)
            y, rows = found if isinstance(found, tuple) else (found, None)
            y = y.astype("float32") * dy.astype("float32")
            return y.sum(), (found, rows)

        run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

        def call(tensors):
            (_, (found, _)), gradients = run(*tensors)
            return (found[0] if isinstance(found, tuple) else found), gradients

        return call

    def make(arrays, dtype):
        return [jnp.asarray(x, dtype) for x in arrays]

    functions = {
        "cuDNN": (stock, {}),
        "ours": (ours, {}),
        "ours, statistics": (ours, {"statistics": True}),
        "ours, cap": (ours, {"cap": CAP}),
        "ours, cap, statistics": (ours, {"cap": CAP, "statistics": True}),
        "ours, clip": (ours, {"clip": CLIP}),
        "formula, cap": (formula, {"cap": CAP}),
        "formula, clip": (formula, {"clip": CLIP}),
    }
    device = jax.devices()[0].device_kind
    return functions, step, make, jax.block_until_ready, formula, device


def rows_of_torch(shapes):
    import torch
    from keras_stable.backend.torch_attention import attend_fused
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    scale = shapes["head_dim"] ** -0.5

    def formula(q, k, v, cap=None, clip=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        z = scale * (q @ k.transpose(-1, -2)).float()
        z = z if cap is None else cap * torch.tanh(z / cap)
        T = q.shape[2]
        seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        p = torch.softmax(z.masked_fill(~seen, -1e30), dim=-1)
        if clip is not None:
            p = ((clip[1] - clip[0]) * p + clip[0]).clamp(0.0, 1.0)
        return (p.to(v.dtype) @ v).transpose(1, 2)

    def stock(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return y.transpose(1, 2)

    masks = {}

    def flex(q, k, v):
        T = q.shape[1]
        if T not in masks:
            masks[T] = create_block_mask(
                lambda b, h, t, s: t >= s, None, None, T, T, q.device
            )

        def capped(z, b, h, t, s):
            return CAP * torch.tanh(z / CAP)

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = flex_attention(q, k, v, capped, masks[T], scale)
        return y.transpose(1, 2)

    def ours(q, k, v, **how):
        y, rows = attend_fused(q, k, v, scale, **how)
        if rows is not None:
            for x in rows:
                x.amax((0, 2))
        return y

    def step(function):
        run = torch.compile(function, dynamic=False)

        def call(tensors):
            *leaves, dy = tensors
            y = run(*leaves)
            return y, torch.autograd.grad(y, leaves, dy)

        return call

    def make(arrays, dtype):
        found = [
            torch.as_tensor(x, dtype=getattr(torch, dtype), device="cuda")
            for x in arrays
        ]
        return [*(x.requires_grad_() for x in found[:-1]), found[-1]]

    functions = {
        "SDPA": (stock, {}),
        "flex_attention, cap": (flex, {}),
        "ours": (ours, {}),
        "ours, cap": (ours, {"cap": CAP}),
        "ours, cap, statistics": (ours, {"cap": CAP, "statistics": True}),
        "ours, clip": (ours, {"clip": CLIP}),
        "formula, cap": (formula, {"cap": CAP}),
        "formula, clip": (formula, {"clip": CLIP}),
    }

    def wait(_):
        torch.cuda.synchronize()

    device = torch.cuda.get_device_name()
    return functions, step, make, wait, formula, device


BACKENDS = {"jax": rows_of_jax, "torch": rows_of_torch}


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
    import keras_stable as ks

    shapes, found = json.loads(shapes), []
    made = BACKENDS[backend](shapes)
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
            cells += [f"{row[k]:.4f}" for k in ("error", "gradient_error")]
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
            print(f"{backend}: {LEFT_OUT}")
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
