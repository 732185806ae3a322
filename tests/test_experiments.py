"""Experiments: every arm is what its question says, and can be trained."""

import ast
import importlib.util
import json
import math
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import experiments

# Declarations are the same on all backends; where models are built, torch
# alone runs them without compiling.
on_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="no backend takes part"
)
on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="one backend is enough"
)
EXPERIMENTS = ks.EXPERIMENTS
ARMS = [(e, arm) for e in EXPERIMENTS.values() for arm in e.arms]
TEXTS = ("name", "paper", "note", "doubts")

# In what arms of an experiment may differ: fields of their variants, flags.
MAY_DIFFER = {
    "cpu-sensitivity": "attention.pre qkv_norm.qk qkv_norm.v softmax.cap",
    "cap": "softmax.cap qkv_norm.qk",
    "temperature": "softmax.temperature",
    "clip": "softmax.clip",
    "layer-scale": "attention.gain mlp.gain",
    "qkv-factorial": "attention.pre qkv_norm.qk qkv_norm.v",
    "where": "attention.branch mlp.branch qkv_norm.qk qkv_norm.v",
    "placebo": "attention.branch mlp.branch mlp.inner qkv_norm.qk "
    "attention.gain mlp.gain",
    "precision": "qkv_norm.qk softmax.logits_dtype precision",
    "confounds": "qkv_norm.qk beta_2 epsilon warmup_steps weight_decay decay "
    "clip_norm",
    "edges": "attention.pre qkv_norm.v qkv_norm.scope architecture.epsilon "
    "schedule warmup_steps beta_2 weight_decay clip_norm",
    "sizes": "attention.pre qkv_norm.qk qkv_norm.v softmax.cap size",
    "stack": "qkv_norm.qk qkv_norm.v softmax.temperature softmax.cap "
    "softmax.clip attention.gain mlp.gain attention.pre attention.branch "
    "mlp.branch reparam architecture.z_loss",
    "restarts": "qkv_norm.qk cycles peak_decay rewarmup_steps",
}


def function_of(arm):
    """What an arm computes: `{field: value}`, and its flags."""
    flat = dict(arm.flags)
    for name, part in arm.variant.to_dict().items():
        if name in TEXTS:
            continue
        inner = part if isinstance(part, dict) else {"": part}
        for leaf, value in inner.items():
            # A choice that is a value of several fields is one.
            flat[f"{name}.{leaf}".rstrip(".")] = json.dumps(value)
    if arm.variant.reparam is not None:
        flat = {k: v for k, v in flat.items() if not k.startswith("reparam")}
        flat["reparam"] = "given"
    return flat


def pretrain():
    """`recipes/pretrain_flags.py`, which is no package."""
    folder = Path(__file__).parents[1] / "recipes"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(
            "pretrain_flags_of_experiments", folder / "pretrain_flags.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@on_jax
def test_all_that_were_asked_for_are_there():
    assert set(EXPERIMENTS) == {
        *("cpu-sensitivity", "paper-lr", "paper-ppl", "paper-norms", "cap"),
        *("temperature", "clip", "layer-scale", "qkv-factorial", "where"),
        *("placebo", "precision", "confounds", "edges", "sizes", "stack"),
        "restarts",
    }
    for name, experiment in EXPERIMENTS.items():
        assert experiment.name == name
        assert experiment.question.endswith("?") and experiment.why
        assert experiment.search.rates == experiment.rates
        assert len(experiment.seeds) >= (1 if "paper-" in name else 3)
    ten = tuple(arm.label for arm in EXPERIMENTS["paper-lr"].arms)
    assert ten == ks.PAPER
    assert EXPERIMENTS["paper-lr"].rates == ks.LADDERS["paper"]


@on_jax
@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if "paper" not in n])
def test_arms_differ_in_what_the_question_asks_about(name):
    found = [function_of(arm) for arm in EXPERIMENTS[name].arms]
    names = {key for one in found for key in one}
    differ = {key for key in names if len({one.get(key) for one in found}) > 1}
    assert differ == set(MAY_DIFFER[name].split())
    # And no two say the same.
    texts = [json.dumps(one, sort_keys=True) for one in found]
    assert len(set(texts)) == len(texts)


@on_jax
def test_the_factorial_holds_the_methods_that_are_its_cells():
    cells = {arm.label: arm for arm in EXPERIMENTS["qkv-factorial"].arms}
    assert len(cells) == 8
    for label, name in (
        ("pre+none", "baseline"),
        ("pre+qk", "qk_norm"),
        ("bare+qkv", "qkv_norm"),
    ):
        assert function_of(cells[label]) == function_of(ks.Arm(name))
    # The MLP keeps its norm everywhere.
    assert {arm.variant.mlp.pre for arm in cells.values()} == {"layer"}


@on_jax
def test_scans_hold_the_published_values_and_the_baseline():
    for name, published in (
        ("cap", ("soft_cap", "qk_norm_cap", "qk_norm", "baseline")),
        ("temperature", ("soft_temp", "baseline")),
        ("clip", ("soft_clip", "baseline")),
        ("layer-scale", ("layer_scale", "baseline")),
        ("stack", ("baseline", "qk_norm")),
        ("where", ("baseline", "qk_norm")),
    ):
        found = [function_of(arm) for arm in EXPERIMENTS[name].arms]
        for variant in published:
            assert function_of(ks.Arm(variant)) in found, (name, variant)
    caps = {arm.variant.softmax.cap for arm in EXPERIMENTS["cap"].arms}
    assert {5.0, 50.0, None} < caps
    sizes = {arm.flags["size"] for arm in EXPERIMENTS["sizes"].arms}
    assert len(sizes) >= 3 and sizes <= {*ks.SIZES}


