r"""Finds how far each method can be pushed: many runs of pretrain.py.

Question: up to which learning rate is a method stable, and how well does it
learn there? Every run is a directory, OUT/LABEL/lr-RATE/seed-SEED; the sweep
is stopped, killed and begun again at will, and goes on where it was, also on
another machine that OUT was copied to. Ends with the stability table, which
OUT/table.json and OUT/table.csv hold too.

    python recipes/sweep.py --experiment paper-lr --out runs/paper-lr
    python recipes/sweep.py --variants baseline,qk_norm --rates 1e-3,1e-2,1e-1 \
        --seeds 3 --out runs/a -- --steps 300 --num-layers 3
    python recipes/sweep.py --variants paper --rates paper --search bisect \
        --devices 0,1 --slots 4 --out runs/b -- --size 10m --tokens 20e6
    python recipes/sweep.py --out runs/a            # goes on
    python recipes/sweep.py --out runs/a --extend --rates 3e-2   # one more
    python recipes/sweep.py --out runs/a --show     # the table, as it is now

What follows `--` are flags of pretrain.py, for all runs. Nothing is kept of a
run but its records (`-- --save all` keeps models). Exits with code 1 if runs
failed, 75 if it was stopped.
"""

import argparse
import os
import sys
from pathlib import Path

from pretrain_flags import arguments_of
from pretrain_flags import build
from pretrain_flags import choose_backend
from pretrain_flags import flags_of
from pretrain_flags import positive

PRETRAIN = str(Path(__file__).with_name("pretrain.py"))
TOGETHER = str(Path(__file__).with_name("pretrain_many.py"))
# What the sweep itself says of every run.
OWN = "variant label learning_rate seed out resume multi_host".split()


def numbers(text):
    """Learning rates, or the name of a ladder."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        if text[:1].isalpha():
            return text
        raise argparse.ArgumentTypeError(
            f"numbers separated by commas, or a name. Received: {text!r}"
        ) from None


def seeds(text):
    """`3`: 0, 1, 2; `4,` or `0,4`: those."""
    if "," in text:
        return tuple(int(part) for part in text.split(",") if part.strip())
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(
            f"3 for the seeds 0, 1 and 2, or 0,4 for those. Received: {text!r}"
        )
    return tuple(range(int(text)))


def parse(arguments, rest, ks):
    """The sweep's flags, and those of pretrain.py."""
    known = ks.EXPERIMENTS.values()
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="experiments:\n"
        + "\n".join(f"  {e.name:15} {e.question}" for e in known),
    )
    parser.add_argument("--out", required=True, help="the sweep's directory")
    add = parser.add_argument_group("what is compared").add_argument
    add("--experiment", metavar="NAME", help="one of those below")
    add(
        "--variants",
        metavar="NAMES",
        help="paper: the ten of the paper; or names, separated by commas",
    )
    add(
        "--setup",
        metavar="NAME",
        help=f"{', '.join(ks.SETUPS)}: models and steps for that (the "
        "experiment's, or pretrain.py's defaults)",
    )
    add = parser.add_argument_group("learning rates and seeds").add_argument
    add(
        "--rates",
        type=numbers,
        help=f"separated by commas, or {', '.join(ks.LADDERS)} (the "
        "experiment's, or wortsman)",
    )
    add(
        "--seeds",
        type=seeds,
        help="3: 0, 1 and 2; 0,4: those (the experiment's, or 1)",
    )
    add(
        "--at-ends",
        type=seeds,
        default=(),
        metavar="SEEDS",
        help="seeds at the two ends of each interval alone, for a ladder",
    )
    add(
        "--search",
        help="ladder: all rates; bisect: between the least and the largest, "
        "to a ratio; tpe: Optuna looks for the best (the experiment's, or "
        "ladder)",
    )
    add("--ratio", type=float, default=1.19, help="of bisect (1.19)")
    add("--trials", type=int, default=12, help="rates of tpe (12)")
    add(
        "--extend",
        action="store_true",
        help="add rates, seeds or arms to the sweep that is in --out; what is "
        "not said stays as it is there",
    )
    add = parser.add_argument_group("where it runs").add_argument
    add("--engine", default="local", help="local, or ray: a cluster (local)")
    add("--slots", type=int, help="runs at once, on this machine (1)")
    add(
        "--together",
        type=positive(int),
        default=1,
        metavar="K",
        help="runs of one method in one program, in each slot; jax alone. "
        "Nothing of them is saved before they end (1)",
    )
    add("--devices", help="GPUs, e.g. 0,1: slots take turns (all that it sees)")
    add("--cpus", type=int, help="of a run, on ray (1)")
    add("--gpus", type=float, help="of a run, on ray, e.g. 0.5 (1, if any)")
    add = parser.add_argument_group("what it shows").add_argument
    add("--format", default="text", help="of the table: text, markdown (text)")
    add("--show", action="store_true", help="only the table of --out")
    add(
        "--retry", action="store_true", help="try again what failed, once more"
    )
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(
            f"no flags of the sweep: {' '.join(unknown)}. Those of pretrain.py "
            "stand behind a double dash: sweep.py ... -- --steps 300"
        )
    flags = build("The flags after --.", ks)
    flags.prog = "sweep.py ... --"
    return args, flags_of(rest, flags)


