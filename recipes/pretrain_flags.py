"""The flags of `pretrain.py`: what they mean, and which a resumed run keeps."""

import argparse
import importlib.util
import json
import logging
import math
import os
import sys
from pathlib import Path

BACKENDS = ("jax", "torch", "tensorflow")
PRECISIONS = ("float32", "mixed_bfloat16", "bfloat16", "mixed_float16")
SAVES = ("all", "none")
# What a resumed run may have otherwise than before.
FREE = (
    "resume out backend cache distribution tensor_parallel multi_host policy "
    "autopsy prompt save checkpoint_every keep_last keep_every"
).split()


def positive(kind):
    def convert(text):
        value = kind(float(text)) if kind is int else kind(text)
        if not (math.isfinite(value) and value > 0):
            raise ValueError
        return value

    # What argparse calls a value that was refused.
    convert.__name__ = f"positive {'integer' if kind is int else 'number'}"
    return convert


def or_none(kind):
    def convert(text):
        return text if text == "none" else kind(text)

    convert.__name__ = f"{kind.__name__} or none"
    return convert


def variant_of(text):
    """`--variant`: a name, or the JSON text of a variant's dictionary."""
    if not text.lstrip().startswith("{"):
        return text
    return json.loads(text)


# What argparse calls a value that was refused.
variant_of.__name__ = "variant: a name or JSON, not"


def given(args, names):
    """Those of the flags that were given, for functions with defaults."""
    values = {name: getattr(args, name) for name in names.split()}
    return {k: v for k, v in values.items() if v is not None}


