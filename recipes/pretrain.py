r"""Pretrains a language model with one stability method.

Question: how does a method train at a learning rate?
Writes a run directory: run.json, health.jsonl (what the monitor saw: loss,
norms and verdict of every step, tables of all layers) and model.keras. Ends
with the validation loss beside the entropies of one and two tokens: a model
that does not beat them has learned counting.

    python recipes/pretrain.py
    python recipes/pretrain.py --variant qk_norm_cap --learning-rate 1e-2
    python recipes/pretrain.py --learning-rate 0.3 --policy halt
    python recipes/pretrain.py --data books/ --size 10m --tokens 20e6 \
        --precision mixed_bfloat16 --remat
    python recipes/pretrain.py --tokenizer bpe:8192 --data python \
        --data "hf:roneneldan/TinyStories?documents=50000" --weights 0.7 0.3

The defaults take about two minutes on two CPU cores.
"""

import argparse
import datetime
import importlib.util
import itertools
import logging
import math
import os
import sys

BACKENDS = ("jax", "torch", "tensorflow")
COUNTS = ("documents", "training_tokens", "validation_tokens")
ENTROPIES = ("unigram_entropy", "bigram_entropy")
PRECISIONS = ("float32", "mixed_bfloat16", "bfloat16", "mixed_float16")


def positive(kind):
    def convert(text):
        value = kind(float(text)) if kind is int else kind(text)
        if not (math.isfinite(value) and value > 0):
            raise ValueError
        return value

    # What argparse calls a value that was refused.
    convert.__name__ = f"positive {'integer' if kind is int else 'number'}"
    return convert


def given(args, names):
    """Those of the flags that were given, for functions with defaults."""
    values = {name: getattr(args, name) for name in names.split()}
    return {k: v for k, v in values.items() if v is not None}


def choose_backend(arguments):
    """Sets KERAS_BACKEND, which Keras reads once, when it is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backend")
    backend = parser.parse_known_args(arguments)[0].backend
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


def parse(arguments, ks):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="variants:\n"
        + "\n".join(f"  {v.name:14} {v.note}" for v in ks.VARIANTS.values()),
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--variant",
        default="baseline",
        help="stability method, see below (baseline)",
    )
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
        help="mlp or block: what the backward pass recomputes (none). block: "
        "least memory, about a third more time",
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
        help=f"{', '.join(ks.DISTRIBUTIONS)}; data: the batch is divided "
        "among all devices (jax)",
    )
    text = f"{', '.join(BACKENDS)} (KERAS_BACKEND, or jax)"
    add("--backend", help=text)
    add = parser.add_argument_group("monitor").add_argument
    add(
        "--policy",
        default="halt",
        help="halt: stop a run that is lost; observe: let it go on (halt)",
    )
    add(
        "--every",
        default="auto",
        help="steps between tables of all layers; auto: as many as cost 2 %% "
        "of the time; none: watch the loss alone (auto)",
    )
    add = parser.add_argument_group("output").add_argument
    add("--out", help="run directory, new (runs/VARIANT-TIME)")
    add("--prompt", help="the sample's beginning")
    args = parser.parse_args(arguments)
    if args.steps and args.tokens:
        parser.error("--steps and --tokens say the same: give one of them.")
    args.data = args.data or ["python"]
    if args.weights and len(args.weights) != len(args.data):
        parser.error(
            f"--weights has {len(args.weights)} numbers for {len(args.data)} "
            "corpora: give one for each --data."
        )
    return args


def read(args, ks):
    """The tokenizer, and the tokens of each corpus."""
    # Made from all of the text, which is read once more for its tokens.
    documents = itertools.chain.from_iterable(
        ks.stream_corpus(source) for source in args.data
    )
    tokenizer = ks.load_tokenizer(args.tokenizer, documents)
    named = {"default": ks.cache_directory(), "none": None}
    cache = named.get(args.cache, args.cache)
    ks.keep_programs(cache)
    return tokenizer, [
        ks.tokenize_corpus(source, tokenizer, cache=cache)
        for source in args.data
    ]


def together(corpora, name):
    """The mean of the corpora's numbers, weighted as the batches are."""
    return sum(corpus["weight"] * corpus[name] for corpus in corpora)


