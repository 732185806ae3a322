"""The stability table: variants by learning rates, beside the paper's."""

import math

from keras_stable.published import PUBLISHED
from keras_stable.stability import best_rate
from keras_stable.stability import final_loss
from keras_stable.stability import lr_sensitivity
from keras_stable.stability import stability_interval


def standing(outcomes):
    """What every table says of one arm.

    Args:
        outcomes: `Outcome`s of one label.

    Returns:
        Dictionary of `"interval"`, a `StabilityInterval`; `"failed"`, how many
        runs have no result; `"sensitivity"`, see `lr_sensitivity`;
        `"best_rate"`; and `"best_loss"`, the final validation loss there, a
        mean over seeds; NaN if there is none.
    """
    interval, best = stability_interval(outcomes), best_rate(outcomes)
    loss = math.nan if best is None else final_loss(outcomes, best)[0].mean
    return {
        "interval": interval,
        "failed": len(interval.failed),
        "sensitivity": lr_sensitivity(outcomes),
        "best_rate": best,
        "best_loss": loss,
    }


def stability_table(outcomes, variants):
    """The table's rows, one a label, and what is to be said below it.

    Args:
        outcomes: list of `Outcome`s; no two of one label, rate and seed.
        variants: dictionary from labels to names of variants, in the order
            of the rows.

    Returns:
        Dictionary of JSON values: `"rates"`; `"rows"`, whose `"cells"` are
        `{"k", "n"}` or None, stable and all runs of each rate; `"notes"`.
    """
    rates = sorted({o.learning_rate for o in outcomes})
    labels = [x for x in variants if any(o.label == x for o in outcomes)]
    rows = [
        _row(
            [o for o in outcomes if o.label == label],
            rates,
            PUBLISHED.get(variants.get(label)),
        )
        for label in labels
    ]
    return {"rates": rates, "rows": rows, "notes": _notes(rows, variants)}


def in_order(variants):
    """A dictionary from labels to names of variants, as the paper lists them.

    Others come behind, in the order that they have.
    """
    names = list(PUBLISHED)

    def place(item):
        return names.index(item[1]) if item[1] in PUBLISHED else len(names)

    return dict(sorted(variants.items(), key=place))


def _row(outcomes, rates, published):
    found = standing(outcomes)
    interval, best = found["interval"], found["best_rate"]
    counts = map(interval.counts.get, rates)
    row = {
        "label": outcomes[0].label,
        "cells": [c and {"k": c[0], "n": c[1]} for c in counts],
        "interval": str(interval),
        "last_stable": interval.last_stable,
        "first_unstable": interval.first_unstable,
        "monotone": interval.monotone,
        **{k: found[k] for k in ("failed", "sensitivity", "best_rate")},
        "loss": None,
        "perplexity": None,
        "paper": None,
    }
    if best is not None:
        over_seeds, over_tokens = final_loss(outcomes, best)
        # Of one seed, how sure it is over the text.
        estimate = over_seeds if over_seeds.count > 1 else over_tokens
        estimate = estimate if math.isfinite(estimate.mean) else over_seeds
        over = "seeds" if estimate is over_seeds else "tokens"
        row["loss"] = _estimate(estimate, over)
        row["perplexity"] = _estimate(estimate.exp(), over)
    if published is not None:
        known = published.diverges_at
        row["paper"] = {
            "diverges_at": "above 0.06" if known is None else f"{known:g}",
            "perplexity": published.perplexity,
            "doubt": published.doubt,
        }
    return row


def _estimate(estimate, over):
    ends = {"low": estimate.low, "high": estimate.high}
    return {"mean": estimate.mean, **ends, "over": over}


def _notes(rows, variants):
    notes = []
    for row in rows:
        if not row["monotone"]:
            notes.append(f"{row['label']} is not monotone: {row['interval']}.")
        if row["failed"]:
            notes.append(
                f"{row['label']}: {row['failed']} runs failed without a "
                "result and count nowhere."
            )
    if any(row["loss"] for row in rows):
        notes.append(
            "Best loss: at the rate where the mean over seeds is least. Its "
            "interval is that of 95 %, Student's t, over seeds; of a single "
            "seed, over batches of the validation text."
        )
    if any(row["paper"] for row in rows):
        doubts = {}
        for row in rows:
            doubt = row["paper"] and row["paper"]["doubt"]
            if doubt:
                doubts.setdefault(doubt, []).append(variants[row["label"]])
        notes.append(
            "The paper, arXiv 2410.16682: 830M parameters, rates 6, 8, 20, "
            "40, 60 and 80e-3, one seed, divergence judged by eye; perplexity "
            "at 3e-4, +-0.1, only of methods that survived 40e-3. Its numbers "
            "stand here as others quote them."
        )
        notes.append(
            "Perplexities of the runs and of the paper cannot be compared: "
            "those of the runs are per token of their own tokenizer (per byte, "
            "if that is bytes), the paper's per token of its own, of another "
            "text."
        )
        for doubt, who in doubts.items():
            notes.append(f"{', '.join(who)}: {doubt.replace('`', '')}")
    return notes
