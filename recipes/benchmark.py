r"""How fast a training step is, beside what a user could pick instead.

Question: what do Keras and this package cost, or gain, against the same model
written by hand, KerasHub's and transformers' GPT-2?
Every row trains in a process of its own, one after the other, on the same
random batches: forward, backward, clip to a global norm of 1, AdamW. After
the warm-up, blocks of steps are timed, each until its last loss is on the
host; the median block counts. Memory is the largest in use on the device; on
CPUs that of the process, libraries included. Rows that fail are recorded.

    python recipes/benchmark.py                                  # "cpu"
    python recipes/benchmark.py --setting h200 --peak-tflops 790 \
        --rows "ours/jax/baseline,ours/torch/baseline,hand/*,kerashub/*"
    python recipes/benchmark.py --sweep length --values 64,128,256 \
        --rows "ours/jax/baseline,hand/jax/baseline"

Writes a JSON file, a plot beside it, and prints a table. The defaults take
about four minutes on two CPU cores.
"""

import argparse
import fnmatch
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np

BACKENDS = ("jax", "torch", "tensorflow")
PEERS = (
    *(
        f"hand/{backend}/{kind}"
        for backend in ("jax", "torch")
        for kind in ("baseline", "qk_norm", "qk_norm_cap")
    ),
    "hand/torch-eager/baseline",
    *(f"kerashub/{backend}/gpt2" for backend in BACKENDS),
    "transformers/torch/gpt2",
)
CPU = {"size": "3m", "sequence_length": 128, "precision": "float32"}
GPU = {"size": "830m", "sequence_length": 2048, "precision": "mixed_bfloat16"}
SETTINGS = {
    "cpu": {**CPU, "vocabulary": 256, "batch_size": 8, "steps": 15},
    "h200": {**GPU, "vocabulary": 50304, "batch_size": 16, "steps": 50},
    # The vocabulary of arXiv 2410.16682.
    "paper": {**GPU, "vocabulary": 256_000, "batch_size": 8, "steps": 50},
}
SWEEPS = {"depth": "num_layers", "width": "hidden_dim"}
SWEEPS |= {"length": "sequence_length", "vocabulary": "vocabulary"}
SWEEPS |= {"remat": "remat"}
# Dense bfloat16 TFLOP/s by their makers; what a card reaches is less.
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L4": 121.0}


def parse(arguments, ks):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows:\n  ours/BACKEND/VARIANT\n  " + "\n  ".join(PEERS),
    )
    add = parser.add_argument
    rows = "ours/*/baseline,hand/*,kerashub/*,transformers/*"
    add("--rows", default=rows, help=f"comma-separated patterns ({rows})")
    add("--reference", help="the row of ratio 1 (the first that succeeds)")
    add("--setting", choices=SETTINGS, default="cpu", help="shapes (cpu)")
    add("--size", choices=ks.SIZES, help="the flags that follow win over it")
    whole = "num-layers num-heads hidden-dim vocabulary batch-size "
    for name in (whole + "sequence-length").split():
        add(f"--{name}", type=int)
    add("--precision", choices=("float32", "mixed_bfloat16"))
    add("--steps", type=int, help="timed steps")
    add("--warmup", type=int, default=5, help="steps before them (5)")
    add("--blocks", type=int, default=5, help="that steps are timed in (5)")
    add("--learning-rate", type=float, default=3e-4, help="(3e-4)")
    text = "what our rows compute twice: none, mlp or block (none)"
    add("--remat", default="none", help=text)
    text = "without the accuracy that KerasHub's models report by default"
    add("--no-metrics", action="store_true", help=text)
    text = "over all devices, of our rows alone; speed and batch are of all, "
    text += "memory is of one (none)"
    add("--distribution", choices=ks.DISTRIBUTIONS, default="none", help=text)
    add("--sweep", choices=SWEEPS)
    add("--values", help="of the sweep, e.g. 2,4,8")
    add("--peak-tflops", type=float, help="of the card, for MFU")
    add("--timeout", type=float, default=1800.0, help="s a row (1800)")
    add("--out", help="result file (runs/benchmark-TIME.json)")
    args = parser.parse_args(arguments)
    if bool(args.sweep) != bool(args.values):
        parser.error("--sweep and --values go together.")
    known = [f"ours/{b}/{v}" for b in BACKENDS for v in ks.VARIANTS]
    known += PEERS
    rows = []
    for pattern in args.rows.split(","):
        found = fnmatch.filter(known, pattern.strip())
        if not found:
            parser.error(f"no row is named {pattern!r}: see --help.")
        rows += [row for row in found if row not in rows]
    alone = [row for row in rows if not row.startswith("ours/")]
    for flag in ("distribution", "remat"):
        if alone and (getattr(args, flag) != "none" or args.sweep == flag):
            parser.error(f"--{flag} is of our rows, not of {alone[0]!r}.")
    return args, rows, configurations(args, ks)