def prepare(args, ks, keras):
    """Everything that can be refused, before the first step."""
    ks.check_choice(args.precision, PRECISIONS, "precision")
    variant = ks.get_variant(args.variant)
    if args.z_loss:
        variant = variant.replace(z_loss=args.z_loss)
    if args.steps is None:
        per_step = args.batch_size * args.sequence_length
        args.steps = int(args.tokens // per_step) if args.tokens else 1500
        if not args.steps:
            raise ValueError(
                f"--tokens {args.tokens:g} is less than one batch of "
                f"{per_step} tokens."
            )
    schedule = ks.WarmupSchedule(
        args.learning_rate,
        args.steps,
        warmup_steps=args.warmup_steps,
        shape=args.schedule,
        **given(args, "cycles cycle_growth peak_decay rewarmup_steps"),
    )
    optimizer = ks.AdamW(schedule, weight_decay=args.weight_decay)
    keras.utils.set_random_seed(args.seed)
    keras.config.set_dtype_policy(args.precision)
    ks.set_distribution(args.distribution, args.batch_size)

    tokenizer, corpora = read(args, ks)
    shape = (args.batch_size, args.sequence_length)
    training = [corpus.training for corpus in corpora]
    if len(corpora) == 1:
        weights = [1.0]
        batches = ks.TokenBatches(training[0], *shape, seed=args.seed)
    else:
        how = {"weights": args.weights, "seed": args.seed}
        batches = ks.MixedBatches(training, *shape, **how)
        weights = batches.weights
    most = max(int(args.validation_tokens // (shape[0] * shape[1])), 1)
    evaluations = [
        ks.TokenBatches(corpus.validation, *shape, shuffle=False)[:most]
        for corpus in corpora
    ]

    sizes = given(args, "num_layers num_heads hidden_dim intermediate_dim")
    if "hidden_dim" in sizes:
        sizes.setdefault("intermediate_dim", 4 * sizes["hidden_dim"])
    lm = ks.StableCausalLM.from_size(
        args.size,
        tokenizer.vocabulary_size(),
        variant,
        tokenizer=tokenizer,
        dropout=args.dropout,
        remat=args.remat,
        seed=args.seed,
        **sizes,
    )
    lm.compile(optimizer)

    every = {"auto": "auto", "none": None}.get(args.every)
    if args.every not in ("auto", "none"):
        every = positive(int)(args.every)
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    args.out = args.out or f"runs/{args.variant}-{now}"
    rows = [
        {
            "source": source,
            "weight": weight,
            "documents": corpus.documents,
            "training_tokens": len(corpus.training),
            "validation_tokens": len(corpus.validation),
            # What counting one and two tokens reaches on the validation text.
            "unigram_entropy": ks.unigram_entropy(corpus.validation),
            "bigram_entropy": ks.bigram_entropy(corpus.validation),
        }
        for source, weight, corpus in zip(args.data, weights, corpora)
    ]
    run = ks.RunDirectory(args.out, vars(args))
    run.update(
        parameters=lm.count_params(),
        tokens=args.steps * shape[0] * shape[1],
        corpus={
            "vocabulary_size": tokenizer.vocabulary_size(),
            "corpora": rows,
            **{name: sum(row[name] for row in rows) for name in COUNTS},
            **{name: together(rows, name) for name in ENTROPIES},
        },
    )
    if args.tokenizer.startswith("bpe:"):
        # `--tokenizer` takes it: learned once, for many runs.
        tokenizer.to_file(run.path / "tokenizer.json")
    monitor = ks.StabilityMonitor(run.path, policy=args.policy, every=every)
    # All steps in one pass for `fit`, whatever the corpus's passes are.
    return lm, batches.repeat()[: args.steps], evaluations, run, monitor


def report(run, args, loss, sample):
    corpus = run.record["corpus"]
    rows = {"validation loss": loss}
    rows |= {name.replace("_", " "): corpus[name] for name in ENTROPIES}
    print(f"\n{'':17}nats/token  perplexity")
    for name, value in rows.items():
        # Beyond 700 the exponential overflows; the run has diverged anyway.
        print(f"{name:17}{value:10.4f}  {math.exp(min(value, 700)):10.2f}")
    if len(args.data) > 1:
        print("\nvalidation loss, entropies and weight of each corpus:")
        for row in corpus["corpora"]:
            values = [row[k] for k in ("validation_loss", *ENTROPIES, "weight")]
            print("".join(f"{v:8.4f}" for v in values), "", row["source"])
    print(f"verdict: {run.record['verdict']}")
    print(f"\nsample:\n{sample}\n\nrun directory: {args.out}")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    choose_backend(arguments)
    import keras

    import keras_stable as ks

    args = parse(arguments, ks)
    try:
        lm, batches, evaluations, run, monitor = prepare(args, ks, keras)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"pretrain: {error}")
    print(
        f"{args.variant}, {lm.count_params():,} parameters, {args.precision}, "
        f"{keras.backend.backend()} on {run.record['device']}; "
        f"{run.record['tokens']:,} tokens in {args.steps} steps"
    )
    try:
        lm.fit(batches, callbacks=[monitor], verbose=1)
    except ks.TrainingHalted as halted:
        print(f"\n{halted}")
    corpus = run.record["corpus"]
    for row, evaluation in zip(corpus["corpora"], evaluations):
        found = lm.evaluate(evaluation, return_dict=True, verbose=0)
        row["validation_loss"] = found["loss"]
    loss = together(corpus["corpora"], "validation_loss")
    prompt = args.prompt or ("def " if args.data[0] == "python" else "The ")
    sample = lm.generate(
        prompt, max_length=args.sequence_length, stop_token_ids=None
    )
    lm.save(run.path / "model.keras")
    lost = monitor.verdict.lost or not math.isfinite(loss)
    run.update(
        corpus=corpus,
        status="diverged" if lost else "finished",
        verdict=str(monitor.verdict),
        worst_verdict=str(monitor.worst),
        steps_done=monitor.step,
        last_batch_loss=monitor.last.get("loss"),
        monitor_overhead=monitor.overhead,
        validation_loss=loss,
        perplexity=math.exp(min(loss, 700)),
        sample=sample,
    )
    report(run, args, loss, sample)


if __name__ == "__main__":
    main()