def declare(args, flags, ks):
    """The sweep in --out, as it is there or as it is asked for."""
    if args.experiment and args.variants:
        raise ValueError("Give --experiment or --variants, not both.")
    arms, experiment, there = None, None, None
    search_flags = args.rates, args.seeds, args.at_ends, args.search
    asked = any((flags, args.setup, *search_flags))
    named = args.experiment or args.variants
    if args.show and (asked or named or args.extend):
        raise ValueError(
            "--show changes nothing. Give it with --out, and --format, alone."
        )
    if args.extend and (not named or Path(args.out, "sweep.json").exists()):
        # What is not said is as it is there.
        there = ks.Sweep(args.out)
        flags = {**there.flags, **setup(args.setup, None, ks), **flags}
    if args.experiment:
        ks.check_choice(args.experiment, ks.EXPERIMENTS, "experiment")
        experiment = ks.EXPERIMENTS[args.experiment]
        arms = experiment.arms
    elif args.variants:
        names = [name.strip() for name in args.variants.split(",")]
        names = ks.PAPER if args.variants == "paper" else names
        arms = [ks.Arm(name) for name in names]
    elif there is not None:
        arms = [
            ks.Arm(label, ks.get_variant(arm["variant"]), arm["flags"])
            for label, arm in there.arms.items()
        ]
    elif asked:
        raise ValueError(
            "Say what is compared, with --experiment or --variants; or give "
            "--out alone, to go on with the sweep that is there, or with "
            "--extend, to add to it."
        )
    if arms is None:
        return ks.Sweep(args.out)
    flags = {**setup(args.setup, experiment, ks), **flags}
    parser = build(None, ks)
    for arm in arms:
        for name in {**flags, **arm.flags}:
            if name in OWN:
                raise ValueError(
                    f"--{name.replace('_', '-')} is the sweep's own, of each "
                    "run: see --variants, --rates and --seeds."
                )
        # Ends with what is wrong about them, if anything is.
        parser.prog = f"sweep: {arm.label}"
        parser.parse_args(arguments_of({**flags, **arm.flags}, parser))
    flags.setdefault("backend", os.environ["KERAS_BACKEND"])
    name = there.experiment if there else None
    known = experiment or there
    sweep = ks.Sweep(
        args.out,
        arms,
        search(args, experiment, there, ks),
        flags=flags,
        experiment=experiment.name if experiment else name,
        question=known.question if known else "",
        extend=args.extend,
    )
    return sweep


def setup(name, experiment, ks):
    """The flags of an experiment, in another set-up if one is named."""
    flags = dict(experiment.flags) if experiment else {}
    if name is None:
        return flags
    ks.check_choice(name, ks.SETUPS, "setup")
    parts = {flag for other in ks.SETUPS.values() for flag in other}
    flags = {k: v for k, v in flags.items() if k not in parts}
    return {**flags, **ks.SETUPS[name]}


