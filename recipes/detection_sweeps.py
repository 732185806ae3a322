"""Are runs that a high learning rate spoils ended early, and no others?

Question: what would the monitor, and the rules of other trainers, have said of
the runs of a sweep? detection.py asks about runs whose loss rises; here most
losses fall all the time, and end far above what another run reaches.

    python recipes/detection_sweeps.py runs/cpu-sensitivity runs/paper-lr \
        --until 2026-11-26T05 --new runs/qkv-factorial runs/where \
        --later 2026-11-26T15

Reads directories of sweeps, unpacked from `archive.py`'s files too, replays
every step and every table that is kept, and writes detection_sweeps.json. Runs
that the monitor ended while they were recorded count as ended there. The
sweeps after --new are counted by themselves, and so are runs that were started
after --until: the rule for collapsed attention was chosen on the others, and
its limit for caps on the arms at even places of the new sweeps as well. Runs
started after --later are a third part, on which nothing was chosen.

What became of a run, by its loss alone; the best run is that of the sweep,
any method, with the same seed:

    onset    the step since which the median of 21 losses stays over 0.25 above
             the best run's at that step
    lost     ends over 0.5 above the best run, and has an onset
    healthy  ends at most 0.25 above its method's best, and is not lost
    degraded the others: to stop them is neither a success nor a false alarm

A run that the monitor ended has the loss of the step where it was ended, and
nobody knows how it would have gone on. `behind` is how far the median of its
last 21 losses is above the best run's at the same step, `ended` whether it is
such a run. `caps` is the largest logit before the cap by that after it, of the
median head, at most; 1 without a cap.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from detection import SERIES
from detection import first
from detection import judge
from detection import middle
from detection import score
from detection import table
from detection import warmup_of
from detection_rules import RULES

import keras_stable as ks

FAR, NEAR = 0.5, 0.25
MAXIMA = "largest logit over 1000"


def curves(outcome):
    """The series of a run, the collapsed share of each table, and `caps`."""
    health = ks.read_health(outcome.path)
    run = {n: health.series(n)[1].astype("float64") for n in SERIES}
    names, shares, caps = health.layout["head_statistics"], {}, 1.0
    for step, found in sorted(health.tables.items()):
        heads = dict(zip(names, np.hstack(found["heads"])))
        shares[step] = ks.collapsed(**heads)
        ratios = np.abs(heads["max_logit"] / heads["max_logit_capped"])
        caps = max(caps, float(np.median(ratios)))
    return run, shares, caps


def apart(run, best_run):
    """How far medians of 21 losses are above the best run's, at each step."""
    steps = min(len(run["loss"]), len(best_run["loss"]))
    return middle(run["loss"][:steps]) - middle(best_run["loss"][:steps])


def label(outcome, behind, best, own):
    """What became of a run, and since when: see above."""
    far, steps = behind > NEAR, len(behind)
    since = steps + 1 - int(np.argmin(far[::-1])) if not far.all() else 1
    if outcome.loss > best.loss + FAR and since < steps:
        return "diverged", since
    return ("converged" if outcome.loss <= own + NEAR else "degraded"), None


def rows_of(path):
    """A row for each run of a sweep."""
    sweep = ks.Sweep(path)
    found = [o for name in sweep.arms for o in sweep.outcomes(name)]
    found = [o for o in found if np.isfinite(o.loss)]
    read = {id(o): curves(o) for o in found}
    for o in found:
        record = ks.read_run(o.path)
        warmup = warmup_of(record["config"])
        best = min((b for b in found if b.seed == o.seed), key=lambda b: b.loss)
        own = min(b.loss for b in found if b.label == o.label)
        run, shares, caps = read[id(o)]
        behind = apart(run, read[id(best)][0])
        became, onset = label(o, behind, best, own)
        ours = judge(run, warmup, shares)
        halt, why = ours["halt"], ours["verdict"]
        ended = o.steps_done < o.steps
        if halt is None and ended:
            # Ended when it was recorded, by more tables than are kept.
            halt, why = o.steps_done, o.verdict
        fired = {"ours: halt": halt}
        fired |= {name: rule(run) for name, rule in RULES.items()}
        fired[MAXIMA] = first(run["max_logit"] > 1000)
        yield {
            "name": str(Path(o.path).relative_to(sweep.path.parent)),
            "label": became,
            "started": record.get("started", ""),
            "loss": o.loss,
            "behind": float(behind[-1]),
            "ended": ended,
            "caps": caps,
            "onset": onset,
            "steps": len(run["loss"]),
            "verdict": why,
            "spikes": ours["spikes"],
            "fired": fired,
        }


def summary(rows):
    healthy = [row for row in rows if row["label"] == "converged"]
    spikes = sum(row["spikes"] for row in healthy)
    steps = sum(row["steps"] for row in healthy)
    return {
        "runs": len(rows),
        "degraded": sum(row["label"] == "degraded" for row in rows),
        "ended": sum(row["ended"] for row in rows),
        "healthy_steps": steps,
        "spikes_in_10000_healthy_steps": 1e4 * spikes / steps,
        "table": [score(rows, rule) for rule in rows[0]["fired"]],
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sweeps", nargs="+", metavar="DIR", help="the rule was chosen on these")
    add("--new", nargs="+", metavar="DIR", default=[], help="and not on these")
    add("--until", metavar="TIME", help="what was started later is new too")
    add("--later", metavar="TIME", help="what was started later is by itself")
    add("--out", default="recipes/results/detection_sweeps.json")
    args = parser.parse_args(arguments)
    result = {"schema": 1}
    try:
        parts = {"chosen on": [], "new": [], "later": []}
        given = {"chosen on": args.sweeps, "new": args.new}
        for part, paths in given.items():
            for row in (row for path in paths for row in rows_of(path)):
                name = part
                if args.until and row["started"] > args.until:
                    name = "new"
                if args.later and row["started"] > args.later:
                    name = "later"
                parts[name].append(row)
        for name, rows in parts.items():
            if not rows:
                continue
            result[name] = {**summary(rows), "rows": rows}
            found = result[name]
            print(f"{name}: {found['runs']} runs, {found['degraded']} degraded")
            print(table(found["table"]))
            print(
                f"loss spikes in 10 000 healthy steps: "
                f"{found['spikes_in_10000_healthy_steps']:.2f}\n"
            )
            for row in rows:
                halt, lost = row["verdict"], row["label"] == "diverged"
                if row["label"] != "degraded" and lost != bool(halt):
                    print(f"{row['name']}: {row['label']}, {halt or 'no halt'}")
    except (ValueError, OSError) as error:
        sys.exit(f"detection_sweeps: {error}")
    ks.records.write_json(args.out, result)


if __name__ == "__main__":
    main()