def choose_backend(arguments):
    """Sets KERAS_BACKEND, which Keras reads once, when it is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backend")
    parser.add_argument("--out")
    parser.add_argument("--resume", action="store_true")
    known = parser.parse_known_args(arguments)[0]
    record = known.resume and known.out and record_of(known.out)
    backend = known.backend or (record and record.get("backend"))
    backend = backend or os.environ.get("KERAS_BACKEND", "jax")
    if backend not in BACKENDS:
        sys.exit(
            f"pretrain: unknown backend {backend!r} in --backend or "
            f"KERAS_BACKEND. Allowed: {', '.join(BACKENDS)}."
        )
    if importlib.util.find_spec(backend) is None:
        sys.exit(
            f"pretrain: the backend {backend} is not installed: "
            f"pip install 'keras-stable[{backend}]'"
        )
    os.environ["KERAS_BACKEND"] = backend
    # Greetings of TensorFlow, which KerasHub imports if it is there, and a
    # warning about KerasHub's own prefetching.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)


def build(description, ks):
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="variants:\n"
        + "\n".join(f"  {v.name:14} {v.note}" for v in ks.VARIANTS.values()),
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--variant",
        default="baseline",
        type=variant_of,
        help="stability method, see below, or the JSON text of any variant's "
        "dictionary (baseline)",
    )
    add("--label", help="what tables call the run (the variant's name)")
    add(
        "--size",
        default="1m",
        help=f"one of {', '.join(ks.SIZES)} (1m); the four that follow win "
        "over it",
    )
    add("--num-layers", type=positive(int), help="transformer blocks")
    add("--num-heads", type=positive(int), help="divides the hidden dimension")
    add("--hidden-dim", type=positive(int), help="width of the residual stream")
    add("--intermediate-dim", type=positive(int), help="inner width of the MLP")
    add("--dropout", type=float, default=0.0, help="in [0, 1) (0)")
    add(
        "--remat",
        **{"nargs": "?", "const": "block", "default": "none"},
        help="mlp or block: what the backward pass recomputes (none). mlp: "
        "half the memory, a tenth more time; block: a quarter, a fifth more",
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        action="append",
        metavar="SOURCE",
        help="python: source of the standard library; or a file, a directory, "
        "a quoted glob, or a Hugging Face dataset, "
        '"hf:NAME?split=train&column=text&documents=10000"; once for each '
        "corpus (python)",
    )
    add(
        "--weights",
        nargs="+",
        type=positive(float),
        metavar="W",
        help="shares of the corpora in every batch, in the order of --data "
        "(as large as they are)",
    )
    add(
        "--tokenizer",
        default="byte",
        help="byte; character: one id for each character of the text; "
        "bpe:8192: as many learned from it; path of a tokenizer.json or of a "
        "SentencePiece .model; a KerasHub preset (byte)",
    )
    add(
        "--cache",
        default="default",
        metavar="DIR",
        help="where tokens and compiled programs are kept; none: nowhere "
        f"({ks.cache_directory()})",
    )
    add("--sequence-length", type=positive(int), default=128, help="(128)")
    add("--batch-size", type=positive(int), default=8, help="sequences (8)")
    add(
        "--validation-tokens",
        type=positive(float),
        default=200_000,
        help="at most so many of each corpus are evaluated (200000)",
    )
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive(int), help="optimizer updates (1500)")
    add("--tokens", type=positive(float), help="instead of --steps, e.g. 20e6")
    add(
        "--learning-rate",
        type=positive(float),
        default=3e-3,
        help="the schedule's peak (3e-3). Higher is faster until it diverges: "
        "that edge is what the variants move",
    )
    add(
        "--schedule",
        default="cosine",
        help=f"{', '.join(ks.SCHEDULES)}: after the warm-up (cosine)",
    )
    add("--warmup-steps", type=int, help="linear warm-up (5 %% of the steps)")
    add("--final", type=float, help="the schedule's end to its peak (0.1)")
    add("--cycles", type=positive(int), help="decays with warm restarts (1)")
    ratio = {"type": positive(float), "metavar": "RATIO"}
    add(
        "--cycle-growth", help="length of each cycle to the last's (1)", **ratio
    )
    add("--peak-decay", help="peak of each cycle to the last's (1)", **ratio)
    add("--rewarmup-steps", type=int, help="linear, back to the peak")
    add(
        "--z-loss",
        type=positive(float),
        help="weight of mean(logsumexp(logits)^2), 1e-4 in PaLM (the "
        "variant's)",
    )
    add("--weight-decay", type=float, default=0.1, help="on matrices (0.1)")
    add(
        "--decay",
        help="coupled; independent of the peak: 1e-4 is usual then (coupled)",
    )
    add("--beta-1", type=float, help="AdamW's, in [0, 1) (0.9)")
    add("--beta-2", type=float, help="AdamW's, in [0, 1) (0.95)")
    add("--epsilon", type=positive(float), help="AdamW's (1e-8)")
    add(
        "--clip-norm",
        type=or_none(positive(float)),
        help="largest norm of all gradients together; none: not clipped (1)",
    )
    add("--seed", type=int, default=0, help="of weights, batches, dropout (0)")
    add(
        "--precision",
        default="float32",
        help=f"{', '.join(PRECISIONS)} (float32). mixed_*: float32 weights; "
        "mixed_float16 scales its loss; bfloat16 wants an Ampere GPU or a TPU",
    )
    add(
        "--distribution",
        default="none",
        help=f"{', '.join(ks.DISTRIBUTIONS)}: how the model and its batches "
        "are laid out over all devices (none)",
    )
    text = "devices that share a matrix, for tensor and fsdp+tensor"
    add("--tensor-parallel", type=positive(int), help=text)
    add(
        "--multi-host",
        action="store_true",
        help="this is one of several processes of jax, on a TPU pod, SLURM or "
        "Open MPI, or as KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and "
        "_PROCESS_ID say",
    )
    text = f"{', '.join(BACKENDS)} (KERAS_BACKEND, or jax)"
    add("--backend", help=text)
    add = parser.add_argument_group("monitor").add_argument
    add(
        "--policy",
        default="halt",
        help="halt: stop a run that is lost; observe: let it go on; guard: "
        "leave bad updates out, and stop it when it is lost; recover: then "
        "go back, past the bad batches, up to three times (halt)",
    )
    add(
        "--autopsy",
        action="store_true",
        help="with guard and recover: when it is lost, find out whether data, "
        "weights or both are the cause",
    )
    add(
        "--every",
        default="auto",
        help="steps between tables of all layers; auto: as many as cost 2 %% "
        "of the time; none: watch the loss alone (auto)",
    )
    add(
        "--inputs",
        action="store_true",
        help="tables hold the inputs of layers beside their outputs",
    )
    add = parser.add_argument_group("output").add_argument
    add("--out", help="run directory, new (runs/VARIANT-TIME)")
    add("--prompt", help="the sample's beginning")
    add(
        "--save",
        default="all",
        help="all: model.keras, a sample and checkpoints; none: not these, "
        "only a checkpoint when it is stopped (all)",
    )
    add = parser.add_argument_group(
        "checkpoints",
        "SIGTERM and Ctrl-C save one and exit with code 75; a second Ctrl-C "
        "exits at once.",
    ).add_argument
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its newest good checkpoint; "
        "flags not given are the run's. Begins it if there is none",
    )
    add(
        "--checkpoint-every",
        type=positive(int),
        help="steps: no more is lost, whatever happens (500; none with --save "
        "none)",
    )
    add("--keep-last", type=positive(int), default=3, help="(3)")
    add(
        "--keep-every",
        type=positive(int),
        help="those at multiples of it are kept too (none)",
    )
    return parser


def parse(arguments, description, ks):
    """The flags, and the record of the run that they resume, or None.

    Those that are not given are that run's.
    """
    parser = build(description, ks)
    args = parser.parse_args(arguments)
    before = None
    if args.resume:
        if args.out is None:
            parser.error("--resume needs --out, the directory of the run.")
        before = record_of(args.out)
    if before is not None:
        known = before["config"]
        known = {k: v for k, v in known.items() if k in vars(args)}
        if known.get("tokens"):
            known["steps"] = None  # Follows from it.
        # Not a default: what is given would be added to it.
        sources = known.pop("data", None)
        parser.set_defaults(**known)
        args = parser.parse_args(arguments)
        args.data = args.data or sources
    if args.steps and args.tokens:
        parser.error("--steps and --tokens say the same: give one of them.")
    args.data = args.data or ["python"]
    if args.weights and len(args.weights) != len(args.data):
        parser.error(
            f"--weights has {len(args.weights)} numbers for {len(args.data)} "
            "corpora: give one for each --data."
        )
    return args, before


def flags_of(arguments, parser):
    """The flags that arguments give, by name, without those left out."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(arguments))


