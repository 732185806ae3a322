r"""Are lost runs stopped early, and healthy ones never?

Question: what do our verdict and the rules of other trainers say about the
same recorded runs: how many lost runs are missed, how late are the others
stopped, how many healthy ones are stopped too?
Reads run directories that were recorded with `policy="observe"` (those of
detection_runs.py, or of `pretrain.py --policy observe`), folders of them, or
packed logs, and replays every curve through every rule.

    python recipes/detection.py runs/detection \
        --pack recipes/results/detection_logs.npz
    python recipes/detection.py recipes/results/detection_logs.npz

Packs the logs (and no more), or writes detection.json: the table, and a row
for each run. On one CPU core that takes 12 seconds for the logs that are here.

The truth comes from the whole curve, which no rule under test sees. c_t is
the median of the finite losses among t-10 .. t+10, and m_t the least c so far.

    onset       the step after the last one with c_t <= m_t + 0.1, or the
                first number that is not finite, whichever is first
    lost        `ks.classify` says "diverged" or "nonfinite", and has an onset
    degraded    neither, but the median of its last tenth is over 0.25 above
                that of another tenth
    unlearned   "diverged" by ending at chance, but never 0.1 above its least
                loss: there is no step since which it is lost
    healthy     the other "converged" and "spiked"; also those that a high
                learning rate keeps from learning much

Degraded and unlearned runs are counted by themselves: to stop them is neither
a success nor a false alarm. Skipped steps of loss scaling have no norms.

Expected: of 100 runs ours stops none of 57 healthy ones (at most 5.1 % of
such, with 95 % confidence) and 35 of 39 lost ones. Of the four that it lets go
on, two fall back to the loss of chance, which for bytes is less than half of
what was gained, and end before the 500 steps of LEVEL_SHIFT; two were never
below chance. The one rule that stops as many, Lightning's, stops 14 healthy
ones too. All are short runs of small models. Healthy: 25 language models and
GPT-2s of full scale on one H200; 14 of full scale, 18 `small` and `tiny` on
CPUs. Lost: on CPUs 18 of full scale, 15 `small`, 6 `tiny`.
"""

import argparse
import collections
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from detection_rules import RULES
from detection_rules import first