def configurations(args, ks):
    """Shapes of the runs: one, or one for each value of the sweep."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    config = {**SETTINGS[args.setting], **given}
    config = {**ks.SIZES[config["size"]], **config}
    names = "num_layers num_heads hidden_dim vocabulary batch_size precision "
    names += "sequence_length steps warmup blocks learning_rate no_metrics "
    names += "distribution remat"
    config = {name: config[name] for name in names.split()}
    if not args.sweep:
        return [config]
    swept = SWEEPS[args.sweep]
    kind = str if args.sweep == "remat" else int
    found = [{**config, swept: kind(v)} for v in args.values.split(",")]
    for one in found if args.sweep == "width" else []:
        # Wider models have more heads, not wider ones.
        head_dim = config["hidden_dim"] // config["num_heads"]
        one["num_heads"] = max(one["hidden_dim"] // head_dim, 1)
    return found


def stopwatch(config):
    """Steps that are waited for, `tick(step, loss)` for each, the report."""
    block = max(config["steps"] // config["blocks"], 1)
    first, marks = max(config["warmup"], 1), {}
    ends = [first + block * i for i in range(config["blocks"] + 1)]

    def tick(step, loss=None):
        if step in (0, 1, *ends):
            if loss is not None:
                float(loss)  # Waits until the step is done.
            marks[step] = time.perf_counter()

    def report():
        times = [marks[step] for step in ends]
        spans = [1e3 * (b - a) / block for a, b in zip(times, times[1:])]
        found = {"milliseconds": statistics.median(spans), "blocks": spans}
        return {**found, "first_step_seconds": marks[1] - marks[0]}

    return (1, *ends), tick, report


def build(library, kind, config, keras, ks):
    """A compiled Keras model."""
    shapes = {k: config[k] for k in ("num_layers", "num_heads", "hidden_dim")}
    shapes["intermediate_dim"] = 4 * config["hidden_dim"]
    shapes["max_sequence_length"] = config["sequence_length"]
    optimizer = ks.AdamW(config["learning_rate"])
    V = config["vocabulary"]
    if library == "ours":
        shapes["remat"] = config["remat"]
        model = ks.StableCausalLM.from_size("1m", V, kind, **shapes)
    else:
        import keras_hub

        backbone = keras_hub.models.GPT2Backbone(V, dropout=0.0, **shapes)
        model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
        keep = (
            "learning_rate weight_decay beta_1 beta_2 epsilon global_clipnorm"
        )
        ours = optimizer.get_config()
        optimizer = keras.optimizers.AdamW(**{k: ours[k] for k in keep.split()})
    how = {"weighted_metrics": None} if config["no_metrics"] else {}
    model.compile(optimizer, **how)
    return model


def fit(model, data, ends, tick, keras):
    """Trains through `fit`; parameters, those of products, last loss."""
    done = {step: threading.Event() for step in ends}

    def end(batch, logs):
        # `logs` are numbers by now.
        if batch + 1 in done:
            done[batch + 1].set()

    def begin(batch, logs):
        if batch in done:
            done[batch].wait()
            tick(batch)

    hooks = {"on_train_batch_begin": begin, "on_train_batch_end": end}
    hook = keras.callbacks.LambdaCallback(**hooks)
    # Keras then reads the logs in a thread, as it does without callbacks,
    # instead of waiting for every step. We wait for those at blocks' ends.
    hook.async_safe = True
    tick(0)
    model.fit(data[: len(data) - 1], callbacks=[hook], verbose=0)
    # `fit` reports the mean of its steps: of one step, that step's loss.
    history = model.fit(data[len(data) - 1 :], verbose=0).history
    kernels = [w for w in model.trainable_weights if w.name == "kernel"]
    products = sum(math.prod(w.shape) for w in kernels)
    return model.count_params(), products, history["loss"][0]


def with_mask(batch):
    return {**batch[0], "padding_mask": np.ones_like(batch[1])}, batch[1]


def measure(row, config, watch=stopwatch):
    """Everything about one row; in its own process."""
    library, place, kind = row.split("/")
    import keras

    import keras_stable as ks

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(config["precision"])
    ends, tick, report = watch(config)
    B, T = (config[name] for name in ("batch_size", "sequence_length"))
    V, D = config["vocabulary"], config["hidden_dim"]
    ks.set_distribution(config["distribution"], B)
    # 64 different batches at most. Two steps more than are timed: `fit` marks
    # a step when the next one begins, and the last step gives the loss.
    steps = ends[-1] + 2
    size = (min(steps, 64) + 1) * B * T + 1
    tokens = np.random.default_rng(0).integers(0, V, size, dtype="uint32")
    data = ks.TokenBatches(tokens, B, T).repeat()[:steps]
    if library in ("hand", "transformers"):
        peer = importlib.import_module(f"peer_{place.partition('-')[0]}")
        batches = [data[i] for i in range(steps)]
        batches = [(x["token_ids"], y) for x, y in batches]
        parameters, loss = peer.train(config, row, batches, tick)
        products = 12 * config["num_layers"] * D**2
    else:
        model = build(library, kind, config, keras, ks)
        data = data if library == "ours" else data.map(with_mask)
        parameters, products, loss = fit(model, data, ends, tick, keras)
    attention = 6 * T * D * config["num_layers"]
    times, peak = report(), ks.peak_memory()
    if peak is None:
        import resource  # In kilobytes, on Linux.

        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    environment = ks.environment()
    if library == "transformers":
        version = importlib.metadata.version(library)
        environment["versions"][library] = version
    return {
        **times,
        "tokens_per_second": 1e3 * B * T / times["milliseconds"],
        "peak_bytes": peak,
        "loss": loss if math.isfinite(loss) else str(loss),
        "parameters": parameters,
        # Three times the forward pass; the causal half of attention.
        "flops_per_step": (6 * (products + V * D) + attention) * B * T,
        "environment": environment,
    }


def child(row, config, out):
    """What a row's own process does."""
    try:
        result = measure(row, json.loads(config))
    except Exception as error:
        traceback.print_exc()
        text = traceback.format_exception_only(error)[-1]
        result = {"error": text.splitlines()[0][:300]}
    # Of several processes on torch, the first.
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(result))


