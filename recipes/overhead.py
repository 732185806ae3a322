r"""What the monitor costs: time and memory of a training step.

Question: is training slower, or larger, or different, with the monitor on?
A model trains in epochs of a few steps: without a monitor, with nothing but
the numbers of every step (light), with the monitor's defaults, with those and
the policies "guard" and "recover", with the full table in every step, and
without one again. Medians of the epochs, and means: a copy of the state is made
once in 100 steps. On a CPU, whose speed depends on what else it does, each has
a model and a thread of its own and they take turns, an epoch each: the share is
then the median over rounds of the ratio to the plain ones. Two models of one
mode may differ by more than a mode costs: `--modes plain,guard,guard_again` has
two, whose mean counts. Then a small model trains three times from one seed,
twice without and once with.

    python recipes/overhead.py --out recipes/results/overhead_cpu_jax.json
    python recipes/overhead.py --size 830m --vocabulary 50304 --batch-size 16 \
        --sequence-length 2048 --precision mixed_bfloat16 \
        --out recipes/results/overhead_h200_jax.json

The defaults (three million parameters) take five minutes on two CPU cores.
Expected: at most 2 % by default, 5 % with every table, 1 % of memory.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import os
import statistics
import tempfile
import threading
import time

# `every` of the monitor and its policy; None for no monitor. `NAME_again` is
# another model in that mode.
MODES = {
    "plain": None,
    "light": (10**9, "observe"),
    "default": ("auto", "observe"),
    "guard": ("auto", "guard"),
    "recover": ("auto", "recover"),
    "full": (1, "observe"),
}
AGAIN = "_again"
SETTLE = 60  # Steps that are not timed: "auto" chooses its interval in them.


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", default="3m", help="named size (3m)")
    add("--num-layers", type=int, help="wins over the size's")
    add("--vocabulary", type=int, default=256, help="(256)")
    add("--batch-size", type=int, default=8, help="sequences (8)")
    add("--sequence-length", type=int, default=256, help="(256)")
    add("--variant", default="baseline", help="(baseline)")
    add("--precision", default="float32", help="(float32)")
    add("--steps", type=int, default=10, help="steps in an epoch (10)")
    add("--epochs", type=int, default=12, help="timed epochs (12)")
    add("--modes", default=",".join([*MODES, "plain" + AGAIN]), help="(all)")
    add("--compare", type=int, default=100, help="steps of the small model")
    add("--backend", default=os.environ.get("KERAS_BACKEND", "jax"))
    add("--out", help="result file")
    args = parser.parse_args(arguments)
    names = args.modes.split(",")
    known = [*MODES, *(name + AGAIN for name in MODES)]
    if names[0] != "plain" or len({*names}) < len(names) or {*names} - {*known}:
        parser.error(
            "--modes has plain, beside which all are measured, and then "
            f"others of {', '.join(known)}, each once, not {args.modes}"
        )
    return args


def build(ks, keras, args, size, vocabulary, **sizes):
    keras.utils.set_random_seed(0)
    lm = ks.StableCausalLM.from_size(size, vocabulary, args.variant, **sizes)
    lm.compile(ks.AdamW(1e-4), weighted_metrics=None)
    return lm


def batches(ks, np, vocabulary, *shape):
    size = shape[0] * shape[1] * 16 + 1
    tokens = np.random.default_rng(0).integers(0, vocabulary, size)
    return ks.TokenBatches(tokens, *shape).repeat()


def monitor(ks, mode):
    if mode is None:
        return []
    every, policy = mode
    path = tempfile.mkdtemp()
    return [ks.StabilityMonitor(path, policy, every, verbose=0)]


def turnstile(names):
    """A function to a context in which the others of some threads wait."""
    order, changed = collections.deque(names), threading.Condition()

    @contextlib.contextmanager
    def member(name):
        """Yields what waits for the turn, and what passes it on."""

        def begin():
            with changed:
                changed.wait_for(lambda: order[0] == name)

        def end():
            with changed:
                order.rotate(-1)
                changed.notify_all()

        try:
            yield begin, end
        finally:
            with changed:
                order.remove(name)
                changed.notify_all()

    return member


def timed(ks, keras, lm, data, mode, args, member):
    """Seconds a step in each epoch; the first ones compile and settle."""
    spans, work, since = [], [], []
    observer = monitor(ks, MODES[mode.removesuffix(AGAIN)])
    with member(mode) as (begin_turn, end_turn):

        def begin(epoch, logs=None):
            begin_turn()
            since[:] = time.perf_counter(), time.process_time()

        def end(epoch, logs=None):
            spans.append((time.perf_counter() - since[0]) / args.steps)
            work.append((time.process_time() - since[1]) / args.steps)
            end_turn()

        first = keras.callbacks.LambdaCallback(on_epoch_begin=begin)
        last = keras.callbacks.LambdaCallback(on_epoch_end=end)
        settle = -(-SETTLE // args.steps)
        lm.fit(
            data,
            steps_per_epoch=args.steps,
            epochs=settle + args.epochs,
            verbose=0,
            callbacks=[first, *observer, last],
        )
    first_epoch = spans[0] * args.steps
    spans, work = spans[settle:], work[settle:]
    return {
        "milliseconds": 1e3 * statistics.median(spans),
        "mean_milliseconds": 1e3 * statistics.fmean(spans),
        # Of all threads: what others do on the machine is not in it.
        "processor_milliseconds": 1e3 * statistics.fmean(work),
        "epochs": [1e3 * span for span in spans],
        "first_epoch_seconds": first_epoch,
        "peak_bytes": ks.peak_memory(),
        "monitor": observer[0].overhead if observer else None,
    }


def rounds(modes, name):
    """Seconds of each round in a mode, the mean of its models."""
    both = [modes[m]["epochs"] for m in (name, name + AGAIN) if m in modes]
    return [statistics.fmean(spans) for spans in zip(*both, strict=True)]


def beyond(modes, name, other):
    """Share of a mode beyond another, over rounds: median, standard error."""
    pairs = zip(rounds(modes, name), rounds(modes, other), strict=True)
    shares = [ours / theirs - 1 for ours, theirs in pairs]
    error = statistics.stdev(shares) / len(shares) ** 0.5
    return statistics.median(shares), error


def compare(modes, together):
    """Adds `overhead` to each mode: its share beyond the plain ones."""
    plain = rounds(modes, "plain")
    usual = statistics.median(plain)
    for found in modes.values():
        found["overhead"] = found["milliseconds"] / usual - 1
        if together:
            ratios = [x / y for x, y in zip(found["epochs"], plain)]
            found["overhead"] = statistics.median(ratios) - 1


def differences(ks, keras, np, args):
    """Largest relative difference of weights from those of a plain run."""
    found = {}
    for name in ("plain", "plain_again", "monitored"):
        lm = build(ks, keras, args, "1m", 256)
        lm.fit(
            batches(ks, np, 256, 8, 128),
            steps_per_epoch=args.compare,
            verbose=0,
            callbacks=monitor(
                ks, (1, "observe") if name == "monitored" else None
            ),
        )
        weights = [np.asarray(w, "float64") for w in lm.get_weights()]
        found[name] = np.concatenate([w.ravel() for w in weights])
    size = np.linalg.norm(found["plain"])
    return {
        name: float(np.linalg.norm(value - found["plain"]) / size)
        for name, value in found.items()
    }


def main(arguments=None):
    args = parse(arguments)
    os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import numpy as np

    import keras_stable as ks

    keras.config.set_dtype_policy(args.precision)
    sizes = {"num_layers": args.num_layers} if args.num_layers else {}
    shape = (args.batch_size, args.sequence_length)
    names, modes = args.modes.split(","), {}
    together = ks.environment()["device"].startswith("cpu")
    lm = None
    for group in [names] if together else [[name] for name in names]:
        models = {}
        for name in group:
            if together or lm is None:
                lm = build(ks, keras, args, args.size, args.vocabulary, **sizes)
            models[name] = lm
        member = turnstile(group)
        with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
            found = {
                name: pool.submit(
                    timed,
                    *(ks, keras, models[name]),
                    batches(ks, np, args.vocabulary, *shape),
                    *(name, args, member),
                )
                for name in group
            }
        modes |= {name: future.result() for name, future in found.items()}
        compare(modes, together)
        result = {
            "schema": 1,
            "config": vars(args),
            "parameters": lm.count_params(),
            **ks.environment(),
            "modes": modes,
        }
        # A mode takes minutes: those that are known outlive an interruption.
        if args.out:
            ks.records.write_json(args.out, result, indent=1)
    for name, found in modes.items():
        print(
            f"{name:12} {found['milliseconds']:9.3f} ms a step, "
            f"{found['overhead']:+.2%}, peak {found['peak_bytes']}",
            flush=True,
        )
    if args.compare:
        result["differences"] = differences(ks, keras, np, args)
        print(result["differences"])
        if args.out:
            ks.records.write_json(args.out, result, indent=1)


if __name__ == "__main__":
    main()
