r"""What a training step needs of devices that are not here.

Question: does a model fit on these chips, what fills their memory, and how
fast could a step be?
Compiles the step that `pretrain.py` would run, with the compiler of the
devices that are named and without any of them, nor memory for the weights.

    pip install 'keras-stable[tpu]'
    python recipes/plan.py --size 830m --topology v5e:2x4
    python recipes/plan.py --size 8b --topology v5p:8x8x8 \
        --distribution fsdp+tensor --tensor-parallel 4
    python recipes/plan.py --size 830m --topology v5e:2x4 --largest-batch
    python recipes/plan.py --size 1b --topology cpu:8     # what GPUs would hold
    python recipes/plan.py --table recipes/results/plan-8b-*.json

The times are bounds: what products, memory and links take at their makers'
figures, if all overlaps and if nothing does. Only what the compiler says of
memory is exact.
"""

import argparse
import importlib.metadata
import json
import math
import os
import shlex
import sys
from pathlib import Path

PRECISIONS = ("float32", "mixed_bfloat16", "bfloat16")


def parse(arguments, ks):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", nargs="+", metavar="JSON", help="prints plans as a table")
    text = f"{', '.join(f'{chip}:2x4' for chip in ks.CHIPS)}, or cpu:N"
    add("--topology", default="v5e:2x4", help=f"{text} (v5e:2x4)")
    add("--size", default="830m", help=f"{', '.join(ks.SIZES)} (830m)")
    add("--num-layers", type=int, help="instead of the size's")
    add("--vocabulary", type=int, default=256_000, help="(256000)")
    add("--variant", default="qk_norm_cap", help="(qk_norm_cap)")
    add("--batch-size", type=int, help="of all devices (one for each)")
    add("--sequence-length", type=int, default=2048, help="(2048)")
    add("--precision", default="mixed_bfloat16", choices=PRECISIONS)
    add("--remat", default="block", choices=("none", "mlp", "block"))
    text = f"{', '.join(ks.DISTRIBUTIONS)} (fsdp)"
    add("--distribution", default="fsdp", help=text)
    add("--tensor-parallel", type=int, help="devices that share a matrix")
    add(
        "--monitor",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the step measures all layers (it does)",
    )
    text = "the compiler tries less hard: faster, for a lesser program"
    add("--quick", action="store_true", help=text)
    add("--largest-batch", action="store_true", help="the largest that fits")
    text = "of a device, for the largest batch (the chip's)"
    add("--memory-gib", type=float, help=text)
    add("--out", help="result file, JSON")
    return parser.parse_args(arguments)


def make(args, ks, keras):
    """A function from a batch size to a plan."""
    keras.config.set_dtype_policy(args.precision)
    shape = {"num_layers": args.num_layers} if args.num_layers else {}

    def build():
        lm = ks.StableCausalLM.from_size(
            args.size, args.vocabulary, args.variant, remat=args.remat, **shape
        )
        schedule = ks.WarmupSchedule(3e-3, total_steps=1000)
        lm.compile(ks.AdamW(schedule))
        return lm

    def planned(batch_size):
        return ks.plan(
            build,
            batch_size,
            args.sequence_length,
            args.topology,
            args.distribution,
            args.tensor_parallel,
            args.monitor,
            -1.0 if args.quick else None,
        )

    return planned


def together(found):
    """Counts and bytes of collectives, by kind and number of devices."""
    sums = {}
    for one in found["collectives"]:
        name = f"{one['kind']} of {one['group']}"
        count, amount = sums.get(name, (0, 0.0))
        sums[name] = (count + one["count"], amount + one["bytes"])
    return sums


