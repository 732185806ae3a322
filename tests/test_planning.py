"""Plans against the models and steps that they stand for."""

import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import backend
from keras_stable import planning

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.append(str(RECIPES))  # What `python recipes/...` has by itself.
recipe = importlib.import_module("plan")
V, B, T = 32, 8, 16
SHAPES = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16}
SHAPES |= {"intermediate_dim": 64}

if keras.backend.backend() != "jax":
    pytest.skip("plans are made with jax", allow_module_level=True)

import jax  # noqa: E402


def build(variant="qk_norm_cap", **shapes):
    shapes = {**SHAPES, **shapes}
    lm = ks.StableCausalLM.from_size("1m", V, variant, **shapes)
    lm.compile(ks.AdamW(ks.WarmupSchedule(1e-2, total_steps=9)))
    return lm


def batch():
    rng = np.random.default_rng(0)
    ids, y = rng.integers(0, V, (2, B, T)).astype("int32")
    return {"token_ids": ids}, y


def on_first_device(variables):
    """Bytes of real values that the first device holds."""
    return sum(v.value.addressable_shards[0].data.nbytes for v in variables)


DISTRIBUTIONS = [
    ("data", None),
    ("fsdp", None),
    ("tensor", 2),
    ("fsdp+tensor", 2),
]


@pytest.fixture(scope="module")
def plans():
    return {
        name: ks.plan(build, B, T, "cpu:4", name, parallel, monitor=False)
        for name, parallel in DISTRIBUTIONS
    }


@pytest.mark.parametrize("name, parallel", DISTRIBUTIONS)
def test_memory_is_that_of_the_real_model(name, parallel, plans):
    ks.set_distribution(name, B, parallel, jax.devices()[:4])
    lm = build()
    lm.fit(*batch(), batch_size=B, verbose=0)
    memory = plans[name]["memory"]
    weights = on_first_device(lm.trainable_variables)
    assert memory["weights"] == weights
    assert memory["optimizer"] == on_first_device(lm.optimizer.variables)
    rows = B // plans[name]["mesh"]["batch"]
    assert memory["batch"] == 2 * 4 * rows * T
    assert plans[name]["parameters"] == lm.count_params()
    parts = [v for k, v in memory.items() if k != "total"]
    assert memory["total"] == sum(parts) > weights
    assert abs(memory["padding"]) < 100  # There are no tiles on CPUs.


def test_more_devices_hold_less_each(plans):
    weights = {name: plans[name]["memory"]["weights"] for name in plans}
    assert weights["fsdp"] < 0.5 * weights["data"]
    assert weights["tensor"] < 0.7 * weights["data"]
    assert weights["fsdp+tensor"] < weights["tensor"]


