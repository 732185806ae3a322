"""How far a method can be pushed: what the outcomes of its runs say.

An `Outcome` is how one run ended. Results are intervals and never points: the
largest stable learning rate lies between the last that was stable and the
first that was not. Nothing here fails on a NaN: such a run is unstable, and
its loss counts as the one it began with.
"""

import dataclasses
import math
import numbers
import statistics

from keras_stable.choices import check_choice
from keras_stable.choices import check_integer
from keras_stable.intervals import Estimate
from keras_stable.intervals import student
from keras_stable.intervals import wilson

# How a run ended, the best first; "failed" is a run without a result.
ENDINGS = (
    *("converged", "spiked", "degraded", "collapsed", "diverged"),
    *("nonfinite", "failed"),
)
STABLE = ("converged", "spiked")


def rate_of(value):
    """A learning rate as directories name it: six digits.

    Raises:
        ValueError: unless it is a positive number.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 < value < math.inf:
        raise ValueError(
            f"A learning rate must be a positive number. Received: {value!r}"
        )
    return float(f"{float(value):g}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one run ended.

    Attributes:
        label: str. Of its arm.
        learning_rate: float. The schedule's peak, to six digits.
        seed: int.
        ending: one of `ENDINGS`.
        loss: final validation loss, nats a token; NaN if there is none.
        initial: training loss of the first step, before any update.
        steps, steps_done: ints, asked for and made.
        tokens_per_step: int.
        batch_losses: of the batches of validation text that `loss` is the
            mean of, which are the same for all runs.
        max_logit: largest attention logit of all steps, layers and heads.
        entropy: mean entropy of attention over layers and heads, at the end,
            as a fraction of the largest; NaN without tables.
        collapsed: share of the heads that look at a single key then.
        spike_score_paper, spike_score_olmo_core, spike_rate_robust: of the
            training loss, see those functions.
        verdict: the monitor's last.
        path: of the run's directory, or None.
        stable: bool. Whether it converged, with spikes or without.

    Raises:
        ValueError: for an ending, learning rate or seed that is none.

    >>> Outcome("baseline", 8e-3, seed=0, ending="diverged").stable
    False
    """

    label: str
    learning_rate: float
    seed: int
    ending: str
    loss: float = math.nan
    initial: float = math.nan
    steps: int = 0
    steps_done: int = 0
    tokens_per_step: int = 0
    batch_losses: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    max_logit: float = math.nan
    entropy: float = math.nan
    collapsed: float = math.nan
    spike_score_paper: float = math.nan
    spike_score_olmo_core: float = math.nan
    spike_rate_robust: float = math.nan
    verdict: str = ""
    path: str | None = None

    def __post_init__(self):
        check_choice(self.ending, ENDINGS, "ending")
        object.__setattr__(self, "learning_rate", rate_of(self.learning_rate))
        check_integer(self.seed, "`seed`", low=0)

    @property
    def stable(self):
        return self.ending in STABLE


def by_run(outcomes):
    """Outcomes of one arm by `(learning rate, seed)`.

    Raises:
        ValueError: for outcomes of several arms, or two of one run.
    """
    known, labels = {}, set()
    for outcome in outcomes:
        labels.add(outcome.label)
        run = (outcome.learning_rate, outcome.seed)
        if len(labels) > 1:
            raise ValueError(
                "These are outcomes of several arms: take those of one label. "
                f"Received: {', '.join(sorted(labels))}"
            )
        if run in known:
            raise ValueError(
                f"{outcome.label!r} has two outcomes at learning rate "
                f"{run[0]:g} with seed {run[1]}: {known[run].path} and "
                f"{outcome.path}. Leave one of them out."
            )
        known[run] = outcome
    return known


