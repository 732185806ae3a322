"""Detectors on one number a step: non-finite, spike, level shift, collapse.

`judge.Judge` feeds them; those over many layers at once are `layerwise`'s.
Pure numpy.
Baselines are a median m and s = 1.4826 * MAD, normal noise's deviation.
"""

import collections
import math

import numpy as np

from keras_stable.events import MIN_WARMUP
from keras_stable.events import Detector
from keras_stable.events import Event
from keras_stable.events import check
from keras_stable.events import robust

# Series of `Judge`: floor and single large rise of their `Spike`. Norms are
# judged by their logarithm: twice (what Marin saw before its loss spikes), or
# ten times at once (Megatron's). Four times once is common and harmless.
SERIES = {
    "loss": (0.1, 0.4),
    "gradient_norm": (math.log(2.0), math.log(10.0)),
    "update_norm": (math.log(2.0), math.log(10.0)),
}
# Sum of a `LevelShift` above which its baseline waits.
FROZEN = 10.0
# Normalised entropy below which attention is as good as on one key.
SINGLE_KEY = 0.01
# What a cap leaves of the largest logit, as a share, below which a head is
# saturated. Healthy runs kept over 0.02 in most heads, 34 of 35 lost ones
# under 0.008.
LEFT = 0.01
# Share of the heads of both kinds above which attention has collapsed.
MOST = 0.5


class NonFinite(Detector):
    """NaN or infinity: an event at once, one for all steps in a row.

    >>> NonFinite("loss").update(7, float("nan")).detail
    'loss is nan'
    """

    _remembers = ("onset",)

    def __init__(self, series):
        self.series = series
        self.onset = None  # While it lasts.

    def update(self, step, value):
        if math.isfinite(value):
            self.onset = None
        elif self.onset is None:
            self.onset = step
            detail = f"{self.series} is {value}"
            return Event(
                step, step, "nonfinite", self.series, float(value), detail
            )
        return None


class Spike(Detector):
    """A sudden rise: three points in five steps, or a single large one.

    ```
    z     = (x - m) / s           m, s of the last `window` unflagged values
    point = z > sigma and x - m > floor
    event = 3 points within 5 steps, or one point with x - m > large
    ```

    Points stay out of the baseline, unless 32 in a row make a new one. The
    event ends (`active` is False, `ended` is that step) when five steps have
    no point, or with a new baseline. `onset` is its first point.

    Args:
        series: name, for the events.
        floor, large: least rise of a point and of a single-point event, in
            the unit of the values. Give norms as log(x), with log(2), log(10).
        sigma: float. Defaults to 6. window: int, 128.
        warmup: steps without events, at least 64.

    Raises:
        ValueError: for a threshold that is negative, or `window` below 2.

    >>> spike = Spike("loss", floor=0.1, large=0.4)
    >>> events = [spike.update(step, 3.0) for step in range(100)]
    >>> spike.update(100, 3.5).detail
    'loss 3.5 is 0.5 above its median'
    """

    _remembers = (
        *("window", "points", "row", "seen", "median", "scale"),
        *("active", "onset", "ended"),
    )

    def __init__(self, series, floor, large, sigma=6.0, window=128, warmup=0):
        self.series = series
        self.floor = check("floor", floor, 0)
        self.large = check("large", large, floor)
        self.sigma = check("sigma", sigma, 0, above=True)
        self.warmup = max(MIN_WARMUP, check("warmup", warmup, 0))
        self.window = collections.deque(maxlen=check("window", window, 2))
        self.points = []  # Steps of the points of the last five steps.
        self.row = []  # Values of the points in a row.
        self.seen = 0
        self.median = self.scale = self.onset = self.ended = None
        self.active = False

    def update(self, step, value):
        if not math.isfinite(value):
            return None
        self.seen += 1
        if self.seen <= self.warmup:
            self.window.append(float(value))
            return None
        self.median, self.scale = map(float, robust(self.window))
        rise = value - self.median
        point = rise > max(self.floor, self.sigma * self.scale)
        self.points = [s for s in self.points if s > step - 5]
        if point:
            self.points.append(step)
            self.row.append(float(value))
        else:
            self.window.append(float(value))
            self.row = []
        if len(self.row) == 32:
            self.window = collections.deque(self.row, self.window.maxlen)
            self.points, self.row = [], []
        if self.active and not self.points:
            self.active, self.ended = False, step
        starts = len(self.points) >= 3 or (point and rise > self.large)
        if self.active or not starts or not self.points:
            return None
        self.active, self.onset = True, self.points[0]
        detail = f"{self.series} {value:.4g} is {rise:.3g} above its median"
        return Event(
            step, self.onset, "spike", self.series, float(value), detail
        )


