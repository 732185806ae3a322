"""The learning rate as a function of the number of updates made."""

import math
import numbers

import keras
from keras import ops

from keras_stable.choices import check_choice
from keras_stable.choices import check_number

# How the learning rate falls from its peak: f(q) goes from 1 at q = 0, where
# the decay starts, to 0 at q = 1, the last update. Warm restarts (SGDR) would
# be one more entry, whose q comes back to 0.
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


def integer_in(value, what, low):
    """`value` as an int, or a `ValueError` unless it is one, `>= low`."""
    integer = isinstance(value, numbers.Integral)
    if not integer or isinstance(value, bool) or value < low:
        raise ValueError(
            f"{what} must be an integer, at least {low}. Received: {value!r}"
        )
    return int(value)


@keras.saving.register_keras_serializable("keras_stable")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to `peak`, then a decay to `final * peak`.

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

    Args:
        peak: float. The highest learning rate.
        total_steps: int. Number of updates, warm-up included.
        warmup_steps: int, less than `total_steps`. Defaults to 5 % of
            `total_steps`, as 5,000 of 100,000 in Wortsman et al.
        shape: `"cosine"`, `"linear"`, `"wsd"` (warm-up, stable, decay) or
            `"constant"`. Defaults to `"cosine"`.
        final: float in [0, 1]. Defaults to 0.1 (Hoffmann et al.); Hägele et
            al. end `"wsd"` at 0. `"constant"` does not use it.
        decay_fraction: float in (0, 1]. Part of `total_steps` in which
            `"wsd"` decays. Defaults to 0.2. The other shapes do not use it.

    Call arguments:
        step: int, scalar tensor or variable. Returns a float32 scalar.

    Raises:
        ValueError: for a value out of range or an unknown shape.

    Example:

    >>> schedule = WarmupSchedule(3e-3, total_steps=1000, warmup_steps=50)
    >>> rates = [float(schedule(step)) for step in (0, 49, 999)]

    Reference:
        [Wortsman et al., 2023](https://arxiv.org/abs/2309.14322) for the
        warm-up; [Hoffmann et al., 2022](https://arxiv.org/abs/2203.15556) for
        the cosine to a tenth; [Hu et al.,
        2024](https://arxiv.org/abs/2404.06395) and [Hägele et al.,
        2024](https://arxiv.org/abs/2405.18392) for `"wsd"`.
    """

    def __init__(
        self,
        peak,
        total_steps,
        warmup_steps=None,
        shape="cosine",
        final=0.1,
        decay_fraction=0.2,
        name=None,
    ):
        super().__init__()
        check_choice(shape, SCHEDULES, "schedule shape")
        self.peak = number_in(peak, "`peak`")
        self.total_steps = integer_in(total_steps, "`total_steps`", low=1)
        if warmup_steps is None:
            warmup_steps = self.total_steps // 20
        self.warmup_steps = integer_in(warmup_steps, "`warmup_steps`", low=0)
        self.shape = shape
        self.final = number_in(final, "`final`")
        self.decay_fraction = number_in(decay_fraction, "`decay_fraction`")
        self.name = name
        self._check_together()

    def _check_together(self):
        if self.peak == 0:
            raise ValueError("`peak` must be greater than 0. Received: 0")
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
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(
                "`decay_fraction` must be in (0, 1]. Received: "
                f"decay_fraction={self.decay_fraction}"
            )
        if self._decay_start() < self.warmup_steps:
            raise ValueError(
                "The decay of shape 'wsd' would start during the warm-up: "
                "lower `decay_fraction` or `warmup_steps`. Received: "
                f"decay_fraction={self.decay_fraction}, warmup_steps="
                f"{self.warmup_steps}, total_steps={self.total_steps}"
            )

    def _decay_start(self):
        if self.shape == "wsd":
            return round(self.total_steps * (1.0 - self.decay_fraction))
        return self.warmup_steps

    def __call__(self, step):
        # Not in floatx: bfloat16 cannot count beyond 256.
        update = ops.cast(step, "float32") + 1.0
        start = self._decay_start()
        q = ops.clip((update - start) / (self.total_steps - start), 0.0, 1.0)
        fall = SCHEDULES[self.shape](q)
        # Before the warm-up ends, q is 0 and fall is 1.
        warmup = ops.minimum(update / max(self.warmup_steps, 1), 1.0)
        return self.peak * warmup * (self.final + (1.0 - self.final) * fall)

    def get_config(self):
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "shape": self.shape,
            "final": self.final,
            "decay_fraction": self.decay_fraction,
            "name": self.name,
        }