def run(row, config, timeout, script=__file__):
    """What `measure` returns, or what went wrong."""
    backend = row.split("/")[1].partition("-")[0]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "2",
            # First steps compile, whoever ran before.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
            "TRITON_CACHE_DIR": str(Path(folder, "triton")),
        }
        child = [script, "--child", row, json.dumps(config), str(out)]
        if backend == "torch" and config["distribution"] != "none":
            # A process for each device.
            flags = ["--standalone", "--nproc-per-node", "auto"]
            child = ["-m", "torch.distributed.run", *flags, *child]
        command = [sys.executable, *child]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {timeout:g} s"}
        if out.exists():
            return json.loads(out.read_text())
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return {"error": f"ended with {done.returncode}: {' '.join(last)}"[:300]}


def add_mfu(entry, precision, peak):
    if peak is None and precision == "mixed_bfloat16":
        known = [PEAKS[x] for x in entry["device"].split() if x in PEAKS]
        peak = known[0] if known else None
    entry["peak_tflops"] = peak
    if peak is not None:
        flops = entry["flops_per_step"] / (1e-3 * entry["milliseconds"])
        shared = entry["shapes"]["distribution"] != "none"
        devices = int(entry["device"].rpartition(" x ")[2]) if shared else 1
        entry["mfu"] = flops / (1e12 * peak * devices)


