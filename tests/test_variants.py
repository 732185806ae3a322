"""Variants as values: names, defaults, replacement, JSON, errors."""

import dataclasses
import json

import pytest

import keras_stable as ks
from keras_stable import VARIANTS
from keras_stable import variants
from keras_stable.choices import ACTIVATION_KINDS
from keras_stable.choices import NORM_KINDS
from keras_stable.mlp import ACTIVATIONS

# The order of the paper's table (arXiv 2410.16682).
NAMES = (
    "baseline",
    "sigma_reparam",
    "soft_temp",
    "soft_cap",
    "soft_clip",
    "layer_scale",
    "qk_norm",
    "qk_fc_norm",
    "qkv_norm",
    "qk_norm_cap",
)

# What each variant changes, written out: field of the variant, its value.
DIFFERENCES = {
    "baseline": {},
    "sigma_reparam": {
        "reparam": ks.SigmaReparam(
            gamma_init="one",
            targets=(
                "query",
                "key",
                "value",
                "output",
                "gate",
                "fc1",
                "fc2",
            ),
        )
    },
    "soft_temp": {"softmax": ks.Softmax(temperature=0.5)},
    "soft_cap": {"softmax": ks.Softmax(cap=50.0)},
    "soft_clip": {"softmax": ks.Softmax(clip=ks.Clip(zeta=1.03, gamma=-0.03))},
    "layer_scale": {
        "attention": ks.Placement(pre="layer", gain=ks.Learned(1e-4)),
        "mlp": ks.Placement(pre="layer", gain=ks.Learned(1e-4)),
    },
    "qk_norm": {"qkv_norm": ks.QKVNorm(qk="layer")},
    "qk_fc_norm": {
        "qkv_norm": ks.QKVNorm(qk="layer"),
        "attention": ks.Placement(pre="layer", branch="layer"),
        "mlp": ks.Placement(pre="layer", branch="layer"),
    },
    "qkv_norm": {
        "qkv_norm": ks.QKVNorm(qk="layer", v="layer"),
        "attention": ks.Placement(pre=None),
    },
    "qk_norm_cap": {
        "qkv_norm": ks.QKVNorm(qk="layer"),
        "softmax": ks.Softmax(cap=50.0),
    },
}
TEXTS = ("name", "paper", "note", "doubts")


def test_names_in_the_order_of_the_paper():
    assert ks.PAPER == NAMES == tuple(VARIANTS)[:10]
    assert all(name == variant.name for name, variant in VARIANTS.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_differs_from_the_baseline_in_its_method_only(name):
    expected = dataclasses.replace(
        VARIANTS["baseline"],
        **DIFFERENCES[name],
        **{text: getattr(VARIANTS[name], text) for text in TEXTS},
    )
    assert VARIANTS[name] == expected


def test_baseline():
    baseline = VARIANTS["baseline"]
    for placement in (baseline.attention, baseline.mlp):
        assert dataclasses.asdict(placement) == {
            "pre": "layer",
            "inner": None,
            "branch": None,
            "stream": None,
            "skip": 1.0,
            "gain": 1.0,
        }
    # Norms on projections are per head and before RoPE unless said otherwise.
    assert dataclasses.asdict(baseline.qkv_norm) == {
        "qk": None,
        "v": None,
        "scope": "head",
        "order": "before_rope",
    }
    assert dataclasses.asdict(baseline.softmax) == {
        "temperature": 1.0,
        "cap": None,
        "clip": None,
        "entropy": None,
        "logits_dtype": "float32",
    }
    assert baseline.reparam is None and baseline.final_norm == "layer"
    assert baseline.architecture.epsilon == 1e-6


def test_few_fields():
    # One placement and one variant have to fit in a head.
    assert len(dataclasses.fields(ks.Placement)) <= 6
    assert len(dataclasses.fields(ks.Variant)) <= 12


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_has_its_source(name):
    variant = VARIANTS[name]
    first, last = variant.paper.split(".")
    assert first.isdigit() and last.isdigit()
    assert variant.note.endswith(".")
    assert f"| `{name}` | {variant.note} |" in variants.to_markdown()


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name):
    variant = VARIANTS[name]
    text = json.dumps(variant.to_dict())
    assert ks.get_variant(json.loads(text)) == variant
    # In JSON's types already, as Keras compares configurations.
    assert json.loads(text) == variant.to_dict()


