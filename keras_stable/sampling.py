"""Searching for the best learning rate with Optuna's sampler.

Optuna is optional: `pip install 'keras-stable[lab]'`.
"""

import dataclasses
import math
import statistics
import warnings

from keras_stable.choices import check_integer
from keras_stable.lr_search import check_range
from keras_stable.lr_search import check_seeds
from keras_stable.stability import by_run
from keras_stable.stability import rate_of


@dataclasses.dataclass(frozen=True)
class TPESearch:
    """Learning rates where Optuna expects the lowest final loss.

    The loss of a rate is the mean over seeds. A rate at which a run was not
    stable is an infeasible trial without a value, so that it is kept away
    from; one that gave no result is a failed trial, which Optuna leaves out:
    NaN never enters. The study is made anew of the outcomes in
    every call, in the order of their rates, so that it needs no database and
    the same outcomes lead to the same runs. Outcomes of other searches are
    made use of.

    `startup` rates, of equal ratios from `low` to `high`, come first and
    together; then one rate at a time, its seeds together.

    Args:
        low, high: floats. Learning rates searched.
        trials: int. Number of rates.
        startup: int, at least 2. Defaults to 5.
        seeds: ints. Defaults to (0,).
        sampler_seed: int, of the sampler's random numbers. Defaults to 0.

    Raises:
        ValueError: for an empty range or fewer trials than `startup`.

    Reference:
        [Akiba et al., 2019](https://arxiv.org/abs/1907.10902)

    >>> TPESearch(1e-3, 1e-1, trials=8, startup=3).wanted([])
    [(0.001, 0), (0.01, 0), (0.1, 0)]
    """

    low: float
    high: float
    trials: int
    startup: int = 5
    seeds: tuple[int, ...] = (0,)
    sampler_seed: int = 0

    def __post_init__(self):
        check_range(self.low, self.high)
        check_integer(self.startup, "`startup`", low=2)
        check_integer(self.trials, "`trials`", low=self.startup)
        check_integer(self.sampler_seed, "`sampler_seed`", low=0)
        object.__setattr__(self, "seeds", check_seeds(self.seeds))

    def wanted(self, outcomes):
        """The runs to make next, `[(learning rate, seed)]`; [] at the end.

        Args:
            outcomes: `Outcome`s of one arm.

        Raises:
            ImportError: if Optuna is not installed.
        """
        known = by_run(outcomes)
        octaves = math.log(self.high / self.low)
        rates = {
            rate_of(self.low * math.exp(octaves * i / (self.startup - 1)))
            for i in range(self.startup)
        }
        rates = sorted(rates | {rate for rate, _ in known})
        missing = [
            (rate, seed)
            for rate in rates
            for seed in self.seeds
            if (rate, seed) not in known
        ]
        if missing or len(rates) >= self.trials:
            return missing
        new = self._propose(known, rates)
        return [(rate, seed) for rate in new for seed in self.seeds]

    def _propose(self, known, rates):
        optuna = _optuna()
        states = optuna.trial.TrialState
        with warnings.catch_warnings():
            # Constraints are said to be experimental, since 2022.
            kind = optuna.exceptions.ExperimentalWarning
            warnings.simplefilter("ignore", kind)
            sampler = optuna.samplers.TPESampler(
                # Another for every number of trials, the same for the same.
                seed=self.sampler_seed + len(rates),
                n_startup_trials=self.startup,
                constraints_func=lambda trial: trial.user_attrs["lost"],
            )
        study = optuna.create_study(sampler=sampler)
        space = {
            "learning_rate": optuna.distributions.FloatDistribution(
                self.low, self.high, log=True
            )
        }
        for rate in rates:
            if not self.low <= rate <= self.high:
                continue
            runs = [o for (own, _), o in known.items() if own == rate]
            runs = [o for o in runs if o.ending != "failed"]
            lost = not all(o.stable and math.isfinite(o.loss) for o in runs)
            study.enqueue_trial(
                {"learning_rate": rate},
                user_attrs={"lost": (1.0 if lost else -1.0,)},
            )
            trial = study.ask(space)
            if runs and not lost:
                study.tell(trial, statistics.fmean(o.loss for o in runs))
            else:
                state = states.PRUNED if lost else states.FAIL
                study.tell(trial, state=state)
        for _ in range(100):
            # Rounded to six digits, it may be one that is known.
            rate = rate_of(study.ask(space).params["learning_rate"])
            if rate not in rates:
                return [rate]
        return []


def _optuna():
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "TPESearch samples with Optuna, which is not installed: pip "
            "install 'keras-stable[lab]'. `Bisection` needs nothing."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
