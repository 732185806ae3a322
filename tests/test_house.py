"""The architecture itself: who may import whom, and how large things grow."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

import keras_stable as ks
from keras_stable import variants

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "keras_stable"
SOURCES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))

# Recipes that are what one would write by hand, and their profiler.
PEERS = ("peer_", "profile_")

# Floors of the house: a module imports from lower floors only.
FLOORS = [
    {
        *{"choices", "events", "backend", "randomness", "norms"},
        *{"weight_names", "json_files", "entropy", "byte_level"},
        *{"hlo", "intervals", "processes"},
        *{"curves", "page", "screenshots", "masks"},
    },
    {
        *{"variant", "presets", "losses", "embeddings", "positions"},
        *{"tensor_files", "costs", "stability", "chunked_attention"},
        *{"backup_files", "rescue"},
    },
    {
        *{"variants", "schedules", "hub", "distribution", "config_keys"},
        "lr_search",
    },
    {
        *{"logits", "records", "layerwise", "budget"},
        *{"layer_kinds", "corpora", "published", "arms", "sampling"},
    },
    {"telemetry", "family", "tokenizers", "health", "experiments"},
    {
        *{"detectors", "updates", "taps", "optimizers", "data", "linear"},
        "guard",
        *{"families", "subwords", "token_cache", "growth", "digests"},
    },
    {
        *{"packing", "criteria", "judge", "attend", "mlp", "mixture"},
        *{"snapshots", "comparison"},
    },
    {"attention", "training_state", "reported", "memory", "outcomes"},
    {
        *{"resumption", "block", "watch", "diagnosis", "sinks", "blackbox"},
        *{"workers", "sweeps", "standings", "backups", "feed"},
    },
    {"autopsy", "chronicle"},
    {"rescuer"},
    {"backbone", "selftest", "planning", "sweep_tables", "report"},
    {"checkpoints", "generation", "preprocessing", "supervisor"},
    {"models", "monitor"},
    {"alike"},
    {"many"},
    {"__init__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def parse(path):
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_imports_point_downwards(path):
    module = module_of(path)
    assert module in FLOOR, f"{module} has no floor in the house"
    for name in imports(parse(path)):
        parts = name.split(".")
        if parts[0] == "keras_stable" and len(parts) > 1:
            if parts[1] in FLOOR and parts[1] != module:
                assert FLOOR[parts[1]] < FLOOR[module], f"{module} -> {name}"


@pytest.mark.parametrize("path", SOURCES + RECIPES, ids=lambda p: p.stem)
def test_backends_and_internals_stay_in_backend(path):
    if "backend" in path.parts or path.stem.startswith(PEERS):
        return
    for name in imports(parse(path)):
        assert name.split(".")[0] not in ("jax", "torch", "tensorflow"), name
        assert not name.startswith(("keras.src", "keras_hub.src")), name


@pytest.mark.parametrize("path", RECIPES + NOTEBOOKS, ids=lambda p: p.name)
def test_recipes_and_notebooks_define_no_classes(path):
    if path.suffix == ".py":
        code = path.read_text()
    else:
        cells = json.loads(path.read_text())["cells"]
        # Lines for the notebook, as `%pip`, are not Python.
        lines = [
            re.sub(r"^(\s*)[%!].*", r"\1pass", line)
            for cell in cells
            if cell["cell_type"] == "code"
            for line in [*cell["source"], "\n"]
        ]
        code = "".join(lines)
    for node in ast.walk(ast.parse(code)):
        assert not isinstance(node, ast.ClassDef), node.name


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_use_public_names(path):
    for name in imports(parse(path)):
        assert not name.startswith("keras_stable."), name


def test_files_and_values_stay_small():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path
    assert len(dataclasses.fields(ks.Variant)) <= 12
    assert len(dataclasses.fields(ks.Placement)) <= 6


def test_readme_table_is_generated():
    readme = (ROOT / "README.md").read_text()
    assert variants.to_markdown() in readme, (
        "The README's table of variants is stale: paste what `python -c "
        '"from keras_stable import variants; print(variants.to_markdown())"` '
        "prints."
    )


def test_layout_is_the_readmes():
    readme = (ROOT / "README.md").read_text()
    for path in SOURCES:
        if path.parent == PACKAGE and path.stem != "__init__":
            assert f"{path.name}" in readme, f"{path.name} is not in README.md"


def test_public_names_have_docstrings():
    for name, value in vars(ks).items():
        if callable(value) and not name.startswith("_"):
            assert value.__doc__, name
