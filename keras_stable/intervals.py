"""How sure a number is: intervals over runs, seeds and tokens; ranks.

Standard library and numpy. A value that is not finite is no number to average:
an `Estimate` of a list with one in it is NaN.
"""

import dataclasses
import math
import statistics

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and the interval it lies in.

    Attributes:
        mean, low, high: float. The interval of one value is infinite.
        count: int. Of how many values.
    """

    mean: float
    low: float
    high: float
    count: int

    def exp(self):
        """Of the exponential, as perplexity is of a loss: end by end.

        >>> Estimate(0.0, -math.inf, math.inf, 1).exp()
        Estimate(mean=1.0, low=0.0, high=inf, count=1)
        """
        # Beyond 700 the exponential overflows.
        ends = (
            math.exp(x) if x < 700 else math.inf if x > 0 else x
            for x in (self.mean, self.low, self.high)
        )
        return Estimate(*ends, self.count)

    def __str__(self):
        if not math.isfinite(self.high - self.low):
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def wilson(successes, trials, level=0.95):
    """Interval of the fraction of successes, Wilson's.

    ```
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    ```

    with p = k / n. It stays within [0, 1] and is of use for three runs.

    Args:
        successes, trials: ints, k and n.
        level: float in (0, 1). Defaults to 0.95.

    Returns:
        `(low, high)`; (0, 1) for no trials.

    Raises:
        ValueError: unless `0 <= successes <= trials`.

    >>> low, high = wilson(3, 3)
    >>> round(low, 3), high
    (0.439, 1.0)

    Reference: Wilson, Probable inference, JASA 1927.
    """
    if not 0 <= successes <= trials:
        raise ValueError(
            "`successes` must be between 0 and `trials`. Received: "
            f"{successes} of {trials}"
        )
    if not trials:
        return 0.0, 1.0
    z = _two_sided(statistics.NormalDist().inv_cdf, level)
    p, share = successes / trials, z * z / trials
    middle = p + share / 2
    half = z * math.sqrt(p * (1 - p) / trials + share / trials / 4)
    ends = ((middle - half) / (1 + share), (middle + half) / (1 + share))
    # Exactly so in numbers that are not rounded.
    return (
        0.0 if successes == 0 else ends[0],
        1.0 if successes == trials else ends[1],
    )


def student(values, level=0.95):
    """Interval of the mean of few values, Student's t.

    ```
    mean(x) +- t(n - 1) * sqrt(sum((x - mean)^2) / (n - 1)) / sqrt(n)
    ```

    Over seeds it says how another seed would do; over the losses of batches
    of a validation text, how another text would.

    Args:
        values: sequence of numbers.
        level: float in (0, 1). Defaults to 0.95.

    Returns:
        `Estimate`; NaN for no values or one that is not finite, and without
        bounds for a single one.

    >>> print(student([2.0, 2.1, 2.2]))
    2.1 [1.852, 2.348]

    Reference: Student, The probable error of a mean, Biometrika 1908.
    """
    values = np.asarray(list(values), "float64")
    count = len(values)
    if not count or not np.isfinite(values).all():
        return Estimate(math.nan, math.nan, math.nan, count)
    mean = float(values.mean())
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = _two_sided(lambda p: student_quantile(p, count - 1), level)
    half *= float(values.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def student_quantile(probability, freedom):
    """The t below which Student's distribution has a probability.

    Args:
        probability: float in (0, 1).
        freedom: int, at least 1. Degrees of freedom.

    >>> round(student_quantile(0.975, 2), 3)
    4.303

    Reference: Abramowitz and Stegun, 26.7.3 and 26.7.4, by bisection.
    """
    if probability < 0.5:
        return -student_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _student_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_cdf(t, freedom):
    # A finite sum, for a whole number of degrees of freedom.
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for j in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (j - 1) / j
        total += term
    if not odd:
        return 0.5 + math.sin(angle) * total / 2
    total = math.sin(angle) * total if freedom > 1 else 0.0
    return 0.5 + (angle + total) / math.pi


def _two_sided(quantile, level):
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1). Received: {level!r}")
    return quantile(0.5 + level / 2)


def rank_correlation(first, second):
    """Spearman's: Pearson's correlation of ranks, ties sharing their mean.

    Args:
        first, second: sequences of as many numbers. Infinity is the largest.

    Returns:
        float in [-1, 1]; NaN if one of them is constant, shorter than two or
        holds a NaN.

    Raises:
        ValueError: for other lengths.

    >>> rank_correlation([1, 2, 3, math.inf], [10, 30, 20, 40])
    0.8
    """
    first, second = (np.asarray(x, "float64") for x in (first, second))
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            "Ranks are compared of two sequences of one length. Received: "
            f"shapes {first.shape} and {second.shape}"
        )
    if np.isnan(first).any() or np.isnan(second).any() or len(first) < 2:
        return math.nan
    a, b = (_ranks(x) - (len(x) + 1) / 2 for x in (first, second))
    size = math.sqrt((a @ a) * (b @ b))
    return round(float(a @ b) / size, 12) if size else math.nan


def _ranks(values):
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal + 1) / 2
