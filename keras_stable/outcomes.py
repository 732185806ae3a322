"""Run directories as `Outcome`s: read, and scored by one criterion.

A run directory is one of `pretrain.py`'s: `run.json`, `health.jsonl`, and a
`failure.json` if it ended without a result. A sweep has them in
`LABEL/lr-RATE/seed-SEED`; elsewhere `run.json` says what they are.
"""

import collections
import dataclasses
import functools
import json
import math
import warnings
from pathlib import Path

import numpy as np

from keras_stable import criteria
from keras_stable import json_files
from keras_stable import variants
from keras_stable.detectors import MOST
from keras_stable.detectors import collapsed
from keras_stable.health import read_health
from keras_stable.records import directories_with
from keras_stable.records import from_json
from keras_stable.records import place_of
from keras_stable.stability import Outcome

# Flags in which runs of an arm may differ.
FREE = (
    "learning_rate seed out label resume backend cache policy prompt save "
    "every inputs distribution tensor_parallel multi_host checkpoint_every "
    "keep_last keep_every"
).split()
# What makes arms hard to compare, unless that is the question.
SHARED = "steps batch_size sequence_length data tokenizer".split()
# What `status` in run.json may be.
ENDED, OPEN = ("finished", "diverged"), ("running", "interrupted")


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What an ending is, see `classify`.

    Args:
        window, tail: fractions of the steps. Default to 0.02 and 0.05.
        rise, gap: nats. Default to 0.5 and 0.25.
    """

    window: float = 0.02
    rise: float = 0.5
    tail: float = 0.05
    gap: float = 0.25


def read_outcomes(paths, thresholds=Thresholds(), problems=None):
    """Outcomes of all runs below some directories.

    A run is classified by `classify`, with three additions. "Collapsed" is
    one with over half of its attention heads on single keys at the end, see
    `Collapse`. Another that the monitor ended before its last step is
    "diverged" at best. And "degraded" is a run at a *higher* rate than the
    best one of its label, whose loss is more than `gap` above that: at a
    lower rate a run is slow, and not unstable. Best is the best run with the
    same seed, if that seed was run at the rate that is best for the label,
    otherwise the best of any seed.

    Runs that go on or were interrupted are no outcomes. A directory that has
    a `failure.json` and no result is one of ending "failed".

    Args:
        paths: a directory or a sequence of them.
        thresholds: `Thresholds`, to score anew.
        problems: list, to which sentences are added about directories that
            could not be read, versions that are mixed, and arms that differ
            in steps, batches or data. By default they are warned of.

    Returns:
        List of `Outcome`s, by label, rate and seed.

    Raises:
        FileNotFoundError: for a path that is not there.
        ValueError: for two runs of one label, rate and seed, or runs of one
            label with different settings.

    Example:

    >>> outcomes = read_outcomes("runs/table")             # doctest: +SKIP
    """
    found = [] if problems is None else problems
    before = len(found)
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    runs = {}
    for directory in _directories(paths):
        try:
            run = _read(directory, thresholds)
        except (OSError, *json_files.WRONG) as error:
            found.append(f"{directory} is left out: {error}")
            continue
        if run is None:
            continue
        outcome, _, problem = run
        found.extend(filter(None, [problem]))
        key = (outcome.label, outcome.learning_rate, outcome.seed)
        if key in runs:
            raise ValueError(
                f"Two runs of {key[0]!r} at learning rate {key[1]:g} with "
                f"seed {key[2]}: {runs[key][0].path} and {outcome.path}. Give "
                "the directory of one of them, or runs different labels."
            )
        runs[key] = run
    runs = [runs[key] for key in sorted(runs)]
    records = [(o, record) for o, record, _ in runs if record is not None]
    _check_settings(records)
    found.extend(_mixtures(records))
    if problems is None:
        for problem in found[before:]:
            warnings.warn(problem, stacklevel=2)
    return degrade([outcome for outcome, _, _ in runs], thresholds.gap)


def degrade(outcomes, gap=0.25):
    """Outcomes with what is "degraded" called so, see `read_outcomes`.

    Args:
        outcomes: `Outcome`s of any labels.
        gap: nats.
    """
    finite = collections.defaultdict(list)
    for o in outcomes:
        if math.isfinite(o.loss):
            finite[o.label].append(o)

    def judged(o):
        if not o.stable or not math.isfinite(o.loss):
            return o
        best = min(finite[o.label], key=lambda other: other.loss)
        own = [other for other in finite[o.label] if other.seed == o.seed]
        if any(other.learning_rate == best.learning_rate for other in own):
            best = min(own, key=lambda other: other.loss)
        higher = o.learning_rate > best.learning_rate
        if higher and o.loss > best.loss + gap:
            return dataclasses.replace(o, ending="degraded")
        return o

    return [judged(o) for o in outcomes]


def read_losses(path):
    """Training losses of a run directory, one of every recorded step.

    Raises:
        OSError, ValueError: of `read_health`.
    """
    return read_health(path, tables=False).series("loss")[1]


def _directories(paths):
    """Those with a run or a failure in them, each once, by path."""
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is not there: give directories of runs, or of sweeps."
            )
    return directories_with(paths, "run.json", "failure.json")


def _read(directory, thresholds):
    """Outcome, record and problem of a run; None if it is not over."""
    stamps = []
    for name in ("run.json", "failure.json"):
        file = directory / name
        stat = file.stat() if file.exists() else None
        stamps.append(stat and (stat.st_mtime_ns, stat.st_size))
    return _read_once(directory, tuple(stamps), thresholds)


# What is over does not change: a sweep asks again after each of its runs.
@functools.lru_cache(maxsize=4096)
def _read_once(directory, stamps, thresholds):
    record = {}
    if stamps[0]:
        record = from_json(json_files.read_json(directory / "run.json"))
        parts = [record.get("config")]
        parts += [record.get(name, {}) for name in ("versions", "corpus")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("its run.json is no record of pretrain.py")
    status = record.get("status")
    if status in ENDED:
        return _finished(directory, record, thresholds)
    if stamps[1]:
        return _failed(directory, record), None, None
    if status not in OPEN:
        raise ValueError(
            f"its status is {status!r}, and none of "
            f"{', '.join((*ENDED, *OPEN))}"
        )
    return None


def _failed(directory, record):
    known = {**record.get("config", {}), **place_of(directory)}
    failure = from_json(json_files.read_json(directory / "failure.json"))
    names = ("label", "learning_rate", "seed", "steps")
    known |= {name: failure[name] for name in names if name in failure}
    if "learning_rate" not in known or "seed" not in known:
        raise ValueError("its failure.json does not say of which run it is")
    return Outcome(
        _label(known),
        known["learning_rate"],
        known["seed"],
        "failed",
        steps=known.get("steps") or 0,
        path=str(directory),
    )


def _label(config):
    variant = config.get("variant")
    name = variant["name"] if isinstance(variant, dict) else variant
    return str(config.get("label") or name)


def _number(value):
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if real else math.nan


def _finished(directory, record, thresholds):
    config, corpus = record["config"], record.get("corpus", {})
    loss = _number(record.get("validation_loss"))
    more, problem = {}, None
    try:
        health = read_health(directory, tables="last")
        losses = health.series("loss")[1].astype("float64")
        ending = _ending(health, losses, loss, corpus, thresholds)
        more = _measured(health, losses)
        problem = _cut_off(directory, health, record.get("steps_done"))
    except (OSError, *json_files.WRONG) as error:
        problem = (
            f"{directory} has no curves that can be read, and is judged by "
            f"its run.json alone: {error}"
        )
        ending = "converged" if math.isfinite(loss) else "nonfinite"
        if math.isfinite(loss) and record["status"] == "diverged":
            ending = "diverged"
    steps, done = config.get("steps") or 0, record.get("steps_done") or 0
    halted = record["status"] == "diverged" and done < steps
    if more.get("collapsed", 0) > MOST and ending in ("converged", "spiked"):
        ending = "collapsed"
    if halted and ending in ("converged", "spiked"):
        ending = "diverged"
    batches = record.get("validation_batch_losses") or ()
    outcome = Outcome(
        _label(config),
        config["learning_rate"],
        config["seed"],
        ending,
        loss=loss,
        steps=steps,
        steps_done=done,
        tokens_per_step=config["batch_size"] * config["sequence_length"],
        batch_losses=tuple(map(_number, batches)),
        verdict=str(record.get("verdict", "")),
        path=str(directory),
        **more,
    )
    return outcome, record, problem


def _cut_off(directory, health, done):
    found, done = len(health.steps), _number(done)
    if not found < done:
        return None
    return (
        f"{directory} has the curves of {found} steps alone, of {done:g} that "
        "its run.json says were made, and is judged by those"
    )


def _ending(health, losses, loss, corpus, thresholds):
    # Loss scaling leaves out the steps whose gradients overflow.
    norms = [
        _number(step["gradient_norm"])
        for step in health.steps
        if step.get("gradient_norm") is not None and not step.get("skipped")
    ]
    unigram = _number(corpus.get("unigram_entropy"))
    limits = {**vars(thresholds)}
    del limits["gap"]
    return criteria.classify(
        losses,
        norms,
        validation=loss,
        unigram=unigram if math.isfinite(unigram) else None,
        **limits,
    )


def _measured(health, losses):
    logits = health.series("max_logit")[1].astype("float64")
    logits = logits[~np.isnan(logits)]
    steps, norms = health.series("gradient_norm")
    found = {
        "initial": float(losses[0]),
        "max_logit": float(logits.max()) if len(logits) else math.nan,
        "spike_score_paper": criteria.spike_score_paper(losses),
        "spike_rate_robust": criteria.spike_rate_robust(losses),
    }
    if len(norms) == len(losses):
        norms = norms.astype("float64")
        score = criteria.spike_score_olmo_core(losses, norms)
        found["spike_score_olmo_core"] = score
    if health.tables:
        names = list(health.layout["head_statistics"])
        heads = health.tables[max(health.tables)]["heads"]
        row = names.index("entropy")
        if heads:
            entropies = np.concatenate([h[row] for h in heads])
            found["entropy"] = float(entropies.mean())
            found["collapsed"] = collapsed(entropies)
    return found


def _check_settings(records):
    """Runs of one label must be runs of one arm."""
    first = {}
    for outcome, record in records:
        settings = {k: v for k, v in record["config"].items() if k not in FREE}
        settings["variant"] = _variant(settings.get("variant"))
        other, before = first.setdefault(outcome.label, (outcome, settings))
        # Other versions may have other flags.
        differ = [
            f"{name} is {_text(before[name])} there and {_text(value)} here"
            for name, value in settings.items()
            if name in before and before[name] != value
        ]
        if differ:
            raise ValueError(
                f"Runs of {outcome.label!r} have different settings, "
                f"{other.path} and {outcome.path}: {'; '.join(differ)}. Give "
                "them different labels, or leave one out."
            )


def _variant(value):
    try:
        return variants.get(value).to_dict()
    except (TypeError, ValueError):
        return value


def _text(value):
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def _mixtures(records):
    """Sentences about what is not the same in all runs."""
    kinds = collections.defaultdict(collections.Counter)
    arms = collections.defaultdict(lambda: collections.defaultdict(set))
    for outcome, record in records:
        versions = record.get("versions", {})
        backend = str(record.get("backend"))
        kinds["backend"][backend] += 1
        # Other backends took no part.
        for name in ("python", "keras", "numpy", backend):
            kinds[name][str(versions.get(name))] += 1
        corpus = record.get("corpus", {})
        shared = {name: record["config"].get(name) for name in SHARED}
        shared["training tokens"] = corpus.get("training_tokens")
        for name, value in shared.items():
            arms[name][_text(value)].add(outcome.label)
    for name, counts in kinds.items():
        if len(counts) > 1:
            each = ", ".join(f"{v} ({n} runs)" for v, n in counts.items())
            yield f"The runs are of mixed versions: {name} is {each}."
    for name, values in arms.items():
        if len(values) > 1:
            each = "; ".join(
                f"{value} in {', '.join(sorted(labels))}"
                for value, labels in values.items()
            )
            yield f"The arms differ in {name.replace('_', ' ')}: {each}."