def arguments_of(flags, parser):
    """The inverse of `flags_of`.

    Raises:
        ValueError: for a name that is no flag.
    """
    actions = {action.dest: action for action in parser._actions}
    arguments = []
    for name, value in flags.items():
        if name not in actions or name == "help":
            raise ValueError(
                f"pretrain.py has no flag --{name.replace('_', '-')}: see "
                "python recipes/pretrain.py --help"
            )
        flag = actions[name].option_strings[0]
        if value is True:
            arguments.append(flag)
        elif actions[name].nargs == "+":
            arguments += [flag, *map(str, value)]
        elif value is not False and value is not None:
            # `=`: a value may begin with a dash.
            values = value if isinstance(value, (list, tuple)) else [value]
            texts = (v if isinstance(v, str) else json.dumps(v) for v in values)
            arguments += [f"{flag}={text}" for text in texts]
    return arguments


def record_of(out):
    """What `run.json` of a directory holds, None if there is no run.

    Raises:
        SystemExit: if it cannot be read.
    """
    file = Path(out) / "run.json"
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        dict(record["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"pretrain: {file} is no record of a run: {error!r}")
    return record


def kept(args):
    """The flags that stay the same as long as a run lasts."""
    flags = {k: v for k, v in vars(args).items() if k not in FREE}
    return json.loads(json.dumps(flags))


def check_same(args, before):
    """Refuses to go on with other settings than those the run began with.

    Raises:
        ValueError: with all that differ.
    """
    then = before["config"]
    changed = [
        f"--{name.replace('_', '-')} is {then.get(name)!r} there and "
        f"{value!r} here"
        for name, value in kept(args).items()
        if then.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"The run in {args.out} has other settings: {'; '.join(changed)}. "
            "Give those, or none, to go on with it; or another --out."
        )