@on_jax
def test_every_flag_is_one_of_pretrains():
    flags = pretrain()
    parser = flags.build("", ks)
    known = {action.dest: action for action in parser._actions}
    for experiment, arm in ARMS:
        given = {**experiment.flags, **arm.flags}
        assert set(given) <= set(known), (experiment.name, arm.label)
        words = []
        for name, value in given.items():
            word = f"--{name.replace('_', '-')}"
            words += [word] if value is True else [word, str(value)]
        args = vars(parser.parse_args(words))
        for name, value in given.items():
            found = args[name]
            assert found == value or found == str(value), (name, found)
        ks.check_choice(args["precision"], flags.PRECISIONS, "precision")
        # What `pretrain.py` makes of them.
        assert args["size"] in ks.SIZES
        for rate in experiment.rates:
            names = "cycles peak_decay rewarmup_steps final"
            schedule = ks.WarmupSchedule(
                rate,
                args["steps"],
                warmup_steps=args["warmup_steps"],
                **flags.given(parser.parse_args(words), names),
            )
            assert schedule.peak == rate


@on_jax
def test_growth_experiments_have_a_tenth_of_each_of_their_high_rates():
    rates = EXPERIMENTS["paper-norms"].rates
    tenths = [rate for rate in rates if rate * 10 in rates]
    assert len(tenths) == 2 and len(rates) == 4


@on_jax
def test_the_module_only_declares():
    file = Path(ks.__file__).parent / "experiments.py"
    tree = ast.parse(file.read_text())
    names = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    assert not {"open", "main"} & names


@on_jax
def test_what_is_no_experiment_is_refused():
    arms = (ks.Arm("baseline"),)
    for make, pattern in (
        (lambda: ks.Arm("a/b", "baseline"), "letters, digits.*'a/b'"),
        (lambda: ks.Arm("../x", "baseline"), "letters, digits"),
        (lambda: ks.Arm("qk_nrom"), "Did you mean 'qk_norm'"),
        (lambda: ks.Experiment("x", "?", (), "paper"), "different labels"),
        (lambda: ks.Experiment("x", "?", arms * 2, "paper"), "different label"),
        (lambda: ks.Experiment("x", "?", arms, "papr"), "Unknown ladder"),
        (lambda: ks.Experiment("x", "?", arms, (1e-3, -1.0)), "positive"),
        (lambda: ks.Experiment("x", "?", arms, "paper", (0, 0)), "twice"),
    ):
        with pytest.raises(ValueError, match=pattern):
            make()


def distinct():
    """One arm for each variant that computes something else."""
    found = {}
    for experiment, arm in ARMS:
        bare = ks.Arm(arm.label, arm.variant)
        text = json.dumps(function_of(bare), sort_keys=True)
        found.setdefault(text, (f"{experiment.name}:{arm.label}", arm.variant))
    return [*found.values()]


def tiny(variant):
    backbone = ks.StableBackbone(16, 1, 2, 8, variant=variant, seed=0)
    return ks.StableCausalLM(backbone)


@on_torch
@pytest.mark.parametrize(
    "variant", [v for _, v in distinct()], ids=[n for n, _ in distinct()]
)
def test_every_arm_trains(variant):
    lm = tiny(variant)
    lm.compile(ks.AdamW(1e-2), run_eagerly=True)
    before = [keras.ops.convert_to_numpy(w) for w in lm.trainable_weights]
    y = np.tile(np.arange(16), (2, 1)).astype("int32")
    x = {"token_ids": y, "padding_mask": np.ones_like(y)}
    loss = lm.train_on_batch(x, np.roll(y, -1, 1), return_dict=True)["loss"]
    assert abs(float(loss) - math.log(16)) < 1
    after = [keras.ops.convert_to_numpy(w) for w in lm.trainable_weights]
    assert all(np.isfinite(w).all() for w in after)
    moved = [np.abs(a - b).max() > 0 for a, b in zip(after, before)]
    assert np.mean(moved) > 0.9, [
        w.path for w, m in zip(lm.trainable_weights, moved) if not m
    ]
    again = ks.get_variant(json.loads(json.dumps(variant.to_dict())))
    assert again == variant


@on_torch
def test_placebos_have_the_parameters_of_what_they_stand_for():
    arms = {a.label: a.variant for a in EXPERIMENTS["placebo"].arms}
    counts = {label: tiny(v).count_params() for label, v in arms.items()}
    # One block of width 8 with two heads of 4.
    extra = {k: n - counts["baseline"] for k, n in counts.items()}
    assert extra == {
        "baseline": 0,
        "qk_norm": 2 * 2 * 4,
        "qk_plain": 0,
        "gains": 2 * 8,
        "proj+fc2": 2 * 2 * 8,
        "fc1": 4 * 8,
    }


def test_the_lab_books_table_is_generated():
    book = Path(__file__).parents[1] / "recipes" / "README.md"
    assert experiments.to_markdown() in book.read_text()