def table(result):
    """The Markdown table; ratios of tokens/s to the reference's."""
    sweep, reference = result["sweep"], result["reference"]
    heads = f"ms/step|tokens/s|ratio to {reference}|MFU|peak GB|first step s|"
    heads = ["row", *([sweep] if sweep else []), *(heads + "loss").split("|")]
    lines = [heads, ["---"] * len(heads)]
    one = {
        entry["value"]: entry.get("tokens_per_second")
        for entry in result["rows"]
        if entry["row"] == reference
    }
    for entry in result["rows"]:
        line = [entry["row"], *([str(entry["value"])] if sweep else [])]
        if "error" in entry:
            line += ["failed: " + entry["error"].replace("|", "/")]
        else:
            speed, other = entry["tokens_per_second"], one.get(entry["value"])
            line += [f"{entry['milliseconds']:.1f}", f"{speed:,.0f}"]
            line += [f"{speed / other:.2f}" if other else ""]
            line += [f"{entry['mfu']:.1%}" if "mfu" in entry else ""]
            line += [f"{entry['peak_bytes'] / 1e9:.2f}"]
            line += [f"{entry['first_step_seconds']:.1f}"]
            line += [f"{float(entry['loss']):.4f}"]
        lines.append(line + [""] * (len(heads) - len(line)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(result, path):
    """Speed and memory: bars, or lines over the values of a sweep."""
    # Not pyplot's: drawn by Agg, whatever display there is.
    from matplotlib.figure import Figure

    good = [entry for entry in result["rows"] if "error" not in entry]
    names = list(dict.fromkeys(entry["row"] for entry in good))
    sweep = result["sweep"]
    height = 4.5 if sweep else 1.5 + 0.35 * len(names)
    figure = Figure(figsize=(11, height), layout="tight")
    axes = figure.subplots(1, 2, sharey=not sweep)
    what = ("tokens/s", "tokens_per_second", 1), ("peak GB", "peak_bytes", 1e9)
    for axis, (label, key, unit) in zip(axes, what):
        for name in names if sweep else names[::-1]:
            entries = [entry for entry in good if entry["row"] == name]
            y = [entry[key] / unit for entry in entries]
            if sweep:
                x = [entry["value"] for entry in entries]
                axis.plot(x, y, marker="o", label=name)
                axis.set(xlabel=sweep, ylabel=label, ylim=(0, None))
                axis.legend(fontsize="small")
            else:
                axis.barh(name, y)
                axis.set(xlabel=label)
    figure.suptitle(result["hardware"])
    figure.savefig(path, dpi=150)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--child"]:
        return child(*arguments[1:])
    installed = filter(importlib.util.find_spec, BACKENDS)
    # Imported here for names alone: no device is touched.
    os.environ.setdefault("KERAS_BACKEND", next(installed, "jax"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras_stable as ks

    args, names, configs = parse(arguments, ks)
    out = Path(args.out or time.strftime("runs/benchmark-%Y%m%d-%H%M%S.json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "schema": 1,
        "command": shlex.join(["python", "recipes/benchmark.py", *arguments]),
        **{"git_commit": None, "versions": {}, "hardware": None},
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        **{"sweep": args.sweep, "reference": args.reference, "rows": []},
    }
    for config in configs:
        for name in names:
            entry = {"row": name, "value": config.get(SWEEPS.get(args.sweep))}
            entry |= {"shapes": config, **run(name, config, args.timeout)}
            result["rows"].append(entry)
            note = entry.get("error")
            if note is None:
                note = f"{entry['milliseconds']:.1f} ms a step"
                where = entry.pop("environment")
                entry["device"] = where["device"]
                add_mfu(entry, config["precision"], args.peak_tflops)
                result["reference"] = result["reference"] or name
                result["hardware"] = result["hardware"] or where["device"]
                result["git_commit"] = where["git_commit"]
                result["versions"] |= where["versions"]
            print(f"{name:32} {entry['value'] or '':8} {note}", flush=True)
            # After every row: the next may take the machine down.
            out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\n{out}")
    if result["hardware"] is None:
        sys.exit("benchmark: no row succeeded.")
    plot(result, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
