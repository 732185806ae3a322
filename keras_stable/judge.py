"""The verdict about a run, from its loss and two norms: `Judge`. Pure numpy."""

import collections
import dataclasses
import itertools
import math
import statistics

from keras_stable.detectors import FROZEN
from keras_stable.detectors import SERIES
from keras_stable.detectors import LevelShift
from keras_stable.detectors import NonFinite
from keras_stable.detectors import Spike
from keras_stable.events import MIN_WARMUP
from keras_stable.events import Detector
from keras_stable.events import Event
from keras_stable.events import Verdict
from keras_stable.events import check

# Regret, and the steps for which it may be exceeded.
REGRETS = ((0.5, 100), (1.0, 50))


class Judge(Detector):
    """The verdict about a run, from its loss and two norms at every step.

    ```
    L0     = min(median of the first 5 losses, top)
    B      = min(lowest median of 50 losses so far, top)
    regret = (median of 20 - B) / max(L0 - B, 0.1, 4 noise)
    ```

    | verdict           | while                                            |
    |-------------------|--------------------------------------------------|
    | `NONFINITE`       | a NaN or infinity, and 200 steps after           |
    | `DIVERGED`        | regret > 0.5, after 100 steps of it or 50 of > 1 |
    | `LEVEL_SHIFT`     | a `LevelShift` alarm is on for more than 500     |
    |                   | steps, or a spike is open for more than 2000     |
    | `COLLAPSED`       | a `Collapse` is lasting, and 200 steps after     |
    | `STALLED`         | L0 - B < 0.05 L0 after 500 steps                 |
    | `SPIKE_SLOW`      | a spike is open for over 200 steps; 200 after it |
    | `SPIKE_RECOVERED` | 200 steps after a spike of 200 or less           |
    | `WARN`            | 200 steps after any other event                  |

    `top`, twice the first loss and at least 1 above it, is for runs that blow
    up in their first steps. `noise`, 1.05 times the median |change| of the
    last 50 losses, or of B's if less, keeps a noisy plateau from being regret.
    A loss spike is closed when the median of 20 is within 3 s of m, the median
    before it. In the warm-up losses may rise: there only `NONFINITE` is judged,
    and after 64 steps `COLLAPSED`, and `DIVERGED`, if the median of 20 is above
    `top` for 50.

    Args:
        warmup: int, steps of the learning rate's warm-up; at least 64.

    Attributes:
        verdict, worst: the present and the most severe `Verdict`.

    >>> judge = Judge()
    >>> for step in range(1, 101):
    ...     events = judge.update(step, {"loss": 5.5 / step**0.2})
    >>> events = judge.update(101, {"loss": float("nan")})
    >>> str(judge.verdict), judge.verdict.lost
    ('NONFINITE', True)
    """

    _remembers = (
        *"nonfinite spikes level_shift verdict worst seen first".split(),
        *"losses best noise open above diverged held".split(),
    )

    def __init__(self, warmup=0):
        self.warmup = max(MIN_WARMUP, check("warmup", warmup, 0))
        self.nonfinite = {series: NonFinite(series) for series in SERIES}
        self.spikes = {
            series: Spike(series, *rises, warmup=warmup)
            for series, rises in SERIES.items()
        }
        self.level_shift = LevelShift("loss", warmup=warmup)
        self.verdict = self.worst = Verdict.OK
        self.seen = 0
        self.first = []  # Losses, for L0.
        self.losses = collections.deque(maxlen=50)
        self.best = self.noise = None  # B, and the noise there.
        self.regret = 0.0  # Of the last loss.
        self.open = None  # [onset, level to come back to] of a loss spike.
        self.above = [None] * len(REGRETS)  # Step since which, or None.
        self.diverged = None  # Step since which.
        self.held = {}  # Name of a verdict: [onset, last step, reason].

    def update(self, step, values, skipped=False):
        """Takes a step's numbers and returns the list of its events.

        Args:
            step: int.
            values: dictionary with any of "loss" (of the batch, in nats),
                "gradient_norm" (before clipping) and "update_norm" (0 tells
                nothing: gradients are being accumulated).
            skipped: whether loss scaling left the step out: its two norms,
                infinite by routine, are then not looked at.
        """
        if not set(values) <= set(SERIES):
            raise ValueError(
                f"`values` may have {list(SERIES)}. Received: {list(values)}"
            )
        events = []
        for series, value in values.items():
            if series == "loss" or not skipped:
                events += self._watch(step, series, value)
        for series, detector in self.nonfinite.items():
            if detector.onset is not None:
                why = f"{series} is not finite"
                self._hold(Verdict.NONFINITE, step, detector.onset, why)
        for event in events:
            if event.detector != "nonfinite":
                self.warn(event)
        findings = [(Verdict.OK, step, ""), *self.findings(step)]
        verdict, onset, why = max(findings, key=lambda finding: finding[0])
        if verdict > max(self.verdict, Verdict.WARN):
            value = float(values.get("loss", math.nan))
            events += [Event(step, onset, "verdict", "loss", value, why)]
        self.verdict = verdict
        self.worst = max(self.worst, self.verdict)
        return events

    def watch_collapse(self, step, collapse):
        """`COLLAPSED` from the next step on, if a `Collapse` is lasting."""
        if collapse.lasting:
            why = (
                "most attention heads look at a single key or are far beyond "
                "their cap"
            )
            self.lose(Verdict.COLLAPSED, step, collapse.since, why)

    @property
    def calm(self):
        """Whether nothing about the loss is open, so that a state is good."""
        return not (
            # In the warm-up neither a spike nor a new level would tell.
            (self.seen <= self.warmup and self.regret > REGRETS[-1][0])
            or self.open
            or self.diverged
            or self.verdict.lost
            or self.spikes["loss"].active
            or self.level_shift.sum > FROZEN
            or any(d.onset is not None for d in self.nonfinite.values())
        )

    def lose(self, verdict, step, onset, why):
        """A verdict from the next step on, for what was found elsewhere."""
        self._hold(verdict, step, onset, why)

    def warn(self, event):
        """Raises `WARN` for 200 steps, for an event found elsewhere."""
        self._hold(Verdict.WARN, event.step, event.onset, event.detail)
        self.verdict = max(self.verdict, Verdict.WARN)
        self.worst = max(self.worst, Verdict.WARN)

    def _watch(self, step, series, value):
        found = [self.nonfinite[series].update(step, value)]
        if series == "loss":
            found.append(self.spikes[series].update(step, value))
            found.append(self.level_shift.update(step, value))
            if math.isfinite(value):
                self._follow(step, float(value))
        elif value > 0:
            event = self.spikes[series].update(step, math.log(value))
            if event:
                ratio = value / math.exp(self.spikes[series].median)
                detail = f"{series} {value:.3g} is {ratio:.3g} times its median"
                value = float(value)
                event = dataclasses.replace(event, value=value, detail=detail)
            found.append(event)
        return [event for event in found if event]

    def _follow(self, step, loss):
        spike = self.spikes["loss"]
        self.seen += 1
        first = self.first[0] if self.first else loss
        top = first + max(abs(first), 1.0)
        self.first = [*self.first, min(loss, top)][:5]
        self.losses.append(loss)
        if len(self.losses) == 50:
            changes = [abs(b - a) for a, b in itertools.pairwise(self.losses)]
            noise = 1.4826 / 2**0.5 * statistics.median(changes)
            median = min(statistics.median(self.losses), top)
            if self.best is None or median < self.best:
                self.best, self.noise = median, noise
        self.regret = 0.0
        # Of a damaged state there may be fewer losses.
        if self.seen <= MIN_WARMUP or len(self.losses) < 50:
            return
        recent = statistics.median(list(self.losses)[-20:])
        gain = max(statistics.median(self.first) - self.best, 0.1)
        gain = max(gain, 4 * min(noise, self.noise))
        self.regret = regret = (recent - self.best) / gain
        if regret <= REGRETS[0][0]:
            self.diverged = None
        for i, (limit, patience) in enumerate(REGRETS):
            since = step if self.above[i] is None else self.above[i]
            high = regret > limit if self.seen > self.warmup else recent > top
            self.above[i] = since if high else None
            if high and step - since >= patience - 1:
                self.diverged = self.above[0]
        if spike.active and self.open is None:
            self.open = [spike.onset, spike.median + 3 * spike.scale]
        elif self.open and not spike.active and recent <= self.open[1]:
            onset, took = self.open[0], step - self.open[0]
            name = "SPIKE_SLOW" if took > 200 else "SPIKE_RECOVERED"
            why = f"it came back in {took} steps"
            self._hold(Verdict[name], step, onset, why)
            self.open = None

    def _hold(self, verdict, step, onset, why):
        old = self.held.get(verdict.name)
        if old and step <= old[1]:
            onset = min(onset, old[0])
        self.held[verdict.name] = [onset, step + 200, why]

    def findings(self, step):
        """What is wrong now: verdict, first step of it, reason."""
        for name, (onset, until, why) in self.held.items():
            if step <= until:
                yield Verdict[name], onset, why
        shift, onset = self.level_shift, step
        if self.open:
            onset, age = self.open[0], step - self.open[0]
            verdict = Verdict.SPIKE_SLOW if age > 200 else Verdict.WARN
            verdict = Verdict.LEVEL_SHIFT if age > 2000 else verdict
            yield verdict, onset, f"a spike is open for {age} steps"
        if shift.alarm:
            age, onset = step - shift.alarm_step, min(onset, shift.onset)
            verdict = Verdict.LEVEL_SHIFT if age > 500 else Verdict.WARN
            yield verdict, onset, f"the loss is above its level for {age} steps"
        if self.diverged is not None:
            why = f"the loss gave back over {REGRETS[0][0]:.0%} of its gain"
            yield Verdict.DIVERGED, min(onset, self.diverged), why
        if self.best is not None and self.seen > max(500, self.warmup):
            start = statistics.median(self.first)
            if start - self.best < 0.05 * abs(start):
                why = f"the loss has come from {start:.4g} to {self.best:.4g}"
                yield Verdict.STALLED, step, why
