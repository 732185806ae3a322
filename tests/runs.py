"""Run directories that nobody trained, as the recipes and sweeps leave them."""

import json
import shutil
from pathlib import Path

import numpy as np

from keras_stable.events import Event
from keras_stable.health import HealthWriter
from keras_stable.records import write_json

VERSIONS = {"python": "3.11.7", "keras": "3.15.1", "numpy": "2.4.6"}
HEADS = ("max_logit", "max_logit_capped", "entropy")
TENSORS = ("l2", "rms", "abs_max", "mean", "kurtosis", "nonfinite")
VARIABLES = ("gradient_rms", "update_rms", "weight_rms", "staleness")
LINEAR = ("attention/query", "attention/key", "attention/value")
LINEAR += ("attention/output", "mlp/fc1", "mlp/fc2")


def layout(layers, heads):
    names = [f"block_{i}/{x}" for i in range(layers) for x in LINEAR]
    return {
        "schema": 2,
        "tensors": ["token_embedding", *names, "token_embedding/head"],
        "heads": {f"block_{i}/attention": heads for i in range(layers)},
        "variables": [f"{name}/kernel" for name in names],
        "labels": {f"block_{i}/attention": "all" for i in range(layers)},
        "unreachable": [],
        "tensor_statistics": list(TENSORS),
        "head_statistics": list(HEADS),
        "variable_statistics": list(VARIABLES),
    }


def make_run(
    path,
    variant="baseline",
    rate=1e-3,
    seed=0,
    steps=60,
    layers=2,
    heads=2,
    every=20,
    diverges=False,
    status=None,
    validation=None,
    config=(),
    **record,
):
    """Writes a run directory.

    The loss falls from 5.5 as 1 / step and, if it `diverges`, rises from the
    middle on; output norms are 1 + rate * step of Proj, 1 elsewhere.
    """
    path = Path(path)
    noise = np.random.default_rng([seed, int(rate * 1e6)])
    time = np.arange(1, steps + 1)
    losses = 2 + 3.5 / time**0.3 + 0.02 * noise.standard_normal(steps)
    if diverges:
        losses += np.where(time > steps / 2, 3.0, 0.0)
    writer = HealthWriter(path)
    names = layout(layers, heads)
    writer.write("layout", **names)
    for step, loss in zip(time.tolist(), losses.tolist()):
        logit = 5 + rate * step
        numbers = {"gradient_norm": 1 + 1 / step, "update_norm": rate}
        writer.write("step", step=step, loss=loss, max_logit=logit, **numbers)
        if step % every == 1:
            proj = [1 + rate * step * ("output" in x) for x in names["tensors"]]
            tensors = np.ones((len(proj), len(TENSORS)))
            tensors[:, 0] = proj
            head = [np.full((len(HEADS), heads), logit)] * layers
            for table in head:
                table[2] = 0.5
            variables = np.full((len(names["variables"]), 4), 1e-2)
            variables[:, 1] = 1e-5
            tables = {"tensors": tensors, "heads": head, "variables": variables}
            writer.write("table", step=step, **tables)
    if diverges:
        step = steps * 2 // 3
        event = Event(step, step - 5, "spike", "loss", 5.0, "loss is high")
        writer.write("event", **vars(event))
        writer.write("verdict", step=step, verdict="DIVERGED")
    writer.close()
    loss = float(losses[-20:].mean()) if validation is None else validation
    flags = {"variant": variant, "learning_rate": rate, "seed": seed}
    flags |= {"steps": steps, "batch_size": 8, "sequence_length": 64}
    flags |= {"data": ["python"], "tokenizer": "byte", **dict(config)}
    write_json(
        path / "run.json",
        {
            "schema": 2,
            "status": status or ("diverged" if diverges else "finished"),
            "config": flags,
            "backend": "jax",
            "device": "cpu x 1",
            "versions": VERSIONS,
            "git_commit": "0" * 40,
            "command": "python recipes/pretrain.py",
            "started": "2026-01-01T00:00:00+00:00",
            "parameters": 1000,
            "corpus": {"unigram_entropy": 4.9, "training_tokens": 10**6},
            "verdict": "DIVERGED" if diverges else "OK",
            "worst_verdict": "DIVERGED" if diverges else "OK",
            "steps_done": steps,
            "validation_loss": loss,
            "perplexity": float(np.exp(loss)),
            **record,
        },
    )
    return path


def make_sweep(path, variants, rates, seeds, edge=4e-2, **more):
    """Runs that diverge above `edge`, twice that with `qk_norm` in the name."""
    for variant in variants:
        limit = edge * (2 if "qk" in variant else 1)
        for rate in rates:
            for seed in seeds:
                run = Path(path) / variant / f"lr-{rate:g}" / f"seed-{seed}"
                lost = rate > limit
                make_run(run, variant, rate, seed, diverges=lost, **more)
    return Path(path)


def copy_run(source, path, **config):
    """Another run with the same curves: quicker than to make one."""
    shutil.copytree(source, path)
    record = json.loads((path / "run.json").read_text())
    record["config"] |= config
    write_json(path / "run.json", record)
    return path