@dataclasses.dataclass(frozen=True)
class StabilityInterval:
    """Between which learning rates an arm stops to be stable.

    A rate is stable if all of its runs are.

    Attributes:
        last_stable: the highest stable rate below `first_unstable`, or None.
        first_unstable: the lowest unstable rate, or None.
        counts: `{rate: (stable, runs)}`, of all rates by size.
        monotone: bool. Whether no stable rate is above an unstable one.
        failed: `(rate, seed)` of runs without a result, which count nowhere.
        low, high: the same ends as numbers: 0 and infinity for None.
        stable_above: stable rates above `first_unstable`.

    >>> print(StabilityInterval(6e-3, 8e-3, {6e-3: (3, 3), 8e-3: (1, 3)}))
    0.006 (3/3) to 0.008 (1/3)
    """

    last_stable: float | None = None
    first_unstable: float | None = None
    counts: dict = dataclasses.field(default_factory=dict)
    monotone: bool = True
    failed: tuple = ()

    @property
    def low(self):
        return self.last_stable or 0.0

    @property
    def high(self):
        return self.first_unstable or math.inf

    @property
    def stable_above(self):
        return tuple(
            rate
            for rate, (stable, runs) in self.counts.items()
            if rate > self.high and stable == runs
        )

    def fraction(self, rate, level=0.95):
        """Wilson's interval of the fraction of runs that are stable there."""
        return wilson(*self.counts[rate_of(rate)], level=level)

    def __str__(self):
        def end(rate):
            stable, runs = self.counts[rate]
            return f"{rate:g} ({stable}/{runs})"

        if not self.counts:
            return "unknown"
        if self.last_stable is None:
            text = f"below {end(self.first_unstable)}"
        elif self.first_unstable is None:
            text = f"at least {end(self.last_stable)}"
        else:
            text = f"{end(self.last_stable)} to {end(self.first_unstable)}"
        if not self.monotone:
            text += (
                f"; stable again at {', '.join(map(end, self.stable_above))}"
            )
        return text


def stability_interval(outcomes):
    """What outcomes of one arm say, a `StabilityInterval`.

    Raises:
        ValueError: for outcomes of several arms, or two of one run.

    >>> stable = [Outcome("a", rate, 0, "converged") for rate in (1e-3, 2e-3)]
    >>> print(stability_interval([*stable, Outcome("a", 4e-3, 0, "diverged")]))
    0.002 (1/1) to 0.004 (0/1)
    """
    counts, failed = {}, []
    for run, outcome in sorted(by_run(outcomes).items()):
        if outcome.ending == "failed":
            failed.append(run)
            continue
        stable, runs = counts.get(run[0], (0, 0))
        counts[run[0]] = (stable + outcome.stable, runs + 1)
    unstable = [
        rate for rate, (stable, runs) in counts.items() if stable < runs
    ]
    first = min(unstable, default=None)
    below = [rate for rate in counts if first is None or rate < first]
    return StabilityInterval(
        max(below, default=None),
        first,
        counts,
        # Those above the first are unstable without a gap.
        monotone=[*counts][len(below) :] == unstable,
        failed=tuple(failed),
    )


def compare(first, second):
    """The ratio of two arms' largest stable rates, an interval.

    ```
    (low_1 / high_2, high_1 / low_2)
    ```

    Args:
        first, second: `StabilityInterval`s.

    Returns:
        Tuple of two floats, 0 and infinity for what is not bounded.

    >>> a = StabilityInterval(6e-2, 8e-2, {6e-2: (3, 3), 8e-2: (0, 3)})
    >>> b = StabilityInterval(4e-2, 5e-2, {4e-2: (3, 3), 5e-2: (0, 3)})
    >>> compare(a, b)
    (1.2, 2.0)
    """
    largest = first.high / second.low if second.low else math.inf
    return first.low / second.high, largest


def reproduces(ratio, claim=1.5):
    """What an interval of a ratio says of a claim such as "1.5 times".

    Args:
        ratio: `(low, high)`, see `compare`.
        claim: float greater than 1.

    Returns:
        `"reproduced"` if the interval excludes 1 and does not end below the
        claim, `"weaker"` if it excludes 1 and does, `"contradicted"` if it
        ends at 1 or below, `"open"` if it holds 1.

    Raises:
        ValueError: for another claim.

    >>> reproduces((1.2, 2.0)), reproduces((0.9, 1.8))
    ('reproduced', 'open')
    """
    if not claim > 1:
        raise ValueError(
            "A claim is a ratio greater than 1: turn the ratio round. "
            f"Received: claim={claim!r}"
        )
    low, high = ratio
    if high <= 1:
        return "contradicted"
    if low <= 1:
        return "open"
    return "reproduced" if high >= claim else "weaker"


def _finite(values):
    return [value for value in values if math.isfinite(value)]


