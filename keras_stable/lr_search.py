"""Searches over learning rates: which runs to make next, by outcomes.

A search is a value with one method, `wanted(outcomes)`: the runs that it wants
next, given what is known of one arm; none when it is done. It remembers
nothing else, so that it goes on after a crash, on another machine, or from
half of the files. What it finds is a `StabilityInterval`, see `stability`.

Standard library only.
"""

import dataclasses
import functools
import itertools
import math

from keras_stable.choices import check_choice
from keras_stable.stability import by_run
from keras_stable.stability import rate_of
from keras_stable.stability import stability_interval

# Peak learning rates that others have compared at, and one in three of them.
LADDERS = {
    # arXiv 2410.16682.
    "paper": (6e-3, 8e-3, 20e-3, 40e-3, 60e-3, 80e-3),
    # arXiv 2309.14322, half a decade apart.
    "wortsman": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    # Below, at and above the paper's, 2.5 to 3.3 apart.
    "anchor": (3e-3, 8e-3, 2e-2, 6e-2, 2e-1),
}


def _different(values, what, allowed):
    values = tuple(values)
    if not values or len(set(values)) < len(values):
        raise ValueError(
            f"`{what}` must be {allowed}, at least one and none twice. "
            f"Received: {values}"
        )
    return values


def _rates(rates):
    if isinstance(rates, str):
        check_choice(rates, LADDERS, "ladder")
        rates = LADDERS[rates]
    rates = [rate_of(rate) for rate in rates]
    return tuple(sorted(_different(rates, "rates", "learning rates")))


def check_seeds(seeds, what="seeds"):
    """Seeds as a tuple, if they are integers and different."""
    seeds = _different(seeds, what, "integers")
    for seed in seeds:
        if type(seed) is not int or seed < 0:
            raise ValueError(
                f"`{what}` must be integers, at least 0. Received: {seeds}"
            )
    return seeds


def check_range(low, high):
    """The ends of a range of learning rates, if they are such."""
    low, high = rate_of(low), rate_of(high)
    if low >= high:
        raise ValueError(
            "`low` must be less than `high`. Received: "
            f"low={low:g}, high={high:g}"
        )
    return low, high


def _at_ends(outcomes, seeds):
    """Runs with all seeds at both ends of the interval that are not known."""
    known, interval = by_run(outcomes), stability_interval(outcomes)
    ends = interval.last_stable, interval.first_unstable
    runs = itertools.product(filter(None, ends), seeds)
    return [run for run in runs if run not in known]


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Every learning rate with every seed.

    Args:
        rates: learning rates, or a name in `LADDERS`.
        seeds: ints. Defaults to (0,).
        at_ends: ints. Seeds that are run at the two ends of the interval
            alone; if one is lost at its lower end, then on below.

    Raises:
        ValueError: for rates or seeds given twice, none, or not positive.

    >>> ladder = Ladder((2e-3, 1e-3), seeds=(0, 1))
    >>> ladder.wanted([Outcome("a", 1e-3, 0, "converged")])
    [(0.002, 0), (0.001, 1), (0.002, 1)]
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    at_ends: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "rates", _rates(self.rates))
        object.__setattr__(self, "seeds", check_seeds(self.seeds))
        object.__setattr__(self, "at_ends", tuple(self.at_ends))
        if self.at_ends:
            check_seeds((*self.seeds, *self.at_ends), "seeds and at_ends")

    def wanted(self, outcomes):
        """Runs that are not known yet, `[(learning rate, seed)]`.

        Args:
            outcomes: `Outcome`s of one arm.
        """
        known = by_run(outcomes)
        runs = [(rate, seed) for seed in self.seeds for rate in self.rates]
        missing = [run for run in runs if run not in known]
        return missing or _at_ends(known.values(), self.at_ends)