def test_json_round_trip_of_choices_that_no_default_has():
    variant = VARIANTS["sigma_reparam"].replace(
        gain=ks.Learned(0.5),
        skip="deepnorm",
        inner="rms",
        clip=ks.Clip(zeta=1.0, alpha=12.0),
        targets=("query", "fc2"),
        output_cap=30.0,
    )
    assert ks.get_variant(json.loads(json.dumps(variant.to_dict()))) == variant


def test_get_returns_a_variant_as_it_is():
    variant = VARIANTS["soft_cap"]
    assert ks.get_variant(variant) is variant
    assert ks.get_variant("soft_cap") is variant


def test_frozen_and_hashable():
    for value in (VARIANTS["qkv_norm"], ks.Placement(), ks.Softmax()):
        field = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)
        hash(value)


# Replacement.

REPLACEMENTS = [
    ("soft_cap", "cap", 30.0, ("softmax",), "soft_cap+cap=30.0"),
    ("qk_norm", "scope", "full", ("qkv_norm",), "qk_norm+scope=full"),
    ("qk_norm", "order", "after_rope", ("qkv_norm",), None),
    # Without scale and bias.
    ("qk_norm", "qk", "layer_plain", ("qkv_norm",), "qk_norm+qk=layer_plain"),
    ("qk_fc_norm", "branch", "rms", ("attention", "mlp"), None),
    (
        "layer_scale",
        "gain",
        ks.Learned(0.1),
        ("attention", "mlp"),
        "layer_scale+gain=(init:0.1)",
    ),
    ("sigma_reparam", "gamma_init", "spectral", ("reparam",), None),
    ("sigma_reparam", "targets", ("query", "key"), ("reparam",), None),
    ("baseline", "activation", "swiglu", ("architecture",), None),
    ("baseline", "temperature", 2.0, ("softmax",), None),
]


@pytest.mark.parametrize("base, field, value, owners, name", REPLACEMENTS)
def test_replace_a_field_of_a_part(base, field, value, owners, name):
    old = VARIANTS[base]
    new = old.replace(**{field: value})
    for owner in owners:
        assert getattr(getattr(new, owner), field) == value
    # Nothing else has changed.
    kept = {owner: getattr(old, owner) for owner in owners}
    assert dataclasses.replace(new, **kept, name=base) == old
    assert new.name == (name or f"{base}+{field}={value}")


def test_replace_a_whole_part_and_a_name():
    new = VARIANTS["baseline"].replace(
        name="mine", softmax=ks.Softmax(cap=5.0), temperature=0.5
    )
    assert new.name == "mine"
    assert new.softmax == ks.Softmax(cap=5.0, temperature=0.5)


def test_replace_keeps_to_the_parts_that_exist():
    with pytest.raises(ValueError, match=r"no `reparam`.*SigmaReparam\(gamm"):
        VARIANTS["baseline"].replace(gamma_init="one")


def test_depth_formulas():
    deep = VARIANTS["baseline"].replace(skip="deepnorm", gain="1/sqrt(2L)")
    eighth = deep.at(8, layer=0)
    for placement in (eighth.attention, eighth.mlp):
        assert placement.skip == 2.0  # (2 * 8) ** (1 / 4)
        assert placement.gain == 0.25  # 1 / sqrt(2 * 8)
    assert eighth.at(3, layer=1) == eighth
    assert VARIANTS["layer_scale"].at(8, 0) == VARIANTS["layer_scale"]


def test_layers_differ_by_cycling():
    gemma = VARIANTS["gemma3"]
    layers = [gemma.at(12, layer=i).architecture for i in range(12)]
    windows = [layer.sliding_window for layer in layers]
    assert windows == [1024] * 5 + [None] + [1024] * 5 + [None]
    # Positions of layers without a window are rotated more slowly.
    for layer in layers:
        far = layer.sliding_window is None
        assert layer.rope_wavelength == (1e6 if far else 1e4)
    assert gemma.at(12, layer=7).at(1, layer=0) == gemma.at(12, layer=7)


