"""The learning rate as a function of the number of updates made."""

import math
import numbers

import keras
import numpy as np
from keras import ops

from keras_stable import backend
from keras_stable.choices import check_choice
from keras_stable.choices import check_integer
from keras_stable.choices import check_number

# How the learning rate falls from its peak: f(q) goes from 1 at q = 0, where
# the decay starts, to 0 at q = 1, the last update of a cycle.
SCHEDULES = {
    "cosine": lambda q: 0.5 * (1.0 + ops.cos(math.pi * q)),
    "linear": lambda q: 1.0 - q,
    # The "1-sqrt" cooldown of Hägele et al. (arXiv 2405.18392).
    "wsd": lambda q: 1.0 - ops.sqrt(q),
    "constant": lambda q: ops.ones_like(q),
}


def number_in(value, what, low=0.0, high=math.inf):
    """`value` as a float, or a `ValueError` unless `low <= value < high`."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = float(value)  # NumPy's numbers do not go into JSON.
    check_number(value, what)
    if not low <= value < high:
        bound = f"at least {low:g}"
        bound += "" if high == math.inf else f" and less than {high:g}"
        raise ValueError(f"{what} must be {bound}. Received: {value!r}")
    return value


@keras.saving.register_keras_serializable("keras_stable")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to `peak`, then a decay to `final * peak`; restarts.

    ```
    u  = step + 1                                  (the update being made)
    lr = peak * u / warmup_steps                   while u <= warmup_steps
    lr = peak * (final + (1 - final) * f(q))       after that
    q  = clip((u - start) / (total_steps - start), 0, 1)
    ```

    | `shape`    | f(q)                | decay starts at                    |
    |------------|---------------------|------------------------------------|
    | "cosine"   | (1 + cos(pi q)) / 2 | `warmup_steps`                     |
    | "linear"   | 1 - q               | `warmup_steps`                     |
    | "wsd"      | 1 - sqrt(q)         | `total_steps * (1-decay_fraction)` |
    | "constant" | 1                   | never                              |

    `step` is the number of updates made so far, from 0, so that the first
    update has `peak / warmup_steps` (with 0 it would move Adam's moments and
    no weight) and update number `total_steps` has exactly `final * peak`, as
    all later ones. Computed in float32, which counts exactly up to 16.7
    million. `keras_stable.AdamW` counts updates also when it accumulates
    gradients; stock Keras optimizers pass the number of batches.

    *Warm restarts* (SGDR): the updates after the warm-up are cut into
    `cycles`, the lengths of which grow by `cycle_growth`. Each runs the shape
    anew from its own peak to the same floor. In cycle i = 0, 1, ..., which
    ends with update e_i:

    ```
    T_i  = T_0 * cycle_growth^i      their sum is total_steps - warmup_steps
    e_i  = warmup_steps + round(T_0 + ... + T_i)
    m_i  = peak_decay^i
    lr   = peak * (final + (m_i - final) * r * f(q))              if i > 0
    r    = clip((u - e_{i-1}) / rewarmup_steps, 0, 1)  or 1 without re-warm-up
    q    = clip((u - start_i) / (e_i - start_i), 0, 1)
    ```

    where `start_i` is `e_{i-1} + rewarmup_steps`, or for "wsd" the update at
    which the last `decay_fraction` of the cycle begins (the first cycle's
    warm-up counts as part of it). The floor `final * peak` is fixed, as
    SGDR's eta_min and Keras's `alpha`; only peaks decay. The last update of
    each cycle is at the floor. The first one after is a step down from the
    peak, q = 1 / T_i, as at the very start without warm-up; with
    `rewarmup_steps=1` it is the peak itself, and with more of them the rate
    climbs there from the floor.

    `keras.optimizers.schedules.CosineDecayRestarts` counts from u = 0: its
    value at u is this one's at u - 1, but for u = e_i, where it has restarted
    already. (Its peaks are `(1 - alpha) m_mul^i + alpha` of the first: these
    ones if `alpha` is 0 or `m_mul` is 1.) A restart without re-warm-up is a
    jump of the learning rate: it stresses a run, and we know of no evidence
    that it stabilises one.

    Args:
        peak: float. The highest learning rate.
        total_steps: int. Number of updates, warm-up included.
        warmup_steps: int, less than `total_steps`. Defaults to 5 % of
            `total_steps`, as 5,000 of 100,000 in Wortsman et al.
        shape: `"cosine"`, `"linear"`, `"wsd"` (warm-up, stable, decay) or
            `"constant"`, which has nothing to restart. Defaults to
            `"cosine"`.
        final: float in [0, 1]. Defaults to 0.1 (Hoffmann et al.); Hägele et
            al. end `"wsd"` at 0. `"constant"` does not use it.
        decay_fraction: float in (0, 1]. Part of `total_steps`, or of each
            cycle, in which `"wsd"` decays; one update at least. Defaults to
            0.2. The other shapes do not use it.
        cycles: int. Number of cycles. Defaults to 1: no restart, and no
            effect of the arguments below.
        cycle_growth: float greater than 0. How much longer each cycle is than
            the one before (SGDR's T_mult). Defaults to 1.
        peak_decay: float in (0, 1]. How much lower its peak is. The last peak
            must not be below the floor. Defaults to 1.
        rewarmup_steps: int, less than the length of every cycle but the
            first. Defaults to 0, as published.

    Call arguments:
        step: int, scalar tensor or variable. Returns a float32 scalar.

    Raises:
        ValueError: for a value out of range or an unknown shape; if cycles
            do not fit into the steps, or the warm-up into its cycle.

    Example:

    >>> schedule = WarmupSchedule(3e-3, total_steps=1000, warmup_steps=50)
    >>> rates = [float(schedule(step)) for step in (0, 49, 999)]
    >>> sgdr = WarmupSchedule(3e-3, 1000, cycles=3, cycle_growth=2.0, final=0)

    Reference:
        [Wortsman et al., 2023](https://arxiv.org/abs/2309.14322) for the
        warm-up; [Hoffmann et al., 2022](https://arxiv.org/abs/2203.15556) for
        the cosine to a tenth; [Hu et al.,
        2024](https://arxiv.org/abs/2404.06395) and [Hägele et al.,
        2024](https://arxiv.org/abs/2405.18392) for `"wsd"`; [Loshchilov &
        Hutter, 2017](https://arxiv.org/abs/1608.03983) for warm restarts,
        which do not warm up again.
    """

    def __init__(
        self,
        peak,
        total_steps,
        warmup_steps=None,
        shape="cosine",
        final=0.1,
        decay_fraction=0.2,
        cycles=1,
        cycle_growth=1.0,
        peak_decay=1.0,
        rewarmup_steps=0,
        name=None,
    ):
        super().__init__()
        check_choice(shape, SCHEDULES, "schedule shape")
        self.peak = number_in(peak, "`peak`")
        self.total_steps = check_integer(total_steps, "`total_steps`", low=1)
        if warmup_steps is None:
            warmup_steps = self.total_steps // 20
        self.warmup_steps = check_integer(warmup_steps, "`warmup_steps`", low=0)
        self.shape = shape
        self.final = number_in(final, "`final`")
        self.decay_fraction = number_in(decay_fraction, "`decay_fraction`")
        self.cycles = check_integer(cycles, "`cycles`", low=1)
        self.cycle_growth = number_in(cycle_growth, "`cycle_growth`")
        self.peak_decay = number_in(peak_decay, "`peak_decay`")
        self.rewarmup_steps = check_integer(
            rewarmup_steps, "`rewarmup_steps`", low=0
        )
        self.name = name
        self._check_together()
        self._ends = self._cycle_ends()
        self._cycles = [self._cycle(i) for i in range(self.cycles)]

    def _check_together(self):
        for field in ("peak", "cycle_growth"):
            if getattr(self, field) == 0:
                raise ValueError(
                    f"`{field}` must be greater than 0. Received: 0"
                )
        if self.final > 1:
            raise ValueError(
                "`final` is a fraction of the peak, at most 1: for a final "
                "learning rate of x give x / peak. Received: "
                f"final={self.final}"
            )
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                "`warmup_steps` must be less than `total_steps`, which counts "
                f"the warm-up too. Received: warmup_steps={self.warmup_steps},"
                f" total_steps={self.total_steps}"
            )
        for field in ("decay_fraction", "peak_decay"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(
                    f"`{field}` must be in (0, 1]. Received: "
                    f"{field}={getattr(self, field)}"
                )
        if self.cycles > 1 and self.shape == "constant":
            raise ValueError(
                "Shape 'constant' does not decay and has nothing to restart: "
                "choose another shape, or cycles=1. Received: cycles="
                f"{self.cycles}"
            )
        last = self.peak_decay ** (self.cycles - 1)
        if last < self.final and self.cycles > 1:
            raise ValueError(
                "The peak of the last cycle would be below the final learning "
                "rate: raise `peak_decay`, or lower `final` or `cycles`. "
                f"Received: peak_decay={self.peak_decay}, cycles="
                f"{self.cycles}, so that the last peak is {last:g} of the "
                f"first; final={self.final}"
            )

    def _cycle_ends(self):
        """0, then the last update of every cycle."""
        span = self.total_steps - self.warmup_steps
        if self.cycles > span:
            raise ValueError(
                "`cycles` must be at most the number of updates after the "
                f"warm-up. Received: cycles={self.cycles}, updates={span}"
            )
        # Powers of at most 1, which cannot overflow.
        powers = np.arange(self.cycles)
        powers -= self.cycles - 1 if self.cycle_growth > 1 else 0
        parts = np.cumsum(self.cycle_growth**powers)
        ends = np.rint(span * (parts / parts[-1])).astype(int)
        lengths = np.diff(ends, prepend=0)
        needed = np.array([1] + [self.rewarmup_steps + 1] * (self.cycles - 1))
        if (lengths < needed).any():
            short = int(np.argmax(lengths < needed))
            raise ValueError(
                "A cycle needs its re-warm-up and one update more: lower "
                "`cycles` or `rewarmup_steps`, or bring `cycle_growth` nearer "
                f"to 1. Received: cycles={self.cycles}, cycle_growth="
                f"{self.cycle_growth}, rewarmup_steps={self.rewarmup_steps}, "
                f"so that cycle {short + 1} would have {lengths[short]} of "
                f"{span} updates"
            )
        return [0, *(self.warmup_steps + end for end in ends.tolist())]

    def _cycle(self, i):
        """Its begin, warm-up, start of decay, end; peak less floor; origin."""
        begin, end = self._ends[i : i + 2]
        warmup = self.rewarmup_steps if i else self.warmup_steps
        start = begin + warmup
        if self.shape == "wsd":
            start = begin + round((end - begin) * (1.0 - self.decay_fraction))
            start = min(start, end - 1)
        if start < begin + warmup:
            raise ValueError(
                "The decay of shape 'wsd' would start during the warm-up: "
                "lower `decay_fraction` or the warm-up. Received: "
                f"decay_fraction={self.decay_fraction}, and in cycle {i + 1} "
                f"of {self.cycles} a warm-up of {warmup} of {end - begin} "
                "updates"
            )
        above = self.peak_decay**i - self.final
        origin = self.final if i else 0.0
        return begin, max(warmup, 1), start, end, above, origin

    def __call__(self, step):
        # Not in floatx: bfloat16 cannot count beyond 256.
        update = ops.cast(step, "float32") + 1.0
        table = ops.convert_to_tensor(np.array(self._cycles, "float32"))
        # Looked up and not branched on: `step` may be traced.
        cycle = ops.sum(ops.cast(update > table[:-1, 3], "int32"))
        own = ops.take(table, cycle, axis=0)
        begin, warmup, start, end, above, origin = (own[i] for i in range(6))
        q = ops.clip((update - start) / (end - start), 0.0, 1.0)
        height = self.final + above * SCHEDULES[self.shape](q)
        # Before a warm-up ends, q is 0 and `height` the peak.
        climb = ops.minimum((update - begin) / warmup, 1.0)
        # Not compiled into the programs of a sweep over it.
        peak = backend.number(self.peak)
        return peak * climb * height + peak * (1.0 - climb) * origin

    def get_config(self):
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "shape": self.shape,
            "final": self.final,
            "decay_fraction": self.decay_fraction,
            "cycles": self.cycles,
            "cycle_growth": self.cycle_growth,
            "peak_decay": self.peak_decay,
            "rewarmup_steps": self.rewarmup_steps,
            "name": self.name,
        }
