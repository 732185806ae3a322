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

The defaults take about two minutes on two CPU cores. A run that was stopped,
killed or interrupted goes on, after 500 steps at most done twice:

    python recipes/pretrain.py --resume --out runs/a
"""

import datetime
import itertools
import math
import shutil
import sys
from pathlib import Path

from pretrain_flags import PRECISIONS
from pretrain_flags import SAVES
from pretrain_flags import check_same
from pretrain_flags import choose_backend
from pretrain_flags import given
from pretrain_flags import kept
from pretrain_flags import parse
from pretrain_flags import positive

COUNTS = ("documents", "training_tokens", "validation_tokens")
ENTROPIES = ("unigram_entropy", "bigram_entropy")


def read(args, ks):
    """The tokenizer, and the tokens of each corpus."""
    # Made from all of the text, which is read once more for its tokens.
    documents = itertools.chain.from_iterable(
        ks.stream_corpus(source) for source in args.data
    )
    learned = Path(args.out) / "tokenizer.json"
    source = args.tokenizer
    if args.resume and learned.exists():
        source = str(learned)
    tokenizer = ks.load_tokenizer(source, documents)
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


def prepare(args, before, ks, keras):
    """Everything that can be refused, before the first step.

    Args:
        before: record of the run that is resumed, or None.
    """
    ks.check_choice(args.precision, PRECISIONS, "precision")
    ks.check_choice(args.save, SAVES, "what to --save")
    variant = ks.get_variant(args.variant)
    if isinstance(args.variant, dict):
        args.variant = variant.to_dict()  # With all that was left out.
    if args.z_loss:
        variant = variant.replace(z_loss=args.z_loss)
    if args.save == "all" and args.checkpoint_every is None:
        args.checkpoint_every = 500
    if args.steps is None:
        per_step = args.batch_size * args.sequence_length
        args.steps = int(args.tokens // per_step) if args.tokens else 1500
        if not args.steps:
            raise ValueError(
                f"--tokens {args.tokens:g} is less than one batch of "
                f"{per_step} tokens."
            )
    if before is not None:
        check_same(args, before)
    args.label = args.label or variant.name
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    args.out = args.out or f"runs/{args.label}-{now}"
    keras.utils.set_random_seed(args.seed)
    keras.config.set_dtype_policy(args.precision)
    ks.set_distribution(
        args.distribution, args.batch_size, args.tensor_parallel
    )
    if ks.process_count() > 1 and Path(args.out).name.endswith(now):
        raise ValueError("Several processes need one --out, the same for all.")
    schedule = ks.WarmupSchedule(
        args.learning_rate,
        args.steps,
        warmup_steps=args.warmup_steps,
        shape=args.schedule,
        **given(args, "final cycles cycle_growth peak_decay rewarmup_steps"),
    )
    clip = {None: "auto", "none": None}.get(args.clip_norm, args.clip_norm)
    optimizer = ks.AdamW(
        schedule,
        weight_decay=args.weight_decay,
        global_clipnorm=clip,
        **given(args, "beta_1 beta_2 epsilon decay"),
    )

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
    seeks = args.policy == "recover" or args.autopsy
    monitor = ks.StabilityMonitor(
        args.out,
        policy=args.policy,
        every=every,
        inputs=args.inputs,
        data=batches if seeks else None,
        autopsy=args.autopsy,
    )
    checkpoints = ks.Checkpoints(
        Path(args.out) / "checkpoints",
        every=args.checkpoint_every,
        keep_last=args.keep_last,
        keep_every=args.keep_every,
        data=batches,
        monitor=monitor,
        config=kept(args),
    )
    begin = checkpoints.restore(lm) if before else None
    run = ks.RunDirectory(args.out, vars(args), begin)
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
    if args.tokenizer.startswith("bpe:") and run.writes:
        # `--tokenizer` takes it: learned once, for many runs.
        tokenizer.to_file(run.path / "tokenizer.json")
    return lm, batches, evaluations, run, [monitor, checkpoints]


def fit(lm, batches, steps, monitor, checkpoints, verbose):
    """Trains until all steps are made, also those that were taken back."""
    made = checkpoints.step or 0
    while (left := steps + monitor.undone - made) > 0:
        # All in one pass for `fit`, whatever the corpus's passes are.
        lm.fit(
            batches.repeat()[:left],
            callbacks=[monitor, checkpoints],
            verbose=verbose,
        )
        made += left
        batches.set_state(batches.get_state(monitor.position))


def evaluate(lm, batches, keras):
    """The loss of each batch of one corpus, all of as many tokens."""
    losses = []
    each = keras.callbacks.LambdaCallback(
        on_test_batch_end=lambda batch, logs: losses.append(
            float(logs["batch_loss"])
        )
    )
    found = lm.evaluate(batches, return_dict=True, verbose=0, callbacks=[each])
    return found["loss"], losses


def conclude(run, monitor, losses, sample=None):
    """Writes how a run ended, and returns its validation loss.

    Args:
        losses: for each corpus `(mean, losses of its batches)`.
    """
    corpus, batch_losses = run.record["corpus"], []
    for row, (mean, each) in zip(corpus["corpora"], losses):
        row["validation_loss"], row["validation_batches"] = mean, len(each)
        batch_losses += each
    loss = together(corpus["corpora"], "validation_loss")
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
        # Of equal numbers of tokens, corpus by corpus.
        validation_batch_losses=batch_losses,
        perplexity=math.exp(min(loss, 700)),
        sample=sample,
    )
    return loss


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
    if sample is not None:
        print(f"\nsample:\n{sample}")
    print(f"\nrun directory: {args.out}")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    choose_backend(arguments)
    import keras

    if "--multi-host" in arguments:
        if keras.backend.backend() != "jax":
            sys.exit("pretrain: --multi-host is for jax; on torch, torchrun.")
        # Before anything else asks for a device.
        keras.distribution.initialize()
    import keras_stable as ks

    args, before = parse(arguments, __doc__, ks)
    if before is not None and before.get("status") in ("finished", "diverged"):
        print(f"The run in {args.out} has {before['status']}.")
        return
    try:
        found = prepare(args, before, ks, keras)
    except (ValueError, OSError, ImportError, ks.CheckpointError) as error:
        sys.exit(f"pretrain: {error}")
    lm, batches, evaluations, run, (monitor, checkpoints) = found
    say = print if run.writes else lambda *text: None
    say(
        f"{args.label}, {lm.count_params():,} parameters, {args.precision}, "
        f"{keras.backend.backend()} on {run.record['device']}; "
        f"{run.record['tokens']:,} tokens in {args.steps} steps"
    )
    if before is not None:
        say(f"Goes on after step {checkpoints.step}.")
    try:
        # A bar is for terminals: in a file it is a line for each step.
        verbose = (1 if sys.stdout.isatty() else 2) if run.writes else 0
        fit(lm, batches, args.steps, monitor, checkpoints, verbose)
    except ks.TrainingHalted as halted:
        print(f"\n{halted}")
    except ks.TrainingInterrupted as interrupted:
        run.update(status="interrupted", steps_done=interrupted.step)
        print(f"Go on: python recipes/pretrain.py --resume --out {args.out}")
        raise
    except OSError as error:
        sys.exit(
            f"pretrain: {error}. Go on, when that is mended: python "
            f"recipes/pretrain.py --resume --out {args.out}"
        )
    finally:
        checkpoints.close()
    losses = [evaluate(lm, evaluation, keras) for evaluation in evaluations]
    sample = None
    whole = ks.process_count() == 1 or keras.backend.backend() != "jax"
    if args.save == "all" and not whole:
        sample = "none: of several processes none has the whole model"
    elif args.save == "all":
        prompt = "def " if args.data[0] == "python" else "The "
        sample = lm.generate(
            args.prompt or prompt,
            max_length=args.sequence_length,
            stop_token_ids=None,
        )
        if run.writes:
            lm.save(run.path / "model.keras")
    loss = conclude(run, monitor, losses, sample)
    if run.writes:
        if args.save == "none":
            # What it went on from, if it was stopped: a full state each.
            shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        report(run, args, loss, sample)


if __name__ == "__main__":
    main()
