"""Detectors over many layers at once: growth, jumps, staleness, frozen.

Each is made with the names of its series and fed with one float64 array, in
the order of the names, at the steps that are sampled. A series' value that
is not finite tells nothing (`NonFinite` is for that): its last finite value
stands in for it. Pure numpy.
"""

import numpy as np

from keras_stable.events import MIN_WARMUP
from keras_stable.events import Event
from keras_stable.events import ManySeries
from keras_stable.events import check
from keras_stable.events import median_of


class Growth(ManySeries):
    """Growth that reaches a limit soon, by a straight line through log2(x).

    ```
    slope   = OLS slope, in octaves a step, of the last `window` samples
    growing = slope > 0 and (limit - x) / slope < horizon
              and x - reference >= rise
    event   = growing and R^2 > fit, once until x - reference < rise - 1
    ```

    The reference is the value at the end of the warm-up.

    Args:
        names: of the series.
        limits: float or one a series, in log2: of amax, the log2 of the
            dtype's largest number less 3 (float16: 13); of max logit,
            log2(100). None: 6 octaves above the reference, as for rms.
        horizon: steps. Defaults to 2000. fit: least R^2, 0.8.
        rise: octaves above the reference. Defaults to 2.
        window: samples. Defaults to 64; silent before.
        warmup: steps, at least 64.

    Raises:
        ValueError: for negative thresholds, `window` below 3, or `limits` not
            one a series.

    >>> growth = Growth(["block_0/fc2 rms"], limits=None)
    >>> events = [growth.update(s, [s / 100]) for s in range(0, 640, 10)]
    >>> [event.series for event in events[-1]]
    ['block_0/fc2 rms']
    """

    _remembers = ("steps", "values", "samples", "reference", "active")

    def __init__(
        self,
        names,
        limits,
        horizon=2000,
        fit=0.8,
        rise=2.0,
        window=64,
        warmup=0,
    ):
        super().__init__(names)
        count = len(self.names)
        limits = np.asarray(limits, "float64")  # None becomes NaN.
        if limits.shape not in ((), (count,)):
            raise ValueError(
                f"`limits` must be one number, or one for each of the {count} "
                f"series. Received: shape {limits.shape}"
            )
        self.limits = np.broadcast_to(limits, (count,))
        self.horizon = check("horizon", horizon, 0, above=True)
        self.fit = check("fit", fit, 0)
        self.rise = check("rise", rise, 0)
        self.warmup = max(MIN_WARMUP, check("warmup", warmup, 0))
        window = check("window", window, 3)
        self.steps = np.zeros(window)
        self.values = np.full((window, count), np.nan)
        self.samples = 0
        self.reference = np.full(count, np.nan)
        self.active = np.zeros(count, bool)

    def update(self, step, values):
        x = self.vector(values)
        window = len(self.steps)
        row = self.samples % window
        x = np.where(np.isfinite(x), x, self.values[row - 1])
        self.steps[row], self.values[row] = step, x
        self.samples += 1
        if step >= self.warmup:
            unset = np.isnan(self.reference)
            self.reference = np.where(unset, x, self.reference)
        if self.samples < window:
            return []
        # The order of the rows of the ring does not matter to a regression.
        t = self.steps - self.steps.mean()
        y = self.values - self.values.mean(axis=0)
        slope = t @ y / (t @ t)
        explained = slope**2 * (t @ t)
        total = np.einsum("ij,ij->j", y, y)
        limits = np.where(
            np.isnan(self.limits), self.reference + 6, self.limits
        )
        growing = (
            (slope > 0)
            & (limits - x < self.horizon * slope)
            & (x - self.reference >= self.rise)
        )
        new = growing & (explained > self.fit * total) & ~self.active
        # Back by an octave before it counts again: no flutter at the edge.
        back = x - self.reference < self.rise - 1
        self.active = (self.active & ~back) | new
        onset = int(self.steps.min())
        return [
            self._event(step, onset, i, x[i], (limits[i] - x[i]) / slope[i])
            for i in np.flatnonzero(new)
        ]

    def _event(self, step, onset, i, value, left):
        up = value - self.reference[i]
        detail = (
            f"{self.names[i]} has grown {up:.1f} octaves and reaches its "
            f"limit in {max(left, 0):.0f} steps"
        )
        return Event(step, onset, "growth", self.names[i], float(value), detail)


