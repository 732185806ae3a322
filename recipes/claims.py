"""Which of the paper's claims does a sweep of its ten methods reproduce?

    mkdir -p runs && tar -C runs -xf recipes/results/paper-lr.tar.xz
    python recipes/claims.py runs/paper-lr

Prints the final validation loss at every rate, the mean over seeds, beside the
rates at which arXiv 2410.16682 has each method diverge; how much more the
linear layers of some runs put out than those of others; and what is computed
of both: the rank correlation with the paper's order, and the ratio of two
edges. Judge by them.

Two edges are told apart: the first rate at which a seed is lost (diverged,
collapsed, not finite), as the paper has it; and that at which one is lost or
degraded, over 0.25 nats worse than the method's best, as `sweep.py` has it.

A method that is not lost at any rate of the ladder diverges above them, or
never: its edge counts as infinite, and equals that of others such. One that
has not run at the highest of them, and is not lost so far, has no place in the
order. Medians over blocks are compared for seed 0, at the last table that both
runs have, at most a tenth of the steps apart.
"""

import argparse
import dataclasses
import itertools
import math
import os
import sys

# Reads files alone: whichever backend is there.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras_stable as ks

# Runs whose output norms are compared, and with which.
SAME_RATE = (
    ("baseline", (6e-3, 8e-3, 2e-2, 4e-2, 6e-2, 8e-2)),
    ("soft_temp", (6e-3, 2e-2)),
    ("soft_cap", (6e-3, 2e-2)),
    ("soft_clip", (6e-3, 2e-2)),
    ("layer_scale", (6e-3, 2e-2)),
)
TENTH = ("baseline", "soft_cap", "qk_norm", "sigma_reparam")


def by_rate(sweep):
    """`{label: {rate: outcomes of its seeds}}`."""
    found = {}
    for label in sweep.arms:
        runs = found.setdefault(label, {})
        for o in sweep.outcomes(label):
            runs.setdefault(o.learning_rate, []).append(o)
    return found


def rates_of(found):
    return sorted({rate for runs in found.values() for rate in runs})


def forgiving(outcomes):
    """Outcomes of which those that are no more than degraded are stable."""
    return [
        dataclasses.replace(o, ending="converged")
        if o.ending == "degraded"
        else o
        for o in outcomes
    ]


def edge(runs, forgive=True):
    """The interval of the first rate at which a method loses a run."""
    outcomes = [*itertools.chain(*runs.values())]
    return ks.stability_interval(forgiving(outcomes) if forgive else outcomes)


def edges(found):
    """First rates that lose runs here and in the paper, of what is known."""
    here, there = {}, {}
    for label, runs in found.items():
        high = edge(runs).high
        if math.isfinite(high) or max(runs) == max(rates_of(found)):
            here[label] = high
            there[label] = ks.PUBLISHED[label].interval.high
    return here, there


def mean_loss(outcomes):
    return sum(o.loss for o in outcomes) / len(outcomes)


def mark(outcomes):
    """`*` if half of the seeds are lost, `~` if half are lost or degraded."""
    for sign, seen in ((" *", forgiving(outcomes)), (" ~", outcomes)):
        if 2 * sum(o.stable for o in seen) <= len(outcomes):
            return sign
    return ""


def losses(found):
    """A table of losses: a row for each method."""
    rates = rates_of(found)
    head = ["method", *(f"{rate:g}" for rate in rates)]
    head += ["lost from", "worse from", "in the paper"]
    rows = [head, ["---"] * len(head)]
    for label, runs in found.items():
        cells = [
            f"{mean_loss(runs[r]):.3f}{mark(runs[r])}" if r in runs else ""
            for r in rates
        ]
        known = ks.PUBLISHED[label].interval
        ends = [
            f"{i.high:g}" if i.first_unstable else f"above {i.low:g}"
            for i in (edge(runs), edge(runs, forgive=False), known)
        ]
        rows.append([label, *cells, *ends])
    return markdown(rows)


def pairs():
    """Runs to be compared: at the same rate, and at a tenth of it."""
    for label, rates in SAME_RATE:
        for rate in rates:
            yield (label, rate), ("qk_norm", rate)
    for label, rate in itertools.product(TENTH, (6e-2, 8e-2)):
        yield (label, rate), (label, rate / 10)


def growth(found):
    """A table of output norms of runs over those of others."""
    rows = [["run", "over", "steps", "QKV", "Proj", "FC1", "FC2"], ["---"] * 7]
    first = {
        (label, rate): outcomes[0]
        for label, runs in found.items()
        for rate, outcomes in runs.items()
        if outcomes[0].seed == 0
    }
    for both in pairs():
        if not {*both} <= {*first}:
            continue
        run, other = (first[each] for each in both)
        tables = [sorted(ks.read_health(o.path).tables) for o in (run, other)]
        near = [
            step
            for step in tables[0]
            if min(abs(step - t) for t in tables[1]) <= step / 10
        ]
        grown = ks.output_growth(run.path, other.path, max(near))
        middle = grown.middle()
        rows.append(
            [
                *(
                    f"{o.label} {o.learning_rate:g}{mark([o])}"
                    for o in (run, other)
                ),
                f"{grown.step}, {grown.reference_step}",
                *(f"{middle[k]:.1f}" for k in ("qkv", "proj", "fc1", "fc2")),
            ]
        )
    return markdown(rows)


def perplexities(found, rate):
    """Losses at a rate and the paper's perplexities, of methods with both."""
    both = [
        (mean_loss(runs[rate]), ks.PUBLISHED[label].perplexity)
        for label, runs in found.items()
        if rate in runs and math.isfinite(ks.PUBLISHED[label].perplexity)
    ]
    return [*zip(*both)]


def markdown(rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def sentences(found):
    """What the tables give in one number each."""
    here, there = edges(found)
    rank = ks.rank_correlation(*map(list, (here.values(), there.values())))
    yield f"order of the rates that lose runs, {len(here)} methods: {rank:.2f}"
    for rate in rates_of(found):
        known = perplexities(found, rate)
        if known and len(known[0]) > 4:
            rank = ks.rank_correlation(*known)
            yield (
                f"order of the losses at {rate:g} and of the paper's "
                f"perplexities at 3e-4, {len(known[0])} methods: {rank:.2f}"
            )
    base = edge(found["qk_norm"])
    for label in ("qkv_norm", "qk_norm_cap"):
        low, high = ratio = ks.compare(edge(found[label]), base)
        yield (
            f"edge of {label} to qk_norm's: {low:g} to {high:g}, 1.5 is "
            f"{ks.reproduces(ratio)}"
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", help="its directory: `paper-lr`")
    args = parser.parse_args(arguments)
    try:
        found = by_rate(ks.Sweep(args.sweep))
        missing = [x for x in found if x not in ks.PUBLISHED]
        if missing or not {"qk_norm", "qkv_norm", "qk_norm_cap"} <= {*found}:
            raise ValueError(
                "The claims are of the paper's ten methods. Received a sweep "
                f"of {', '.join(found)}"
            )
        print(losses(found), growth(found), *sentences(found), sep="\n\n")
    except (ValueError, OSError) as error:
        sys.exit(f"claims: {error}")


if __name__ == "__main__":
    main()
