"""Why a run was lost: the same batches, trained on again."""

import enum
import math


class Cause(enum.StrEnum):
    """What an autopsy found.

    The step that went wrong is the first since the onset whose loss or
    gradient norm was not finite or beyond the guard's limits then. Its batch
    is tried on the state before that step (twice) and on the state of a
    backup, 100 steps before if there is one; and the batch after it on the
    state before. Nothing of it stays in the model.

    | cause             | it goes wrong again                               |
    |-------------------|---------------------------------------------------|
    | `TRANSIENT_FAULT` | not, or not both times: the machine's fault       |
    | `BAD_DATA`        | on the older state too                            |
    | `BAD_STATE`       | with the next batch too, but not on the older     |
    | `INTERACTION`     | with this batch on this state alone (PaLM's case) |
    | `GRADUAL`         | no single step went wrong: nothing was tried      |

    Reference: PaLM (arXiv 2204.02311), section 5.1, where the same batches did
    no harm on other checkpoints.
    """

    TRANSIENT_FAULT = "TRANSIENT_FAULT"
    BAD_DATA = "BAD_DATA"
    BAD_STATE = "BAD_STATE"
    INTERACTION = "INTERACTION"
    GRADUAL = "GRADUAL"


def is_bad(found, limits):
    """Whether `(loss, gradient norm)` is not finite or beyond the limits."""
    return any(
        not math.isfinite(x) or x > limit for x, limit in zip(found, limits)
    )


def decide(again, older, after):
    """The cause, from what went wrong.

    Args:
        again: pair of bools, of the batch on the state before.
        older: bool, of the batch on an older state.
        after: bool, of the next batch on the state before.
    """
    if not all(again):
        return Cause.TRANSIENT_FAULT
    if older:
        return Cause.BAD_DATA
    return Cause.BAD_STATE if after else Cause.INTERACTION


def examine(rescuer, telemetry, onset):
    """Finds the `Cause`.

    Args:
        rescuer: `Rescuer`, between two steps.
        telemetry: its model's `Watch`.
        onset: int, the first step of what is wrong.

    Returns:
        `(cause, sentence)`.
    """
    seen, guard = rescuer.seen, rescuer.guard
    wrong = [
        step
        for step, one in seen.items()
        if step >= onset and is_bad(one.found, one.limits)
    ]
    if not wrong:
        return Cause.GRADUAL, "no single step was beyond the limits"
    step, data = wrong[0], rescuer.feed
    before = guard.loss, guard.gradient_norm, guard.rate, telemetry.feed
    telemetry.feed, telemetry.full = None, False
    now = rescuer.backups.capture()

    def train(place, limit, rate=1.0):
        guard.loss, guard.gradient_norm, guard.rate = limit, math.inf, rate
        rescuer.model.train_on_batch(*data.batch(place))
        scalars = telemetry.read()[-1].scalars
        return scalars["loss"], scalars["gradient_norm"]

    def probe(place):
        # With this limit every update is left out.
        return train(place, -math.inf)

    try:
        if not all(x.guarded for s, x in seen.items() if s >= step):
            backup = rescuer.backups.newest(before=step, certified=False)
            rescuer.backups.restore(backup)
            for s in range(backup.step + 1, step):
                if not seen[s].guarded:
                    train(seen[s].place, math.inf, rescuer.rungs.rate(s))
        place, limits = seen[step].place, seen[step].limits
        tried = [probe(place), probe(place)]
        after = probe(data.place_after(place, 1))
        backup = rescuer.backups.newest(before=step - rescuer.rescue.margin)
        backup = backup or rescuer.backups.oldest()
        rescuer.backups.restore(backup)
        older = probe(place)
        then = seen.get(backup.step + 1)
        cause = decide(
            [is_bad(found, limits) for found in tried],
            is_bad(older, then.limits if then else (math.inf, math.inf)),
            is_bad(after, limits),
        )
    finally:
        rescuer.backups.restore(now)
        guard.loss, guard.gradient_norm, guard.rate, telemetry.feed = before
    detail = (
        f"loss of batch {place} at step {step}: {seen[step].found[0]:.4g}; "
        f"again {tried[0][0]:.4g} and {tried[1][0]:.4g}; of the next batch "
        f"{after[0]:.4g}; on the state after step {backup.step} "
        f"{older[0]:.4g}"
    )
    return cause, detail
