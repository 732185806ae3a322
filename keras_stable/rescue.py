"""How a run is saved: which updates are left out, what comes after. No tensors.

The rungs, each for what the one before could not hold:

1. *Guard.* Single bad updates are left out, inside the compiled step.
2. *Rewind*, of `"recover"` alone. Too many of them, or the run is lost, see
   `Verdict`: back to a good state, past the batches in between.
3. *Back-off.* Too many, but of finite numbers, and a rewind was not long ago
   or is not to be had: the learning rate is halved, and comes back.
4. *Halt.*
"""

import dataclasses
import math

from keras_stable.choices import check_integer
from keras_stable.choices import check_number
from keras_stable.events import Detector
from keras_stable.events import Event
from keras_stable.events import robust


@dataclasses.dataclass(frozen=True)
class Rescue:
    """The numbers of `StabilityMonitor(policy="guard")` and `"recover"`.

    An update is left out, as if its batch had never been there, if loss or
    gradient norm is not finite, or

    ```
    loss               > m + max(loss_rise, sigma * s)
    log(gradient_norm) > m + max(log(gradient_ratio), sigma * s)
    ```

    with median m and s = 1.4826 MAD of the last 128 unflagged values, see
    `detectors.Spike`, and nothing beyond a limit during the warm-up. The
    monitor reads a step when the next one has begun, so that limits are two
    steps old.

    Args:
        loss_rise: nats. Defaults to 0.4: in 45,000 steps of healthy runs
            (`recipes/results/detection_logs.npz`) none was beyond.
        gradient_ratio: float above 1. Defaults to 100, for the same reason;
            10 would stop the first step of warm restarts.
        sigma: float. Defaults to 6.
        in_a_row, share: left-out steps in a row (5), or their share of the
            last 1000 (0.01), from which on it is no longer single batches.
            The device is up to two steps ahead when the monitor knows.
        rest: steps without limits after a back-off, in which a new level of
            the loss becomes the baseline. Defaults to 128.
        back_off: factor of the learning rate. Defaults to 0.5 (OPT: 0.67 and
            0.9, by hand). recovery: steps until the factor, linearly, is 1
            again. Defaults to 1000.
        every: steps between backups. Defaults to 100. keep: certified backups
            that are kept. Defaults to 3. certify: healthy steps after a
            backup, before it counts. Defaults to 50.
        margin: steps before the onset of what is wrong, to which a rewind goes
            back at least. Defaults to 100 (PaLM).
        skip: batches after the onset that are never trained on. Defaults to
            200 (PaLM: 200 to 500).
        rewarmup: steps of linear warm-up after a rewind. Defaults to 100.
        most: rewinds, and back-offs, in `horizon` steps; with the next the
            run is halted. Defaults to 3 in 10,000. Each rewind but the first
            of these also backs off.
        directory: of the backups, a file each, in a directory of the run's
            own. Defaults to None: they are in the host's memory, up to
            `keep` and two times the size of weights and slots.

    Raises:
        ValueError: for a number out of range.

    >>> gentle = Rescue(back_off=0.9, most=1)

    Reference: skipping and going back, PaLM (arXiv 2204.02311), section 5.1;
    lowering the learning rate, OPT (arXiv 2205.01068), section 2.5.
    """

    loss_rise: float = 0.4
    gradient_ratio: float = 100.0
    sigma: float = 6.0
    in_a_row: int = 5
    share: float = 0.01
    rest: int = 128
    back_off: float = 0.5
    recovery: int = 1000
    every: int = 100
    keep: int = 3
    certify: int = 50
    margin: int = 100
    skip: int = 200
    rewarmup: int = 100
    most: int = 3
    horizon: int = 10_000
    directory: str | None = None

    def __post_init__(self):
        for name, low in (("loss_rise", 0), ("sigma", 0), ("share", 0)):
            check_number(getattr(self, name), f"`{name}`", low=low)
        check_number(self.gradient_ratio, "`gradient_ratio`", low=1)
        check_number(self.back_off, "`back_off`", low=0)
        if self.back_off > 1:
            raise ValueError(
                "`back_off` is a factor of the learning rate, at most 1. "
                f"Received: {self.back_off}"
            )
        for name in ("in_a_row", "recovery", "every", "keep", "horizon"):
            check_integer(getattr(self, name), f"`{name}`", 1)
        for name in ("rest", "certify", "margin", "skip", "rewarmup", "most"):
            check_integer(getattr(self, name), f"`{name}`", 0)


WINDOW = 1000  # Steps of which `share` is.