def report(found):
    """The plan as text."""
    memory, gib = found["memory"], 2**30
    lines = [
        f"{found['parameters']:,} parameters on {found['devices']} devices, "
        f"{' x '.join(f'{n} {axis}' for axis, n in found['mesh'].items())}; "
        f"{found['batch_size']} x {found['sequence_length']} tokens a step",
        "\nmemory of a device, GiB",
    ]
    lines += [f"  {k:12} {v / gib:9.3f}" for k, v in memory.items()]
    lines.append("\na device computes, a step")
    for name in ("flops", "model_flops"):
        lines.append(f"  {name:12} {found[name] / 1e12:9.3f} T")
    traffic = found["memory_traffic"] / 1e9
    lines.append(f"  {'memory':12} {traffic:9.3f} GB read and written")
    lines.append("\ncollectives of a step: count, GB gathered or reduced")
    for name, (count, amount) in together(found).items():
        lines.append(f"  {name:28} {count:6} {amount / 1e9:9.3f}")
    if found["unknown_loops"]:
        lines.append(f"  {found['unknown_loops']} loops count as one pass")
    if found["seconds"]:
        lines.append("\nat the chip's best, ms")
        for name, value in found["seconds"].items():
            lines.append(f"  {name:12} {1e3 * value:9.2f}")
        lines.append(
            f"MFU at most {found['mfu']:.1%}, {found['mfu_serial']:.1%} if "
            "nothing overlaps"
        )
    return "\n".join(lines)


def moved(found):
    """GB that collectives gather or reduce."""
    return sum(one["bytes"] for one in found["collectives"]) / 1e9


def table(plans):
    """The Markdown table of several plans."""
    heads = "topology|mesh|batch|GiB a chip|ms a step|MFU|compute ms|"
    heads += "memory ms|links ms|GB gathered or reduced"
    lines = [heads.split("|")]
    lines.append(["---"] * len(lines[0]))
    for found in plans:
        line = [found["topology"], " x ".join(map(str, found["mesh"].values()))]
        line += [f"{found['batch_size']} x {found['sequence_length']}"]
        line += [f"{found['memory']['total'] / 2**30:.2f}"]
        if found["seconds"]:
            times = [1e3 * t for t in found["seconds"].values()]
            line += [f"{max(times):.0f} to {sum(times):.0f}"]
            line += [f"{found['mfu']:.0%} to {found['mfu_serial']:.0%}"]
            line += [f"{t:.0f}" for t in times]
        else:
            line += [""] * 5
        lines.append([*line, f"{moved(found):.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prepare(arguments):
    """Sets what jax reads once, when it starts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--topology", default="")
    topology = parser.parse_known_args(arguments)[0].topology
    os.environ["KERAS_BACKEND"] = "jax"
    # What is compiled for is not here, and what is here is left alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    kind, _, count = topology.partition(":")
    flag, flags = "--xla_force_host", os.environ.get("XLA_FLAGS", "")
    if kind == "cpu" and flag not in flags:
        flag += f"_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare(arguments)
    import keras

    import keras_stable as ks

    args = parse(arguments, ks)
    if args.table:
        plans = [json.loads(Path(f).read_text())["plan"] for f in args.table]
        return print(table(plans))
    kind, _, shape = args.topology.partition(":")
    result = {
        "schema": 1,
        "command": shlex.join(["python", "recipes/plan.py", *arguments]),
    }
    try:
        planned = make(args, ks, keras)
        devices = math.prod(int(n) for n in shape.split("x"))
        if args.largest_batch:
            capacity = args.memory_gib and args.memory_gib * 2**30
            if capacity is None and kind not in ks.CHIPS:
                raise ValueError("--largest-batch needs --memory-gib here.")
            parts = devices // (args.tensor_parallel or 1)
            result["tries"] = tries = []

            def tried(size, needed, fits):
                tries.append([size, needed if math.isfinite(needed) else None])
                text = "fits" if fits else "does not fit"
                print(f"batch {size}: {needed / 2**30:.2f} GiB {text}")

            size, found = ks.largest_batch(
                planned, parts, capacity or ks.CHIPS[kind].memory, tried
            )
            if found is None:
                sys.exit(f"plan: {parts} sequences do not fit.")
            result["largest_batch"] = size
        else:
            found = planned(args.batch_size or devices)
    except MemoryError as error:
        sys.exit(f"plan: it does not fit. {error.args[0]}")
    except ValueError as error:
        sys.exit(f"plan: {error}")
    print(report(found))
    environment = ks.environment()
    versions = environment["versions"]
    if kind != "cpu":
        versions["libtpu"] = importlib.metadata.version("libtpu")
    result |= {"git_commit": environment["git_commit"], "versions": versions}
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**result, "plan": found}, indent=1)
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