# Keras wants a backend, though nothing here computes with it.
BACKENDS = filter(importlib.util.find_spec, ("jax", "torch", "tensorflow"))
os.environ.setdefault("KERAS_BACKEND", next(BACKENDS, "jax"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras_stable as ks  # noqa: E402

SERIES = ("loss", "gradient_norm", "update_norm", "max_logit", "skipped")
HEALTHY, LOST = ("converged", "spiked"), ("diverged", "nonfinite")
GREY = ("degraded", "unlearned")
# What a log keeps of how it was made.
MADE = ("backend", "device", "versions", "git_commit", "command", "seconds")
MOST_SKIPS = 20  # The monitor's: so many skipped updates in a row count.


def judge(run, warmup, shares=None):
    """What our monitor says of a run: first steps, verdict, spikes found.

    Args:
        shares: dictionary of steps with tables: their share of collapsed heads.
    """
    judge, skips, spikes = ks.Judge(warmup), 0, 0
    shares, collapse = shares or {}, ks.Collapse()
    found = dict.fromkeys(("halt", "verdict", "warn"))
    names = [n for n in SERIES[:3] if len(run[n])]
    for i in range(len(run["loss"])):
        skipped = len(run["skipped"]) > 0 and run["skipped"][i] > 0
        skips = skips + 1 if skipped else 0
        values = {name: float(run[name][i]) for name in names}
        events = judge.update(i + 1, values, skipped and skips < MOST_SKIPS)
        spikes += sum(
            (e.detector, e.series) == ("spike", "loss") for e in events
        )
        if judge.verdict >= ks.Verdict.WARN and found["warn"] is None:
            found["warn"] = i + 1
        if judge.verdict.lost and found["halt"] is None:
            found.update(halt=i + 1, verdict=str(judge.verdict))
        if i + 1 in shares:
            collapse.update(i + 1, shares[i + 1])
            judge.watch_collapse(i + 1, collapse)
    return {**found, "spikes": spikes}


# The truth.


def middle(loss, window=21):
    """Medians of the finite values around each step; NaN if there are none."""
    loss = np.where(np.isfinite(loss), loss, np.nan)
    padded = np.pad(loss, window // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    some = np.isfinite(windows).any(axis=-1)
    found = np.full(len(loss), np.nan)
    found[some] = np.nanmedian(windows[some], axis=-1)
    return found


def onset(run, rise=0.1):
    """The first step since which a curve is lost, or None: see above."""
    c = middle(run["loss"])
    near = c <= np.fmin.accumulate(c) + rise
    left = None if near[-1] else 1
    if near.any() and not near[-1]:
        left = int(np.flatnonzero(near)[-1]) + 2
    norms = kept_norms(run)
    broken = first(~(np.isfinite(run["loss"]) & np.isfinite(norms)))
    return min((s for s in (left, broken) if s is not None), default=None)


def kept_norms(run):
    """Both norms together, without those of steps that loss scaling skipped."""
    norms = np.zeros(len(run["loss"]))
    for name in ("gradient_norm", "update_norm"):
        norms = norms + (run[name] if len(run[name]) else 0.0)
    skipped = run["skipped"] if len(run["skipped"]) else 0
    return np.where(np.greater(skipped, 0), 0.0, norms)


def label(run, chance):
    """What became of a run, by its whole curve: see above."""
    norms = kept_norms(run)
    name = ks.classify(run["loss"], norms, unigram=chance)
    if name in LOST:
        return name if onset(run) else "unlearned"
    tenths = [np.median(part) for part in np.array_split(run["loss"], 10)]
    return "degraded" if tenths[-1] > min(tenths) + 0.25 else name


# Logs.


def read(path):
    """The logs under a path: a run directory, a folder of them, or packed."""
    path = Path(path)
    if path.suffix == ".npz":
        return unpack(path)
    if (path / "run.json").exists():
        return [read_directory(path)]
    found = sorted(file.parent for file in path.glob("*/run.json"))
    # What detection_runs.py has not finished.
    found = [folder for folder in found if folder.suffix != ".part"]
    if not found:
        raise FileNotFoundError(f"No run directory in {path}.")
    return [read_directory(folder) for folder in found]


def warmup_of(config):
    """Steps of warm-up in a run's configuration; `pretrain.py`'s default."""
    steps = config.get("warmup_steps")
    return (config.get("steps") or 0) // 20 if steps is None else steps


def read_directory(path):
    record, health = ks.read_run(path), ks.read_health(path)
    config = record["config"]
    steps, _ = health.series("loss")
    if steps.tolist() != list(range(1, len(steps) + 1)):
        raise ValueError(f"{path} has not the loss of every step from 1 on.")
    corpus = record.get("corpus", {})
    scale = config.get("scale", "full")
    return {
        "name": path.name + ("" if scale == "full" else f"-{scale}"),
        "kind": config.get("kind", "lm"),
        "warmup": warmup_of(config),
        "chance": record.get("chance", corpus.get("unigram_entropy")),
        "config": config,
        "made": {key: record[key] for key in MADE if key in record},
        "series": {
            name: health.series(name)[1].astype("float32") for name in SERIES
        },
    }


def pack(file, logs):
    """Writes logs into one file: all runs' values of a series end to end.

    float32, as they were measured: a packed log replays exactly.
    """
    about = [{k: v for k, v in log.items() if k != "series"} for log in logs]
    arrays = {"runs": json.dumps(about)}
    for name in SERIES:
        values = [log["series"][name] for log in logs]
        arrays[name] = np.concatenate(values).astype("float32")
        arrays[f"{name}_lengths"] = np.array([len(v) for v in values])
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)


def unpack(file):
    with np.load(file) as arrays:
        logs = json.loads(str(arrays["runs"]))
        for log in logs:
            log["series"] = {}
        for name in SERIES:
            ends = np.cumsum(arrays[f"{name}_lengths"])[:-1]
            for log, values in zip(logs, np.split(arrays[name], ends)):
                log["series"][name] = values
    return logs


# Scores.


def replay(logs):
    """A row for each run: what it was, and when each rule fired."""
    rows = []
    for log in logs:
        run = {k: v.astype("float64") for k, v in log["series"].items()}
        became = label(run, log["chance"])
        ours = judge(run, log["warmup"])
        fired = {"ours: halt": ours["halt"], "ours: warning": ours["warn"]}
        fired |= {name: rule(run) for name, rule in RULES.items()}
        rows.append(
            {
                "name": log["name"],
                "kind": log["kind"],
                "device": log["made"].get("device"),
                "label": became,
                "onset": onset(run) if became in LOST else None,
                "steps": len(run["loss"]),
                "verdict": ours["verdict"],
                "spikes": ours["spikes"],
                "fired": fired,
            }
        )
    return rows


def score(rows, rule):
    """One line of the table.

    `early` are lost runs that it stopped before their onset; `delay` is from
    the onset to the rule, over those that it stopped later. `lead` is what it
    is earlier than `TerminateOnNaN`, or than the end of a run that this never
    stops, over all lost runs; `saved` the share of their steps after the onset.
    `diverged` are those of the lost that have no NaN for every rule to see.
    `bound` is the 95 % upper bound of the share of healthy runs stopped.
    """
    lost = [row for row in rows if row["label"] in LOST]
    healthy = [row for row in rows if row["label"] in HEALTHY]
    stops = [row["fired"][rule] for row in lost]
    ends = [stop or row["steps"] for row, stop in zip(lost, stops)]
    nan = [r["fired"]["Keras TerminateOnNaN"] or r["steps"] for r in lost]
    delays = [s - r["onset"] for r, s in zip(lost, stops) if s is not None]
    late = [delay for delay in delays if delay >= 0]
    saved = [r["steps"] - max(e, r["onset"]) for r, e in zip(lost, ends)]
    possible = sum(row["steps"] - row["onset"] for row in lost)
    false = sum(row["fired"][rule] is not None for row in healthy)
    others = collections.Counter(
        row["label"]
        for row in rows
        if row["label"] in GREY and row["fired"][rule] is not None
    )
    return {
        "rule": rule,
        "lost": len(lost),
        "missed": stops.count(None),
        "diverged": sum(row["label"] == "diverged" for row in lost),
        "missed_diverged": sum(
            row["label"] == "diverged" and row["fired"][rule] is None
            for row in lost
        ),
        "early": len(delays) - len(late),
        "healthy": len(healthy),
        "false": false,
        "bound": upper_bound(false, len(healthy)),
        "delay_median": quantile(late, 0.5),
        "delay_90": quantile(late, 0.9),
        "lead_median": quantile([n - e for n, e in zip(nan, ends)], 0.5),
        "saved": sum(saved) / possible if possible else None,
        "fired_on_others": dict(others),
    }


def count(rows, key):
    return dict(collections.Counter(row[key] for row in rows))


def quantile(values, q):
    return float(np.quantile(values, q)) if values else None


def upper_bound(k, n, level=0.95):
    """Clopper and Pearson's: the rate at which k or fewer are improbable."""
    if k >= n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        few = sum(
            math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)
        )
        low, high = (p, high) if few > 1 - level else (low, p)
    return high


def table(scores):
    lines = [
        f"{'rule':26}{'missed':>8}{'finite':>8}{'early':>6}"
        f"{'false':>7}{'(<95%)':>8}"
        f"{'delay':>6}{'90 %':>6}{'lead':>6}{'saved':>6}"
    ]
    for s in scores:
        numbers = [s["delay_median"], s["delay_90"], s["lead_median"]]
        cells = [f"{'-' if x is None else f'{x:.0f}':>6}" for x in numbers]
        saved = "-" if s["saved"] is None else f"{s['saved']:.0%}"
        missed = f"{s['missed']}/{s['lost']}"
        finite = f"{s['missed_diverged']}/{s['diverged']}"
        false = f"{s['false']}/{s['healthy']}"
        lines.append(
            f"{s['rule']:26}{missed:>8}{finite:>8}{s['early']:>6}"
            f"{false:>7}{s['bound']:>8.1%}{''.join(cells)}{saved:>6}"
        )
    return "\n".join(lines)


def notable(rows):
    """Lines about the runs in which ours was wrong, and of the grey ones."""
    for row in rows:
        halt, became = row["fired"]["ours: halt"], row["label"]
        says = f"{row['verdict']} at {halt}" if halt else "let go on"
        if became in LOST:
            says += f", lost since {row['onset']}"
            good = halt is not None and halt >= row["onset"]
        else:
            good = halt is None and became in HEALTHY
        if not good:
            yield f"{row['name']} ({became}, {row['steps']} steps): {says}"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("logs", nargs="+", help="directories or .npz files")
    parser.add_argument("--out", default="recipes/results/detection.json")
    parser.add_argument("--pack", help="only write the logs into this .npz")
    args = parser.parse_args(arguments)
    try:
        logs = [log for path in args.logs for log in read(path)]
    except (OSError, ValueError) as error:
        sys.exit(f"detection: {error}")
    if args.pack:
        pack(args.pack, logs)
        size = Path(args.pack).stat().st_size
        return print(f"{len(logs)} runs in {args.pack}, {size:,} bytes")
    rows = replay(logs)
    scores = [score(rows, rule) for rule in rows[0]["fired"]]
    healthy = [row for row in rows if row["label"] in HEALTHY]
    steps = sum(row["steps"] for row in healthy)
    result = {
        "schema": 1,
        "labels": count(rows, "label"),
        "kinds": count(rows, "kind"),
        "devices": count(rows, "device"),
        "healthy_steps": steps,
        "spikes_in_healthy_runs": sum(row["spikes"] for row in healthy),
        "table": scores,
        "runs": rows,
    }
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    counts = ", ".join(f"{n} {label}" for label, n in result["labels"].items())
    print(f"{len(rows)} runs of {len(result['kinds'])} kinds: {counts}\n")
    print(table(scores))
    print(
        f"\nOurs found {result['spikes_in_healthy_runs']} loss spikes in "
        f"{steps} healthy steps.\n"
    )
    print(*notable(rows), sep="\n")
    return result


if __name__ == "__main__":
    main()
