"""Notebooks run top to bottom, at smaller settings than they are stored."""

import dataclasses
import math
import os
import re
from pathlib import Path

import keras
import nbclient
import nbformat
import pytest

from keras_stable import read_health

FOLDER = Path(__file__).parents[1] / "colab"


@dataclasses.dataclass(frozen=True)
class Expected:
    """How a notebook is shrunk, how much it draws, and what it must print."""

    smaller: dict
    images: int
    check: object


def quickstart(printed):
    found = re.findall(r"validation loss (\d+\.\d+)", printed)
    assert len(found) == 2
    # At the start every byte is as likely as any other: log 256 = 5.5.
    assert all(0 < float(loss) < 5.6 for loss in found)
    assert re.search("greedy: 'def .*\\ntop_p: 'def ", printed)
    assert "StableCausalLM, same logits: True" in printed
    (change,) = re.findall(r"on the verse (\S+), then (\S+)", printed)
    assert float(change[1]) < float(change[0])


def watch_any_model(printed):
    diverged, broken = re.findall(r"Training is lost: (.*)", printed)
    assert diverged.startswith("DIVERGED at step ")
    # Two epochs of four batches are over when the kernel gets its NaN.
    assert broken.startswith("NONFINITE at step 9, since step 9: loss is nan")
    assert "first in the forward pass: conv_1" in broken
    assert "-verdict.npz: step, epoch, batch, loss" in printed
    (runs,) = re.findall(r"records in (\S+)", printed)
    health = {p.name: read_health(p) for p in Path(runs).iterdir()}
    assert set(health) == {"gpt2", "classifier", "ramp", "nan"}
    attention = "transformer_layer_0/self_attention"
    linear = [f"{attention}/{x}" for x in ("query", "key", "value")]
    for run in ("gpt2", "ramp"):
        layout = health[run].layout
        assert set(linear) < set(layout["tensors"])
        assert layout["tensors"][-1] == "token_embedding/head"
        assert layout["heads"] == {attention: 4}
        assert len(health[run].tables) > 1
    layers = ["conv_0", "conv_1", "conv_2", "directions"]
    for run in ("classifier", "nan"):
        layout = health[run].layout
        assert layout["tensors"] == layers
        assert {f"{x}/kernel" for x in layers} < set(layout["variables"])
        assert not layout["heads"]
    assert len(health["gpt2"].steps) == 6
    assert len(health["classifier"].steps) == 4


def find_the_edge(printed):
    for variant in ("baseline", "qk_norm"):
        found = re.findall(
            rf"{variant}: stable (.+), LR sens.* ([\d.]+)", printed
        )
        # After ten steps a model is no better than counting: all are lost.
        assert [interval for interval, _ in found] == ["below 0.001 (0/1)"]
        wanted = rf"{variant}: \d+ wanted next, 0\.00\S+ with seed \d"
        assert re.search(wanted, printed)
    assert "edge of qk_norm / edge of baseline: 0 to inf" in printed
    assert re.search(r"report\.html, \d\.\d MB", printed)


def break_it_and_save_it(printed):
    losses = re.findall(r"(\w+): validation loss (\S+), (\d+) steps", printed)
    found = {name: (float(loss), int(steps)) for name, loss, steps in losses}
    assert set(found) == {"clean", "lost", "halted", "recovered", "mended"}
    assert math.isnan(found["lost"][0]) and found["halted"][1] == 21
    for name in ("clean", "recovered", "mended"):
        assert 0 < found[name][0] < 5.6
    assert "Training is lost: NONFINITE at step 21" in printed
    assert "BAD_DATA: loss of batch 20 at step 21: nan" in printed
    assert "BAD_STATE: loss of batch 29 at step 30: nan" in printed
    assert '{"first": 0, "last": 220,' in printed


NOTEBOOKS = {
    "break_it_and_save_it": Expected(
        {
            "700, 400, 560": "40, 20, 30",
            "2, 2, 64": "1, 2, 16",
            "16, 64": "4, 16",
        },
        1,
        break_it_and_save_it,
    ),
    "find_the_edge": Expected(
        {
            # One rate: each run is a process, which takes its time.
            "1e-3, 3e-3, 1e-2, 3e-2, 1e-1": "1e-3",
            "--steps 400": "--steps 10 --warmup-steps 2 --num-layers 1 "
            "--hidden-dim 16 --validation-tokens 2000",
        },
        1,
        find_the_edge,
    ),
    "quickstart": Expected(
        {"STEPS = 300": "STEPS = 6", "8, 128": "4, 16"}, 1, quickstart
    ),
    "watch_any_model": Expected(
        {
            "STEPS, LEARNING_RATE = 200": "STEPS, LEARNING_RATE = 6",
            "4, 4, 64": "1, 4, 16",
            "16, 64": "4, 16",
            "DOUBLING = 16": "DOUBLING = 7",
            "4096, 3": "128, 1",
        },
        7,
        watch_any_model,
    ),
}


def test_every_notebook_is_tested():
    assert set(NOTEBOOKS) == {path.stem for path in FOLDER.glob("*.ipynb")}


# Each takes a minute: they run on one backend alone, unless all tests do.
ALONE = {
    "quickstart": "jax",
    "find_the_edge": "jax",
    "break_it_and_save_it": "torch",
    "watch_any_model": "tensorflow",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[]
            if ALONE[name] == keras.backend.backend()
            else [pytest.mark.slow],
        )
        for name in NOTEBOOKS
    ],
)
def test_runs_top_to_bottom(name, monkeypatch, tmp_path):
    if name == "find_the_edge" and keras.backend.backend() != "jax":
        pytest.skip("processes of the recipes, which are tested with each")
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    monkeypatch.setenv(
        "MPLBACKEND", "module://matplotlib_inline.backend_inline"
    )
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
    expected = NOTEBOOKS[name]
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs for c in code)
    assert "KERAS_BACKEND" in code[0].source
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", ())]
    (settings,) = tagged
    for large, small in expected.smaller.items():
        assert large in settings.source
        settings.source = settings.source.replace(large, small)
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": os.fspath(FOLDER)}},
    ).execute()
    outputs = [o for c in code for o in c.outputs]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(images) == expected.images
    expected.check("".join(o.get("text", "") for o in outputs))