@dataclasses.dataclass(frozen=True)
class Bisection:
    """Log-bisection to a ratio, then several seeds at both ends.

    On a grid of equal ratios, at most `ratio`:

    1. Rates about `coarse` apart from `low` to `high`, with the first seed.
    2. With a seed that was lost at the first unstable rate, the middle of the
       rates between that and the highest below at which this seed was stable;
       if there is none yet, the rates 1, 2, 4, ... cells below. Until the two
       are neighbours.
    3. All seeds at both ends. If one is lost at the lower end, that is the
       first unstable rate now, and 2. goes on below it with this seed.

    With all rates stable, or none, step 3 is made at the highest, or lowest.
    Rates off the grid that are known, as of a ladder before, are made use of.
    A run that failed says nothing of its rate: another seed is tried, and if
    none gives a result the rate is passed over.

    Args:
        low, high: floats. Learning rates searched.
        ratio: float above 1. Defaults to 1.19, a fourth of an octave: 1.5 is
            2.3 such cells.
        seeds: ints. Defaults to (0, 1, 2).
        coarse: float above 1. Defaults to 2.

    Attributes:
        rates: the grid, a tuple.

    Raises:
        ValueError: for an empty range, a ratio of 1 or less, seeds twice.

    >>> search = Bisection(1e-3, 8e-3)
    >>> search.wanted([])
    [(0.001, 0), (0.002, 0), (0.004, 0), (0.008, 0)]
    """

    low: float
    high: float
    ratio: float = 1.19
    seeds: tuple[int, ...] = (0, 1, 2)
    coarse: float = 2.0

    def __post_init__(self):
        for end, rate in zip(("low", "high"), check_range(self.low, self.high)):
            object.__setattr__(self, end, rate)
        for name in ("ratio", "coarse"):
            value = getattr(self, name)
            # Six digits name a rate: closer ones would be the same.
            if not 1.0001 <= value < math.inf:
                raise ValueError(
                    f"`{name}` is that of neighbouring learning rates, "
                    f"greater than 1. Received: {value!r}"
                )
        object.__setattr__(self, "seeds", check_seeds(self.seeds))

    @functools.cached_property
    def rates(self):
        octaves = math.log(self.high / self.low)
        cells = math.ceil(octaves / math.log(self.ratio) - 1e-9)
        step = octaves / cells
        return tuple(
            rate_of(self.low * math.exp(step * i)) for i in range(cells + 1)
        )

    def _coarse(self, interval):
        """Rates about `coarse` apart, but for those with one seen nearby."""
        cells = len(self.rates) - 1
        span = math.log(self.high / self.low)
        parts = math.ceil(span / math.log(self.coarse) - 1e-9)
        ends = (0, cells)
        for i in sorted({round(cells * k / parts) for k in range(parts + 1)}):
            rate = self.rates[i]
            gaps = (abs(math.log(rate / other)) for other in interval.counts)
            if i in ends or min(gaps, default=span) > math.log(self.coarse) / 2:
                yield rate

    def wanted(self, outcomes):
        """The runs to make next, `[(learning rate, seed)]`; [] at the end.

        Args:
            outcomes: `Outcome`s of one arm.
        """
        known = by_run(outcomes)
        interval = stability_interval(known.values())

        def told(rate, seeds):
            """The first run that did not fail, and whether it is known."""
            for seed in seeds:
                outcome = known.get((rate, seed))
                if outcome is None or outcome.ending != "failed":
                    return (rate, seed), outcome is not None
            return None, False

        coarse = [told(rate, self.seeds) for rate in self._coarse(interval)]
        if runs := [run for run, is_known in coarse if run and not is_known]:
            return runs
        seeds, step = self.seeds, 1
        if interval.first_unstable:
            lost = [
                (rate, seed)
                for (rate, seed), outcome in known.items()
                if outcome.ending != "failed" and not outcome.stable
            ]
            own = {seed for rate, seed in lost if rate == interval.high}
            worst = min(own, key=lambda seed: (seed not in seeds, seed))
            seeds = (worst, *(seed for seed in seeds if seed != worst))
            # Steps down double while this seed is lost at each.
            above = [r for r, s in lost if s == worst and r > interval.high]
            if above:
                step = 2 * sum(
                    interval.high < rate <= min(above) for rate in self.rates
                )
        below = sorted({rate for rate, _ in known} | {*self.rates})
        below = [rate for rate in below if rate < interval.high]
        between = []
        for rate in reversed(below):
            run, is_known = told(rate, seeds)
            if is_known:
                step = len(between) // 2 + 1
                break
            if run and rate in self.rates:
                between.append(run)
        if between:
            return [between[min(max(step, 1), len(between)) - 1]]
        return _at_ends(known.values(), self.seeds)
