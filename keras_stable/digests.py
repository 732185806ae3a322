"""What a report keeps of a run directory, whoever wrote it.

Nothing of what is read is believed: what is damaged is said in `problems`, a
number that is none is left out, a text is cut at `TEXT` characters.

L layers, H heads, T tables.
"""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np

from keras_stable import json_files
from keras_stable.curves import decimate
from keras_stable.curves import numbers
from keras_stable.curves import pack
from keras_stable.curves import thin
from keras_stable.curves import trailing_median
from keras_stable.health import read_health
from keras_stable.records import directories_with
from keras_stable.records import place_of
from keras_stable.records import read_json

TEXT = 300  # Characters of a text that a report shows.
EVENTS = 60  # Of a run, the first that a report lists.
ROWS = 64  # Of tensors that belong to no kind, and of variables.
SCALARS = ("loss", "gradient_norm", "update_norm", "max_logit")

# Which linear layer a name means, by its last part: ours, and those of
# KerasHub and transformers.
KINDS = {
    "QKV": r"(q|k|v|qkv|query|key|value|query_key_value|c_attn)(_proj)?",
    "Proj": r"(output|proj|attention_output|o_proj|out_proj)",
    "FC1": r"(fc1|gate|up|c_fc|(gate|up)_proj|feedforward_intermediate_dense)",
    "FC2": r"(fc2|down|down_proj|feedforward_output_dense)",
}


@dataclasses.dataclass
class Digest:
    """A run as a report shows it.

    Attributes:
        path: of the run directory.
        facts: dictionary of JSON values: identity, results, state.
        config: dictionary of what was asked for and of versions, flat.
        curves: dictionary from names of `SCALARS` to packed curves; `"trend"`
            is the running median of the loss.
        series: the same curves whole: `(steps, values)`.
        events, verdicts: lists, as the page shows them.
        steps: array (T,), of the tables that are kept.
        norms: dictionary from kinds to `(names, l2)`: array (L, T).
        attention, updates: dictionaries for the page, or None.
        problems: list of sentences.
    """

    path: Path
    facts: dict = dataclasses.field(default_factory=dict)
    config: dict = dataclasses.field(default_factory=dict)
    curves: dict = dataclasses.field(default_factory=dict)
    series: dict = dataclasses.field(default_factory=dict)
    events: list = dataclasses.field(default_factory=list)
    events_total: int = 0
    verdicts: list = dataclasses.field(default_factory=list)
    steps: np.ndarray = dataclasses.field(default_factory=lambda: np.array([]))
    norms: dict = dataclasses.field(default_factory=dict)
    attention: dict | None = None
    updates: dict | None = None
    problems: list = dataclasses.field(default_factory=list)