def _capped(outcomes):
    """`min(loss, initial)` by `{seed: {rate: loss}}`, of runs with a result."""
    runs = [o for o in outcomes if o.ending != "failed"]
    # A run that was lost at once has the beginning of the others.
    usual = _finite(o.initial for o in runs)
    usual = statistics.median(usual) if usual else math.nan
    losses = {}
    for o in runs:
        chance = o.initial if math.isfinite(o.initial) else usual
        values = _finite((o.loss, chance))
        loss = min(values) if values else math.nan
        losses.setdefault(o.seed, {})[o.learning_rate] = loss
    return losses


def lr_sensitivities(outcomes, rates=None):
    """LR sensitivity of one arm, of each seed.

    ```
    S = mean over rates of min(loss, initial) - min over rates of the same
    ```

    with final validation losses; `initial` for what is not finite. Zero is a
    method that does not care for its learning rate, and also one that learns
    nothing at any. Meant for rates of equal ratios, and for methods that do
    not change what a learning rate means.

    Args:
        outcomes: `Outcome`s of one arm.
        rates: learning rates. Defaults to all that some seed was run at.

    Returns:
        `{seed: S}` of the seeds that have a result at all of the rates.

    Raises:
        ValueError: for outcomes of several arms, or two of one run.

    Reference:
        [Wortsman et al., 2023](https://arxiv.org/abs/2309.14322), section 2.2
    """
    losses = _capped(by_run(outcomes).values())
    if rates is None:
        rates = {rate for found in losses.values() for rate in found}
    rates = [rate_of(rate) for rate in rates]
    found = {}
    for seed, own in sorted(losses.items()):
        if rates and all(rate in own for rate in rates):
            values = [own[rate] for rate in rates]
            found[seed] = statistics.fmean(values) - min(values)
    return found


def lr_sensitivity(outcomes, rates=None):
    """The mean over seeds of `lr_sensitivities`; NaN if no seed has one.

    >>> ends = {1e-3: 2.0, 1e-2: 2.5, 1e-1: 9.0}
    >>> lr_sensitivity(
    ...     Outcome("a", rate, 0, "converged", loss=loss, initial=5.0)
    ...     for rate, loss in ends.items()
    ... )
    1.1666666666666665
    """
    values = [*lr_sensitivities(outcomes, rates).values()]
    return statistics.fmean(values) if values else math.nan


def best_rate(outcomes):
    """The rate of the lowest final loss, a mean over seeds; None if none is.

    Of rates with fewer seeds than others, the mean is over those.
    """
    losses = {}
    for o in by_run(outcomes).values():
        if o.ending != "failed":
            losses.setdefault(o.learning_rate, []).append(o.loss)
    means = {rate: statistics.fmean(own) for rate, own in losses.items()}
    means = {rate: m for rate, m in means.items() if math.isfinite(m)}
    return min(means, key=means.get) if means else None


def stability_margin(outcomes):
    """How far above the best rate an arm is stable, `(low, high)`.

    The ends of its stability interval, divided by `best_rate`; NaN without.
    """
    outcomes = [*outcomes]
    interval, best = stability_interval(outcomes), best_rate(outcomes)
    if best is None:
        return math.nan, math.nan
    return interval.low / best, interval.high / best


def final_loss(outcomes, rate):
    """Final validation loss at one rate, over seeds and over tokens.

    The first interval says how another seed would do, the second how another
    validation text would, of as many batches: the losses of each batch are
    averaged over seeds before. `.exp()` of either is that of the perplexity.

    Args:
        outcomes: `Outcome`s of one arm.
        rate: learning rate.

    Returns:
        Two `Estimate`s, by Student's t. NaN if there are no such runs, or if
        one of them has no finite loss.

    Raises:
        ValueError: for outcomes of several arms, or two of one run.
    """
    runs = by_run(outcomes).items()
    runs = [outcome for run, outcome in runs if run[0] == rate_of(rate)]
    runs = [outcome for outcome in runs if outcome.ending != "failed"]
    batches = {len(o.batch_losses) for o in runs}
    tokens = Estimate(math.nan, math.nan, math.nan, 0)
    if len(batches) == 1 and batches != {0}:
        rows = zip(*(o.batch_losses for o in runs))
        tokens = student([statistics.fmean(row) for row in rows])
    return student(o.loss for o in runs), tokens