def search(args, experiment, there, ks):
    rates, own = args.rates, args.seeds
    if there is not None:
        if not any((rates, own, args.at_ends, args.search)):
            return there.search
        if isinstance(there.search, ks.Ladder):
            rates, own = rates or there.search.rates, own or there.search.seeds
    if rates is None:
        rates = experiment.rates if experiment else "wortsman"
    if own is None:
        own = experiment.seeds if experiment else (0,)
    kind = args.search or "ladder"
    ks.check_choice(kind, ks.SEARCHES, "search")
    if kind == "ladder":
        more = tuple(seed for seed in args.at_ends if seed not in own)
        return ks.Ladder(rates, own, more)
    # Its checks are of use for these too.
    rates = ks.Ladder(rates).rates
    if kind == "bisect":
        return ks.Bisection(rates[0], rates[-1], args.ratio, own)
    return ks.TPESearch(rates[0], rates[-1], args.trials, seeds=own)


def command_of(sweep, ks, together=1):
    """From runs of a sweep to the arguments of Python."""
    parser = build(None, ks)
    flags = [{**sweep.flags, **arm["flags"]} for arm in sweep.arms.values()]
    for name, value in (("save", "none"), ("backend", "jax")):
        found = {own.get(name, value) for own in flags} - {value}
        if together > 1 and found:
            raise ValueError(
                f"--together trains with --{name} {value} alone. Received: "
                f"--{name} {found.pop()}"
            )

    def command(runs):
        arm = sweep.arms[runs[0].label]
        variant = ks.get_variant(arm["variant"])
        flags = {
            "save": "none",
            **{**sweep.flags, **arm["flags"]},
            "label": runs[0].label,
            "variant": arm["variant"],
            "resume": True,
        }
        if ks.VARIANTS.get(variant.name) == variant:
            flags["variant"] = variant.name
        own = [
            (run.learning_rate, run.seed, sweep.path / run.folder)
            for run in runs
        ]
        own = [[*map(str, each)] for each in own]
        if len(own) > 1:
            own = [part for each in own for part in ("--run", *each)]
            return [TOGETHER, *arguments_of(flags, parser), *own]
        names = ("learning_rate", "seed", "out")
        flags |= dict(zip(names, own[0]))
        return [PRETRAIN, *arguments_of(flags, parser)]

    return command


def show(sweep, args, ks):
    """Prints the table; returns whether runs failed."""
    rows = ks.sweep_table(sweep)
    print(ks.format_sweep_table(rows, args.format))
    if wanted := len(sweep.wanted()):
        print(f"{wanted} runs are still wanted.", file=sys.stderr)
    for label, problems in sweep.problems.items():
        for problem in problems:
            print(f"{label}: {problem}", file=sys.stderr)
    return any(row["failed"] for row in rows)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else [*arguments]
    # Theirs come after a double dash.
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, rest = arguments[:cut], arguments[cut + 1 :]
    choose_backend(rest)
    import keras_stable as ks

    args, flags = parse(arguments, rest, ks)
    try:
        ks.check_choice(args.format, ("text", "markdown"), "format")
        sweep = declare(args, flags, ks)
        if args.show:
            return int(show(sweep, args, ks))
        cache = sweep.flags.get("cache", "default")
        named = {"default": ks.cache_directory(), "none": None}
        workers = ks.workers(
            args.engine,
            slots=args.slots,
            devices=args.devices and args.devices.split(","),
            cpus=args.cpus,
            gpus=args.gpus,
            cache=named.get(cache, cache),
        )
        if args.retry:
            sweep.retry()
        command = command_of(sweep, ks, args.together)
        rows = ks.sweep_table(sweep)
        print(
            f"{len(sweep.wanted())} runs to make, "
            f"{sum(row['runs'] for row in rows)} are there."
        )
        ks.run_sweep(sweep, workers, command, args.together)
        return int(show(sweep, args, ks))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"sweep: {error}")


if __name__ == "__main__":
    sys.exit(main())