class Rungs(Detector):
    """Where a run stands on the rungs; see the module and `Rescue`.

    Attributes:
        row: steps left out in a row, up to now.
        guarded: steps left out, of the last 1000.
        unwell: the last step that a backup before it must not be certified
            over: one left out, or with something open in the loss.
        rewinds: `(step, step that it went back to)` of each.

    >>> rungs = Rungs(Rescue())
    >>> rungs.rate(7)
    1.0
    """

    _remembers = (
        *("row", "onset", "guarded", "unwell", "resting"),
        *("factor", "since", "begun", "back_offs", "rewinds"),
    )

    def __init__(self, rescue, recovers=False):
        self.rescue, self.recovers = rescue, recovers
        self.row, self.onset, self.guarded, self.unwell = 0, None, [], 0
        self.resting = 0  # Until which step there are no limits.
        # Of the learning rate: at step `since`; and where a warm-up begun.
        self.factor, self.since, self.begun = 1.0, 0, None
        self.back_offs, self.rewinds = [], []

    def limits(self, step, judge):
        """`(loss, gradient norm)` beyond which step number `step` is bad."""
        if step <= self.resting:
            return math.inf, math.inf
        rescue = self.rescue
        loss = self._limit(judge.spikes["loss"], rescue.loss_rise)
        ratio = math.log(rescue.gradient_ratio)
        norm = self._limit(judge.spikes["gradient_norm"], ratio)
        # The exponential of 700 is the largest there is.
        return loss, math.exp(norm) if norm < 700 else math.inf

    def _limit(self, spike, rise):
        if spike.seen < spike.warmup or not spike.window:
            return math.inf
        median, scale = map(float, robust(spike.window))
        return median + max(rise, self.rescue.sigma * scale)

    def rate(self, step):
        """What the learning rate of step number `step` is multiplied by."""
        factor = self._factor(step)
        if self.begun is not None and self.rescue.rewarmup:
            factor *= min((step - self.begun) / self.rescue.rewarmup, 1.0)
        return factor

    def _factor(self, step):
        gone = max(step - self.since, 0) / self.rescue.recovery
        return min(self.factor + (1 - self.factor) * gone, 1.0)

    def update(self, step, scalars, calm):
        """Takes in what the guard did with a step.

        Args:
            step: int.
            scalars: the step's numbers.
            calm: whether nothing is open in the loss, see `Judge.calm`.

        Returns:
            `(events, lost)`; `lost` if leaving out does not help.
        """
        if not calm:
            self.unwell = step
        if not scalars.get("guarded"):
            self.row = 0
            return [], False
        self.unwell = step
        self.onset = step if self.row == 0 else self.onset
        self.row += 1
        first = step - WINDOW
        self.guarded = [s for s in self.guarded if s > first] + [step]
        loss, norm = scalars["loss"], scalars["gradient_norm"]
        finite = math.isfinite(loss) and math.isfinite(norm)
        detail = (
            f"the update is left out: loss {loss:.4g}, gradient norm {norm:.3g}"
        )
        events = [Event(step, self.onset, "guard", "loss", loss, detail)]
        many = len(self.guarded) >= self.rescue.share * WINDOW
        if self.row < self.rescue.in_a_row and not many:
            return events, False
        count, self.guarded = len(self.guarded), []
        goes_back = (
            self.recovers
            and self.may_rewind(step)
            and not any(s > first for s, _ in self.rewinds)
        )
        if not finite or goes_back or not self._may(self.back_offs, step):
            return events, True
        self.back_offs.append(step)
        self.lower(step)
        self.resting, self.row = step + self.rescue.rest, 0
        detail = (
            f"{count} updates were left out: the learning rate is multiplied "
            f"by {self.factor:.3g}, and comes back in {self.rescue.recovery} "
            "steps"
        )
        value = self.factor
        return [
            *events,
            Event(step, self.onset, "back_off", "learning_rate", value, detail),
        ], False

    def lower(self, step):
        """Backs off."""
        factor = self.rescue.back_off * self.rate(step)
        self.factor, self.since, self.begun = factor, step, None

    def _may(self, steps, step):
        first = step - self.rescue.horizon
        return sum(s > first for s in steps) < self.rescue.most

    def may_rewind(self, step):
        return self._may([s for s, _ in self.rewinds], step)

    def rewind(self, step, to):
        """Takes down a rewind after `step` to the state after step `to`."""
        first = step - self.rescue.horizon
        again = any(s > first for s, _ in self.rewinds)
        self.rewinds.append((step, to))
        self.row, self.guarded, self.resting = 0, [], 0
        self.unwell = step
        if again:
            factor = self.rescue.back_off * self._factor(step)
            self.factor, self.since = factor, step
        self.begun = step