class Jump(ManySeries):
    """A sudden change of a layer's scale, and the layer it started in.

    ```
    near = x[t] - x[t-2]                            x = log2(rms)
    far  = x[t] - median(x[t-window : t])
    jump = |near| >= octaves and |far| >= octaves
           and |near - 2 d| > sigma * s             d, s of x[i] - x[i-1]
    dead = x[t] is -inf, and was finite before
    ```

    d and s are the median and 1.4826 * MAD of the last one-sample changes, so
    that training which moves a layer's scale at any steady rate is no jump.
    `near` sees a change that one averaged sample has only half of; `far`
    keeps silent when one odd sample is over.

    One event names the first layer in forward order, whose input did not
    change, and counts those after it: they are its consequences, also when
    they follow later while the first is still away from its median.

    Args:
        names: of the layers, in forward order.
        octaves: float, 1: twice or half. sigma: float. Defaults to 6.
        window: samples, 16; silent before. warmup: steps, at least 64.

    Raises:
        ValueError: for thresholds that are not positive, `window` below 4.

    >>> jump = Jump(["query", "fc1"])
    >>> events = [jump.update(step, [0.0, 1.0]) for step in range(70)]
    >>> jump.update(70, [0.0, 3.0])[0].detail
    'fc1 changed by +2.0 octaves, with 0 layers after it'
    """

    _remembers = ("memory", "samples", "active")

    def __init__(self, names, octaves=1.0, sigma=6.0, window=16, warmup=0):
        super().__init__(names)
        self.octaves = check("octaves", octaves, 0, above=True)
        self.sigma = check("sigma", sigma, 0, above=True)
        self.warmup = max(MIN_WARMUP, check("warmup", warmup, 0))
        count, window = len(self.names), check("window", window, 4)
        self.memory = np.full((count, window), np.nan)  # The oldest first.
        self.samples = 0
        self.active = np.zeros(count, bool)

    def update(self, step, values):
        x = self.vector(values)
        memory = self.memory
        last = memory[:, -1]
        dead = np.isneginf(x) & np.isfinite(last)
        x = np.where(np.isfinite(x), x, last)
        self.memory = np.column_stack([memory[:, 1:], x])
        self.samples += 1
        if self.samples <= memory.shape[1] or step < self.warmup:
            return []
        near = x - memory[:, -2]
        far = x - median_of(memory)
        changes = np.diff(memory)
        usual = median_of(changes)
        scale = 1.4826 * median_of(np.abs(changes - usual[:, None]))
        away = dead | (np.abs(far) >= self.octaves)
        jumped = away & (np.abs(near) >= self.octaves)
        jumped &= np.abs(near - 2 * usual) > self.sigma * scale
        new = (jumped | dead) & ~self.active
        upstream = self.active
        self.active = (self.active | new) & away
        first = int(np.argmax(new)) if new.any() else None
        if first is None or upstream[:first].any():
            return []
        name, others = self.names[first], int(new.sum()) - 1
        detail = f"changed by {near[first]:+.1f} octaves"
        if dead[first]:
            detail = "is exactly zero: a dead layer"
        return [
            Event(
                step,
                step,
                "jump",
                name,
                float("-inf") if dead[first] else float(x[first]),
                f"{name} {detail}, with {others} layers after it",
            )
        ]


class _InARow(ManySeries):
    _remembers = ("runs", "onsets")

    def __init__(self, names, samples):
        super().__init__(names)
        self.samples = check("samples", samples, 1)
        self.runs = np.zeros(len(self.names), "int64")
        self.onsets = np.zeros(len(self.names), "int64")

    def _count(self, step, known, bad):
        # Indices of the series that were bad for the `samples`-th time.
        runs = np.where(bad, self.runs + 1, 0)
        self.runs = np.where(known, runs, self.runs)
        self.onsets = np.where(known & (runs == 1), step, self.onsets)
        return np.flatnonzero(known & (self.runs == self.samples))


class Staleness(_InARow):
    """Gradients that Adam's second moment has not seen: loss spikes follow.

    `R = sqrt(mean(g^2 / v)) > limit` for two samples in a row, a series; one
    event until R is below again. The limit of 2.3, and that spikes come 1 to
    8 steps later, are Wortsman et al.'s, for CLIP: not calibrated for LMs.

    >>> stale = Staleness(["embedding"])
    >>> [len(stale.update(step, [3.0])) for step in range(3)]
    [0, 1, 0]

    Reference:
        [Wortsman et al., 2023](https://arxiv.org/abs/2304.13013)
    """

    def __init__(self, names, limit=2.3, samples=2):
        super().__init__(names, samples)
        self.limit = check("limit", limit, 0, above=True)

    def update(self, step, values):
        values = self.vector(values)
        rows = self._count(step, np.isfinite(values), values > self.limit)
        return [self._event(step, i, float(values[i])) for i in rows]

    def _event(self, step, i, value):
        detail = (
            f"gradients of {self.names[i]} are {value:.2g} times the root of "
            "their second moment"
        )
        onset = int(self.onsets[i])
        return Event(step, onset, "staleness", self.names[i], value, detail)


class Frozen(_InARow):
    """Variables whose gradient is exactly zero while another's is not.

    Three samples in a row, a variable; one event until it moves again. A
    sample in which all are zero tells nothing.

    >>> frozen = Frozen(["kernel", "bias"])
    >>> [len(frozen.update(step, [0.1, 0.0])) for step in range(4)]
    [0, 0, 1, 0]
    """

    def __init__(self, names, samples=3):
        super().__init__(names, samples)

    def update(self, step, values):
        values = self.vector(values)
        finite = np.isfinite(values)
        known = finite & (values[finite] != 0).any()
        return [
            Event(
                step,
                int(self.onsets[i]),
                "frozen",
                self.names[i],
                0.0,
                f"the gradient of {self.names[i]} is exactly zero",
            )
            for i in self._count(step, known, values == 0)
        ]