def find_runs(paths):
    """The run directories in directories, sorted by path.

    A directory is one if it holds `run.json`, `health.jsonl` (a monitor
    without a recipe) or `failure.json` (a run that never began).

    Raises:
        FileNotFoundError: for a path that is no directory, or if there is no
            run in any.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise FileNotFoundError(
                f"{path} {what}. Give directories of runs, or of sweeps."
            )
    found = directories_with(
        paths, "run.json", "health.jsonl", "failure.json"
    )
    if not found:
        raise FileNotFoundError(
            f"There is no run in {', '.join(map(str, paths))}: a run directory "
            "holds run.json, health.jsonl or failure.json. Give those that "
            "recipes/pretrain.py or recipes/sweep.py wrote, with --out."
        )
    return found


def number(value):
    """A finite float, or None."""
    if isinstance(value, bool):
        return None
    value = float(numbers([value])[0])
    return value if math.isfinite(value) else None


def whole(value):
    """An int, or None."""
    value = number(value)
    return None if value is None or value % 1 else int(value)


def text(value):
    """Any value as a string of at most `TEXT` characters, on one line."""
    value = " ".join(str(value).split())
    return value if len(value) <= TEXT else value[: TEXT - 1] + "…"


def flatten(value, prefix=""):
    """Nested dictionaries as one, with dotted names and texts."""
    if not isinstance(value, dict):
        return {prefix or "value": text(value)}
    flat = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{text(key)}" if prefix else text(key))
    return flat


def _object(value):
    return value if isinstance(value, dict) else {}


def read_digest(path, points=1000, cells=8000):
    """The `Digest` of a run directory; never raises for what is in it.

    Args:
        path: the directory.
        points: int, most points of a curve.
        cells: int, most cells of a heat map.
    """
    digest = Digest(Path(path))
    found = {"run.json": {}, "failure.json": {}}
    for name in found:
        try:
            found[name] = read_json(digest.path / name)
        except FileNotFoundError:
            continue
        except (OSError, *json_files.WRONG) as error:
            digest.problems.append(text(f"{name} cannot be read: {error}"))
    _identify(digest, *found.values())
    if digest.facts["status"] == "no run.json":
        digest.problems.append(
            "has no run.json, and so no ending: nothing says how many steps "
            "it was to make and what its validation loss is"
        )
    try:
        health = read_health(path)
    except FileNotFoundError:
        health = None
    except (OSError, *json_files.WRONG) as error:
        digest.problems.append(text(f"health.jsonl cannot be read: {error}"))
        health = None
    if health is not None:
        for part in (_scalars, _events, _norms, _attention, _updates):
            try:
                part(digest, health, points if part is _scalars else cells)
            except json_files.WRONG as error:
                what = part.__name__.strip("_")
                digest.problems.append(
                    text(f"its {what} cannot be shown: {error}")
                )
    return digest


def _identify(digest, record, failure):
    # Of a run without a record its place in a sweep may tell.
    place = {} if record else place_of(digest.path)
    config = {**place, **_object(record.get("config"))}
    variant = config.get("variant")
    if isinstance(variant, dict):
        variant = variant.get("name")
    label = config.get("label") or variant or digest.path.name
    known = {k: record.get(k) for k in ("validation_loss", "perplexity")}
    corpus = _object(record.get("corpus"))
    status = record.get("status")
    if not record:
        status = "unreadable" if digest.problems else "no run.json"
        status = "failed" if failure else status
    digest.facts = {
        "path": text(digest.path),
        "label": text(label),
        "variant": text(variant or ""),
        "rate": number(config.get("learning_rate")),
        "seed": whole(config.get("seed")),
        "status": text(status),
        "verdict": text(record.get("verdict") or ""),
        "worst": text(record.get("worst_verdict") or ""),
        **{key: number(value) for key, value in known.items()},
        "unigram": number(corpus.get("unigram_entropy")),
        "steps": whole(config.get("steps")),
        "steps_done": whole(record.get("steps_done")),
        "parameters": whole(record.get("parameters")),
        "command": text(record.get("command") or ""),
        "started": text(record.get("started") or ""),
        "failure": text(failure.get("tail") or failure) if failure else None,
    }
    # Where and when it ran differs always, and says nothing.
    config = {k: v for k, v in config.items() if k not in ("out", "resume")}
    names = ("backend", "device", "git_commit", "parameters", "schema")
    digest.config = {
        **flatten(config),
        **flatten({k: record[k] for k in names if k in record}),
        **flatten(_object(record.get("versions")), "versions"),
    }


def _scalars(digest, health, points):
    steps = numbers(row.get("step") for row in health.steps)
    for name in SCALARS:
        if not any(name in row for row in health.steps):
            continue
        values = numbers(row.get(name) for row in health.steps)
        digest.series[name] = steps, values
        x, y = decimate(steps, values, points)
        digest.curves[name] = {"x": pack(x), "y": pack(y)}
    if "loss" not in digest.series:
        return
    losses = digest.series["loss"][1]
    window = max(20, round(0.02 * len(losses)))
    x, y = decimate(steps, trailing_median(losses, window), points // 4)
    digest.curves["trend"] = {"x": pack(x), "y": pack(y)}
    facts = digest.facts
    facts["window"] = window
    facts["initial"] = number(losses[0])
    facts["last"] = number(y[-1])
    facts["steps_done"] = facts["steps_done"] or whole(steps[-1])
    if "max_logit" in digest.series:
        logits = digest.series["max_logit"][1]
        logits = logits[np.isfinite(logits)]
        facts["max_logit"] = number(logits.max()) if len(logits) else None


def _events(digest, health, _):
    digest.events_total = len(health.events)
    for event in health.events[:EVENTS]:
        row = [number(event.step), number(event.onset)]
        row += [text(event.detector), text(event.series)]
        digest.events.append([*row, number(event.value), text(event.detail)])
    for row in health.verdicts[:EVENTS]:
        step, verdict = number(row.get("step")), text(row.get("verdict"))
        digest.verdicts.append([step, verdict])


def _place(name):
    """The layer that a tensor belongs to, and its kind, None if it has none.

    >>> _place("block_3/attention/query")
    ('block_3', 'QKV')
    """
    last = name.rpartition("/")[2]
    for kind, pattern in KINDS.items():
        if re.fullmatch(pattern, last) and "/" in name:
            layer = re.match(r"(.*?\d+)/", name)
            layer = layer[1] if layer else name.rpartition("/")[0]
            return layer, kind
    return name, None


def _norms(digest, health, cells):
    """Norms of each kind: of a layer's tensors together, sqrt(sum(l2^2))."""
    if not health.tables:
        return
    names = list(health.layout["tensors"])
    places = {}
    for i, name in enumerate(names):
        layer, kind = _place(name)
        if not name.endswith("/input"):
            rows = places.setdefault(kind or "Other", {})
            rows.setdefault(layer, []).append(i)
    column = health.layout["tensor_statistics"].index("l2")
    steps = sorted(health.tables)
    rows = max(map(len, places.values()), default=1)
    steps = [steps[i] for i in thin(steps, rows, cells // 4)]
    tables = [health.tables[step]["tensors"][:, column] for step in steps]
    l2 = np.array(tables).T
    digest.steps = np.array(steps)
    for kind in (*KINDS, "Other"):
        if kind in places:
            layers = dict(list(places[kind].items())[:ROWS])
            squares = [np.sum(l2[i] ** 2, axis=0) for i in layers.values()]
            digest.norms[kind] = list(layers), np.sqrt(squares)


def _attention(digest, health, cells):
    """Largest logit and entropy of every head, rows in order of layers."""
    heads = health.layout.get("heads") or {}
    if not (heads and health.tables):
        return
    statistics = list(health.layout["head_statistics"])
    steps = sorted(health.tables)
    tables = [health.tables[step]["heads"] for step in steps]
    rows = sum(table.shape[1] for table in tables[0])
    kept = thin(steps, rows, cells)
    tables = [np.concatenate(tables[i], axis=1) for i in kept]
    digest.attention = {
        "steps": [steps[i] for i in kept],
        "layers": [[text(k), number(v)] for k, v in heads.items()],
        "labels": sorted({text(v) for v in health.layout["labels"].values()}),
    }
    for name in ("max_logit", "entropy"):
        values = np.array([table[statistics.index(name)] for table in tables])
        if name == "max_logit":
            # Over many decades: a half-byte's step must fit the small ones.
            values = np.arcsinh(values)
        digest.attention[name] = pack(values.T, "i2")
    facts = digest.facts
    entropies = values[-1][np.isfinite(values[-1])]
    facts["min_entropy"] = number(entropies.min()) if len(entropies) else None


def _updates(digest, health, cells):
    """log10(rms of update / rms of weight) of every matrix."""
    names = list(health.layout.get("variables") or ())
    rows = [
        i for i, x in enumerate(names) if re.search(r"kernel$|embeddings$", x)
    ]
    rows = rows or list(range(len(names)))
    if not (rows and health.tables):
        return
    # Evenly spread over the depth, if there are too many to be shown.
    rows = [rows[i] for i in thin(rows, 1, 2 * ROWS)]
    statistics = list(health.layout["variable_statistics"])
    update, weight = map(statistics.index, ("update_rms", "weight_rms"))
    steps = sorted(health.tables)
    steps = [steps[i] for i in thin(steps, len(rows), cells)]
    tables = np.array([health.tables[s]["variables"][rows] for s in steps])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log10(tables[..., update] / tables[..., weight])
    digest.updates = {
        "steps": steps,
        "names": [text(names[i]) for i in rows],
        "ratio": pack(ratio.T, "i2"),
    }