class LevelShift(Detector):
    """A lasting rise, however small: a one-sided CUSUM of robust z-scores.

    ```
    z = (x - m) / max(s, floor)           m, s of the last 512 values
    S = clip(S + min(z, 4) - 0.75, 0, 60)
    ```

    The alarm is on from S > 30 to S <= 10; `onset` is the step at which S
    last left zero. m and s are taken anew every 16 steps, and frozen, with no
    value entering, while S > 10. The bound of 60 changes no alarm: it lets
    one end about 70 steps after the loss is back. Finds +0.06 nat in noise of
    0.03 in about 30 steps. `floor` is the least noise believed in, 1e-3, for
    losses that are constant or coarsely rounded.

    >>> shift = LevelShift("loss")
    >>> found = [shift.update(i, 2.9 + 0.1 * (i > 99)) for i in range(120)]
    >>> [event.step for event in found if event]
    [109]

    Reference: Page, Continuous inspection schemes, Biometrika 1954.
    """

    _remembers = (
        *("window", "seen", "median", "scale", "sum", "onset"),
        *("alarm", "alarm_step"),
    )

    def __init__(self, series, floor=1e-3, warmup=0):
        self.series = series
        self.floor = check("floor", floor, 0, above=True)
        self.warmup = max(MIN_WARMUP, check("warmup", warmup, 0))
        self.window = collections.deque(maxlen=512)
        self.seen = 0
        self.median = self.scale = self.onset = self.alarm_step = None
        self.sum = 0.0
        self.alarm = False

    def update(self, step, value):
        if not math.isfinite(value):
            return None
        self.seen += 1
        if self.median is not None:
            z = (value - self.median) / self.scale
            onset = step if self.sum == 0 else self.onset
            self.sum = float(min(max(0.0, self.sum + min(z, 4) - 0.75), 60.0))
            self.onset = onset if self.sum > 0 else None
        if self.sum <= FROZEN:
            self.alarm = False
            self.window.append(float(value))
            if self.seen >= self.warmup and self.seen % 16 == 0:
                self.median, scale = map(float, robust(self.window))
                self.scale = max(scale, self.floor)
        if self.alarm or self.sum <= 30:
            return None
        self.alarm, self.alarm_step = True, step
        detail = f"{self.series} stays above its level of {self.median:.4g}"
        return Event(
            step, self.onset, "level_shift", self.series, float(value), detail
        )


def collapsed(entropy, max_logit=0.0, max_logit_capped=0.0):
    """The share of attention heads that hardly a gradient passes.

    ```
    single key = entropy < 0.01
    saturated  = |max_logit_capped| < 0.01 |max_logit|
    ```

    The second is a largest logit of over 100 caps, whatever the cap. Of logits
    spread evenly up to there 3 % are within 3 caps, beyond which the derivative
    of `cap * tanh(z / cap)` is below 0.01; the entropy may be any. Both limits
    were found with recorded runs: see `recipes/detection_sweeps.py`. A head
    whose largest logit is only known capped, as in KerasHub's layers, is not
    found saturated: float32 tells it up to 9 caps.

    Args:
        entropy, max_logit, max_logit_capped: arrays, an entry a head: see
            `logit_statistics`. Heads whose entropy is NaN do not count.
            Without logits single keys alone are counted.

    >>> collapsed([0.5, 0.001, 0.0, float("nan")])
    0.6666666666666666
    >>> collapsed([0.5, 0.9], max_logit=[40, 9e3], max_logit_capped=[33, 50])
    0.5
    """
    entropy, raw, capped = (
        np.asarray(x, "float64") for x in (entropy, max_logit, max_logit_capped)
    )
    stuck = (entropy < SINGLE_KEY) | (np.abs(capped) < LEFT * np.abs(raw))
    known = np.isfinite(entropy)
    return float(np.mean(stuck[known])) if known.any() else 0.0


class Collapse(Detector):
    """Attention of most heads on a single key each, or far beyond a cap.

    ```
    event = share > 0.5, once until it is not, and once more when that has
            lasted for `patience` steps
    ```

    of the share of heads that `collapsed` finds. Softmax, or the cap, has
    hardly a gradient left then: logits grow on, and the loss stays about where
    a model ends that knows the last token alone. Silent in the first 64 steps,
    not in all of a warm-up: what collapsed there was not seen to come back.

    Args:
        patience: steps. Defaults to 100.

    Attributes:
        since: the first step of it, or None.
        lasting: whether it has lasted for `patience`.

    >>> collapse = Collapse()
    >>> events = [collapse.update(step, 0.8) for step in range(0, 300, 10)]
    >>> [event.step for event in events if event]
    [70, 170]
    """

    _remembers = ("since", "lasting")

    def __init__(self, patience=100):
        self.patience = check("patience", patience, 0)
        self.since, self.lasting = None, False

    def update(self, step, share):
        if not share > MOST or step < MIN_WARMUP:
            self.since, self.lasting = None, False
            return None
        new, before = self.since is None, self.lasting
        self.since = step if new else self.since
        self.lasting = step - self.since >= self.patience
        if not new and self.lasting == before:
            return None
        detail = (
            f"{share:.0%} of attention heads look at a single key or are far "
            "beyond their cap"
        )
        return Event(
            step, self.since, "collapse", "entropy", float(share), detail
        )