def test_a_penalty_is_a_mean_over_layers():
    whole = VARIANTS["entropy_floor"]
    part = whole.at(4, layer=2).softmax.entropy
    assert part.weight == whole.softmax.entropy.weight / 4


# Errors.

SPELLINGS = [
    (lambda: ks.get_variant("qk_nrom"), "variant", "qk_norm"),
    (lambda: ks.get_variant("QKVnorm"), "variant", "qkv_norm"),
    (lambda: VARIANTS["soft_cap"].replace(kap=3), "field of Variant", "cap"),
    (lambda: ks.Placement(pre="layr"), "norm", "layer"),
    (lambda: ks.Placement(skip="deepnrom"), "depth formula", "deepnorm"),
    (lambda: ks.QKVNorm(scope="heads"), "norm scope", "head"),
    (lambda: ks.QKVNorm(order="after rope"), "norm order", "after_rope"),
    (lambda: ks.Softmax(logits_dtype="float23"), "logits dtype", "float32"),
    (lambda: ks.SigmaReparam(gamma_init="once"), "gamma_init", "one"),
    (lambda: ks.SigmaReparam(targets=("querry",)), "linear layer", "query"),
    (lambda: ks.Architecture(activation="swigelu"), "activation", "swiglu"),
    (lambda: ks.Architecture(position="rpoe"), "position", "rope"),
    (lambda: ks.get_variant({"nam": "x"}), "field of Variant", "name"),
    (
        lambda: ks.get_variant({"name": "x", "softmax": {"kap": 3}}),
        "field of Softmax",
        "cap",
    ),
]


@pytest.mark.parametrize("make, what, nearest", SPELLINGS)
def test_errors_name_the_nearest_spelling(make, what, nearest):
    pattern = f"Unknown {what}.*Did you mean '{nearest}'.*Allowed.*Received"
    with pytest.raises(ValueError, match=pattern):
        make()


VALUES = [
    (lambda: ks.Softmax(temperature=0), "temperature.*greater than 0"),
    (lambda: ks.Softmax(cap=-50.0), "cap.*greater than 0"),
    (lambda: ks.Softmax(cap=float("inf")), "cap.*finite"),
    (lambda: ks.Softmax(cap=True), "cap.*number"),
    (lambda: ks.Clip(), "either `gamma` or `alpha`"),
    (lambda: ks.Clip(gamma=-0.03, alpha=12.0), "either `gamma` or `alpha`"),
    (lambda: ks.Clip(gamma=0.03), "at most 0"),
    (lambda: ks.Clip(zeta=0.0, gamma=-0.03), "zeta.*greater than 0"),
    (lambda: ks.Clip(alpha=-1.0), "alpha.*greater than 0"),
    (lambda: ks.Learned(float("nan")), "init.*finite"),
    (lambda: ks.Placement(skip=None), "skip.*number"),
    (lambda: ks.Placement(skip=ks.Learned(1.0)), "skip.*number"),
    (lambda: ks.Architecture(epsilon=0.0), "epsilon.*greater than 0"),
    (lambda: ks.Architecture(output_cap=0.0), "output_cap.*greater than 0"),
    (lambda: VARIANTS["baseline"].replace(final_norm="ln"), "final norm"),
]


@pytest.mark.parametrize("make, pattern", VALUES)
def test_errors_for_bad_values(make, pattern):
    with pytest.raises(ValueError, match=pattern):
        make()


TYPES = [
    (lambda: ks.Softmax(clip=-0.03), "`clip` must be a `Clip`"),
    (lambda: ks.Variant(name="x", mlp="layer"), "`mlp` must be a Placement"),
    (lambda: ks.Variant(name="x", softmax=None), "`softmax` must be a Soft"),
    (lambda: ks.get_variant(3), "name, a Variant or the dictionary.*int"),
]


@pytest.mark.parametrize("make, pattern", TYPES)
def test_errors_for_bad_types(make, pattern):
    with pytest.raises(TypeError, match=pattern):
        make()


# Names that two modules share.


def test_every_named_norm_and_activation_exists():
    assert set(ks.NORMS) == set(NORM_KINDS)
    assert set(ACTIVATIONS) == set(ACTIVATION_KINDS)