@pytest.mark.parametrize(
    "monitored", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_the_program_is_the_one_that_fit_compiles(monitored, monkeypatch):
    """Line by line, but for where the source was."""
    texts = []
    original = backend.compile_step

    def compile_step(*args):
        found = original(*args)
        texts.append(found["text"])
        return found

    monkeypatch.setattr(backend, "compile_step", compile_step)
    ks.plan(build, B, T, "cpu:4", "fsdp+tensor", 2, monitor=monitored)

    ks.set_distribution("fsdp+tensor", B, 2, jax.devices()[:4])
    lm = build()
    watched = ks.watch(lm) if monitored else None
    real = []
    make = lm._make_function

    def make_function(step, *args, **kwargs):
        def run(state, data):
            real.append(step.lower(state, data).compile().as_text())
            return step(state, data)

        return make(run, *args, **kwargs)

    lm._make_function = make_function
    lm.fit(*batch(), batch_size=B, verbose=0)
    assert watched is None or watched.read()[-1].tensors.size

    def bare(text):
        lines = text.splitlines()
        first = next(i for i, x in enumerate(lines) if "%" in x and "{" in x)
        return [line.split(", metadata=")[0] for line in lines[first:]]

    assert len(texts) == len(real) == 1
    assert bare(texts[0]) == bare(real[0])


def test_collectives_are_those_of_the_distribution(plans):
    def moved(name, kind):
        return sum(
            one["bytes"]
            for one in plans[name]["collectives"]
            if one["kind"] == kind
        )

    weights = plans["data"]["memory"]["weights"]
    matrices = 4 * (2 * 12 * 16**2 + 2 * V * 16)
    assert matrices < weights
    # Each gradient is reduced once, in float32; no weight is gathered.
    assert weights <= moved("data", "all-reduce") < 1.5 * weights
    assert moved("data", "all-gather") < 0.2 * weights
    # Matrices are gathered for the forward pass, at least.
    assert moved("fsdp", "all-gather") >= matrices


def test_flops_are_those_of_the_formula():
    """Of products; computed again where a block is."""
    kernels = 2 * 12 * 16**2
    products = 3 * B * T * 2 * (kernels + V * 16)
    # A query sees (T + 1) / 2 keys of the T that are computed.
    attention = 3 * B * T * 4 * 2 * 16
    found = ks.plan(build, B, T, "cpu:1", "none", monitor=False)
    assert found["devices"] == 1
    needed = products + attention * (T + 1) / 2
    assert found["model_flops"] == pytest.approx(needed)
    whole = products + attention * T
    # The compiler multiplies by ones, and leaves products of one row out.
    assert found["flops"] == pytest.approx(whole, rel=0.1)
    again = ks.plan(
        lambda: build(remat="block"), B, T, "cpu:1", "none", monitor=False
    )
    once = 2 * B * T * 2 * kernels / 2 + 2 * attention * T / 6
    assert again["flops"] > found["flops"] + 0.7 * once
    assert again["model_flops"] == found["model_flops"]


def test_windows_need_fewer_operations():
    lm = build("gemma2")
    windows = [
        block.attention.variant.architecture.sliding_window
        for block in lm.backbone.transformer_layers
    ]
    assert windows == [4096, None]
    lengths = np.arange(10_000)
    seen = [np.minimum(lengths + 1, w or 1e9).mean() for w in windows]
    kernels = [w for w in lm.trainable_weights if w.name == "kernel"]
    kernels = sum(math.prod(w.shape) for w in kernels)
    needed = 2 * (kernels + V * 16) + 4 * 16 * sum(seen)
    found = planning.model_flops(lm, 3, len(lengths))
    assert found == pytest.approx(3 * 3 * len(lengths) * needed)


def test_a_model_of_any_size_takes_no_memory():
    before = sum(x.nbytes for x in jax.live_arrays())
    ids = np.broadcast_to(np.int32(0), (8, T))
    ks.set_distribution("fsdp", 8)
    shapes = backend.shapes_of(({"token_ids": ids}, ids))

    def large():
        lm = ks.StableCausalLM.from_size("8b", num_layers=2)
        lm.compile(ks.AdamW())
        return lm

    lm = backend.without_weights(large, shapes)
    assert sum(math.prod(w.shape) for w in lm.weights) > 2e9
    after = sum(x.nbytes for x in jax.live_arrays())
    assert after - before < 1e6


def test_models_made_afterwards_have_weights():
    ks.plan(build, B, T, "cpu:4", "fsdp")
    assert keras.distribution.distribution() is None
    lm = build()
    lm.fit(*batch(), batch_size=B, verbose=0)
    assert all(isinstance(w.value, jax.Array) for w in lm.weights)


@pytest.mark.parametrize("topology", ["cpu:99", "cpu:x", "v5e:banana", "tpu"])
def test_unknown_topologies_are_named(topology):
    with pytest.raises(ValueError, match=topology):
        ks.plan(build, B, T, topology)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of the 4 devices"):
        ks.plan(build, 6, T, "cpu:4", "fsdp")
    assert keras.distribution.distribution() is None


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("largest", [0, 1, 5, 37, 1000])
def test_the_largest_batch_is_found_in_few_tries(largest, tells):
    rng = np.random.default_rng(largest)
    tried = []

    def make(size):
        assert size % 4 == 0 and size not in tried
        tried.append(size)
        # Not quite linear; the compiler's own limit.
        needed = 100 + size // 4 + rng.random() * 0.4
        if size // 4 > largest:
            raise MemoryError("no", *([needed] if tells else []))
        return {"memory": {"total": needed}, "batch_size": size}

    size, found = ks.largest_batch(
        make, 4, 100.5 + largest, lambda *args: None, limit=2**14
    )
    assert size == 4 * largest
    assert found is None if largest == 0 else found["batch_size"] == size
    assert len(tried) < 25


def test_times_are_those_of_the_links():
    chip = planning.Chip(1.0, 1.0, 1.0, link_bandwidth=8.0, ring=4)
    # A ring of 4, and a line of 2.
    places = [(x, y, 0) for x in range(4) for y in range(2)]

    def seconds(kind, devices):
        one = {"kind": kind, "bytes": 64.0}
        return planning._send_seconds(one, devices, chip, places)

    ring, line = [0, 2, 4, 6], [0, 1]
    assert seconds("all-gather", ring) == 64 * 3 / 4 / 8
    assert seconds("reduce-scatter", line) == 64 / 2 / 4
    assert seconds("all-reduce", ring) == 2 * 64 * 3 / 4 / 8
    assert seconds("all-gather", []) == 64 * 7 / 8 / (8 + 4)
    assert seconds("collective-permute", line) == 64 / 4
    assert seconds("all-reduce", [3]) == 0
    # Two of a ring of four are a line.
    assert seconds("all-gather", [0, 2]) == 64 / 2 / 4


def test_recipe_writes_a_plan(tmp_path, capsys):
    out = tmp_path / "new" / "plan.json"
    flags = "--size 1m --topology cpu:4 --vocabulary 32 --num-layers 1 "
    flags += "--sequence-length 16 --distribution fsdp+tensor "
    flags += f"--tensor-parallel 2 --precision float32 --out {out}"
    recipe.main(flags.split())
    text = capsys.readouterr().out
    assert "weights" in text and "all-gather of 2" in text
    result = json.loads(out.read_text())
    assert result["plan"]["mesh"] == {"batch": 2, "model": 2}
    assert flags in result["command"] and result["versions"]["jax"]
    recipe.main(["--table", str(out)])
    assert "| cpu:4 | 2 x 2 | 4 x 16 |" in capsys.readouterr().out


def test_recipe_says_what_is_amiss(capsys):
    for flags, text in {
        "--topology cpu:77 --size 1m": "cpu:77",
        "--topology cpu:4 --size 1m --batch-size 3": "multiple of",
        "--topology cpu:4 --size 1m --largest-batch": "--memory-gib",
        "--topology cpu:4 --size 1q": "1q",
    }.items():
        with pytest.raises(SystemExit, match=text):
            recipe.main(flags.split())


@pytest.mark.slow
def test_recipe_finds_the_largest_batch(tmp_path):
    out = tmp_path / "plan.json"
    flags = "--size 1m --topology cpu:2 --vocabulary 32 --num-layers 1 "
    flags += "--sequence-length 16 --precision float32 --no-monitor "
    recipe.main([*flags.split(), "--batch-size", "6", "--out", str(out)])
    needed = json.loads(out.read_text())["plan"]["memory"]["total"]
    flags += f"--largest-batch --memory-gib {needed / 2**30} --out {out}"
    recipe.main(flags.split())
    result = json.loads(out.read_text())
    assert result["largest_batch"] == result["plan"]["batch_size"] == 6
    assert [6, needed] in result["tries"]


# The tables of the lab book.
WEAK = ("8b-512", "8b-4096-weak")
STRONG = ("8b-512-strong", "8b-4096-strong")


def test_the_lab_book_says_what_the_plans_say():
    book = (RECIPES / "README.md").read_text()

    def load(name):
        return json.loads((RECIPES / "results" / name).read_text())

    for name in ("830m", "8b-512"):
        assert recipe.report(load(f"plan-{name}.json")["plan"]) in book
    for names in (WEAK, STRONG):
        plans = [load(f"plan-{name}.json")["plan"] for name in names]
        assert recipe.table(plans) in book
    for name in ("cpu", "one-chip"):
        total = load(f"plan-830m-{name}.json")["plan"]["memory"]["total"]
        assert f"{total / 1e9:.1f}" in book
    rows = load("speed-h100-jax.json")["rows"]
    (ours,) = [r for r in rows if r["row"] == "ours/jax/baseline"]
    assert f"{ours['peak_bytes'] / 1e9:.1f} GB on an H100" in book


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
@pytest.mark.filterwarnings("ignore")
def test_a_step_compiles_for_tpus():
    keras.config.set_dtype_policy("mixed_bfloat16")

    def large():
        return build(num_layers=1, remat="block")

    found = ks.plan(large, 8, 128, "v5e:2x4", "fsdp")
    assert found["devices"] == 8 and found["seconds"]["compute"] > 0
    assert 0 < found["mfu_serial"] < found["mfu"] < 1
    kinds = {one["kind"] for one in found["collectives"]}
    assert {"all-gather", "all-reduce"} <= kinds
    with pytest.raises(MemoryError) as error:
        # A quick program is one, too.
        how = {"monitor": False, "effort": -1.0}
        ks.plan(large, 8 * 2**16, 128, "v5e:2x4", "data", **how)
    assert error.value.args[1] > error.value.args[2] > 10 * 2**30
