"""Searches on objectives whose boundary is known, by what they cost."""

import dataclasses
import importlib.util
import math

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable.sampling import TPESearch

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="no backend takes part"
)

SEARCH = ks.Bisection(1e-3, 1e-1)
CELL = math.log(SEARCH.rates[1] / SEARCH.rates[0])


def run(search, stable, known=(), lost="diverged"):
    """Makes every run that a search wants; all outcomes."""
    known = list(known)
    for _ in range(200):
        wanted = search.wanted(known)
        # Pure, and nothing is asked for twice.
        assert wanted == search.wanted(known[::-1])
        runs = {(o.learning_rate, o.seed) for o in known}
        assert len(set(wanted)) == len(wanted) and not runs & {*wanted}
        if not wanted:
            return known
        for rate, seed in wanted:
            ending = "converged" if stable(rate, seed) else lost
            known.append(ks.Outcome("a", rate, seed, ending))
    raise AssertionError("the search does not end")


def sharp(edge):
    return lambda rate, seed: rate <= edge


def noisy_edges(edge, cells, trial=0):
    """Every seed has an edge of its own."""

    def stable(rate, seed):
        rng = np.random.default_rng([trial, seed])
        return rate <= edge * math.exp(cells * CELL * rng.normal())

    return stable


def noisy_runs(edge, cells, trial=0):
    """Every run is a coin, the fairer the nearer it is to the edge."""

    def stable(rate, seed):
        rng = np.random.default_rng([trial, seed, round(1e9 * rate)])
        chance = 1 / (1 + math.exp(math.log(rate / edge) / (cells * CELL)))
        return rng.uniform() < chance

    return stable


def full_grid(search, stable):
    ladder = ks.Ladder(search.rates, search.seeds)
    return ks.stability_interval(run(ladder, stable))


def is_cheap(search, outcomes, share=0.4):
    whole = len(search.rates) * len(search.seeds)
    return len(outcomes) <= share * whole


def test_grid():
    assert SEARCH.rates[0] == 1e-3 and SEARCH.rates[-1] == 1e-1
    steps = np.diff(np.log(SEARCH.rates))
    assert np.ptp(steps) < 1e-4 and steps.max() < math.log(1.19) + 1e-5
    # One rate fewer would be too coarse.
    assert steps.max() * 27 / 26 > math.log(1.19)
    assert len(SEARCH.rates) == 28


@pytest.mark.parametrize("low, high", [(1e-3, 1e-1), (6e-3, 8e-2), (1e-4, 1)])
def test_sharp_boundaries_wherever_they_are(low, high):
    search = ks.Bisection(low, high)
    for i, rate in enumerate(search.rates[1:-1], 1):
        # In the middle of a cell.
        edge = rate * math.exp(CELL / 2)
        outcomes = run(search, sharp(edge))
        found = ks.stability_interval(outcomes)
        assert (found.last_stable, found.first_unstable) == search.rates[
            i : i + 2
        ]
        assert found.low <= edge < found.high <= 1.19001 * found.low
        assert found.counts[found.low] == (3, 3)
        assert found.counts[found.high] == (0, 3)
        assert found.monotone and is_cheap(search, outcomes)


def test_all_stable_and_all_unstable_are_half_open():
    outcomes = run(SEARCH, sharp(1.0))
    found = ks.stability_interval(outcomes)
    assert (found.low, found.high) == (0.1, math.inf)
    assert found.counts[0.1] == (3, 3) and is_cheap(SEARCH, outcomes)
    assert str(found) == "at least 0.1 (3/3)"
    outcomes = run(SEARCH, sharp(1e-4))
    found = ks.stability_interval(outcomes)
    assert (found.low, found.high) == (0.0, 0.001)
    assert found.counts[0.001] == (0, 3) and is_cheap(SEARCH, outcomes)
    assert str(found) == "below 0.001 (0/3)"
    assert str(ks.stability_interval([])) == "unknown"


@pytest.mark.parametrize("cells", [0.25, 1.0, 3.0])
def test_seeds_with_edges_of_their_own_give_the_grids_answer(cells):
    for trial in range(20):
        stable = noisy_edges(1.1e-2, cells, trial)
        outcomes = run(SEARCH, stable)
        found, whole = (
            ks.stability_interval(outcomes),
            full_grid(SEARCH, stable),
        )
        # Three times the runs find out the same.
        assert (found.low, found.high) == (whole.low, whole.high)
        for rate in (found.low, found.high):
            assert found.counts[rate] == whole.counts[rate]
        assert is_cheap(SEARCH, outcomes)


def test_repeats_agree_within_a_cell_in_nine_of_ten():
    found = []
    for trial in range(200):
        outcomes = run(SEARCH, noisy_runs(1.1e-2, 0.5, trial))
        found.append(ks.stability_interval(outcomes).low)
        assert is_cheap(SEARCH, outcomes)
    usual = np.median(found)
    agree = np.abs(np.log(np.array(found) / usual)) < 1.01 * CELL
    assert agree.mean() >= 0.9
    # They are not the same number: the noise is there.
    assert len(set(found)) > 1


def test_noise_of_several_cells_still_ends_with_all_seeds_at_both_ends():
    for trial in range(50):
        outcomes = run(SEARCH, noisy_runs(1.1e-2, 1.5, trial))
        found = ks.stability_interval(outcomes)
        assert found.counts[found.low] == (3, 3)
        stable, runs = found.counts[found.high]
        assert stable < runs == 3 and found.high < 1.19001 * found.low
        assert is_cheap(SEARCH, outcomes)


def test_non_monotone_ladders_are_told_and_not_hidden():
    def stable(rate, seed):
        return rate < 4e-3 or 1.5e-2 < rate < 3e-2

    outcomes = run(SEARCH, stable)
    found = ks.stability_interval(outcomes)
    assert found.low < 4e-3 < found.high < 1.19001 * found.low
    assert not found.monotone and is_cheap(SEARCH, outcomes)
    assert found.stable_above and all(
        1.5e-2 < rate < 3e-2 for rate in found.stable_above
    )
    assert "stable again at" in str(found)
    monotone = dataclasses.replace(found, monotone=True)
    assert "again" not in str(monotone)


def test_seeds_lost_at_the_lower_end_lead_on_below():
    # Seed 0 alone is stable up to 5e-2; the others up to 2.3e-3.
    def stable(rate, seed):
        return rate <= (5e-2 if seed == 0 else 2.3e-3)

    outcomes = run(SEARCH, stable)
    found = ks.stability_interval(outcomes)
    assert found.low <= 2.3e-3 < found.high < 1.19001 * found.low
    assert found.counts[found.low] == (3, 3)
    assert found.counts[found.high] == (1, 3)
    assert is_cheap(SEARCH, outcomes)
    # The seeds that are stable above are no stable rates.
    assert not found.monotone or not found.stable_above


@pytest.mark.parametrize("trial", range(20))
def test_any_part_of_the_outcomes_leads_to_the_same_end(trial):
    rng = np.random.default_rng(trial)
    stable = noisy_edges(1e-2, 1.0, trial)
    outcomes = run(SEARCH, stable)
    kept = [o for o in outcomes if rng.uniform() < rng.uniform()]
    again = ks.stability_interval(run(SEARCH, stable, known=kept))
    whole = ks.stability_interval(outcomes)
    assert (again.low, again.high) == (whole.low, whole.high)


def test_a_ladder_that_was_run_before_is_made_use_of():
    stable = sharp(1.5e-2)
    ladder = run(ks.Ladder("paper"), stable)
    search = ks.Bisection(6e-3, 8e-2)
    outcomes = run(search, stable, known=ladder)
    found = ks.stability_interval(outcomes)
    assert found.low <= 1.5e-2 < found.high < 1.19001 * found.low
    assert len(outcomes) < len(run(search, stable)) + 4


def test_nan_and_lost_runs_are_unstable():
    for lost in ("nonfinite", "diverged", "degraded"):
        outcomes = run(SEARCH, sharp(1e-2), lost=lost)
        assert all(math.isnan(o.loss) for o in outcomes)
        found = ks.stability_interval(outcomes)
        assert found.low <= 1e-2 < found.high


def test_failed_runs_say_nothing_and_are_not_tried_again():
    stable = sharp(1e-2)
    whole = ks.stability_interval(run(SEARCH, stable))
    # Seed 0 does not start anywhere: the others tell the same.
    failed = [ks.Outcome("a", r, 0, "failed") for r in SEARCH.rates]
    found = ks.stability_interval(run(SEARCH, stable, known=failed))
    assert (found.low, found.high) == (whole.low, whole.high)
    assert found.counts[found.low] == (2, 2)
    assert len(found.failed) == 28
    # No seed does at the lower end: the interval is wider by that cell.
    failed = [ks.Outcome("a", whole.low, s, "failed") for s in range(3)]
    found = ks.stability_interval(run(SEARCH, stable, known=failed))
    below = SEARCH.rates[SEARCH.rates.index(whole.low) - 1]
    assert (found.low, found.high) == (below, whole.high)
    # None does anywhere.
    failed = [
        ks.Outcome("a", r, s, "failed") for r in SEARCH.rates for s in range(3)
    ]
    assert SEARCH.wanted(failed) == []
    assert str(ks.stability_interval(failed)) == "unknown"


def test_ladder_wants_what_is_missing():
    ladder = ks.Ladder((4e-3, 1e-3, 2e-3), seeds=(0, 1))
    assert ladder.rates == (1e-3, 2e-3, 4e-3)
    known = [
        ks.Outcome("a", 2e-3, 0, "diverged"),
        ks.Outcome("a", 4e-3, 1, "failed"),
        ks.Outcome("a", 9e-3, 0, "converged"),
    ]
    assert ladder.wanted(known) == [
        (1e-3, 0),
        (4e-3, 0),
        (1e-3, 1),
        (2e-3, 1),
    ]
    assert ks.Ladder("paper").rates == ks.LADDERS["paper"]


def test_more_seeds_at_the_ends_of_a_ladder_alone():
    ladder = ks.Ladder("paper", seeds=(0,), at_ends=(1, 2))

    def stable(rate, seed):
        return rate <= (40e-3 if seed < 2 else 8e-3)

    outcomes = run(ladder, stable)
    found = ks.stability_interval(outcomes)
    # Seed 2 was lost at 40e-3 and 20e-3.
    assert found.counts == {
        6e-3: (1, 1),
        8e-3: (3, 3),
        20e-3: (2, 3),
        40e-3: (2, 3),
        60e-3: (0, 3),
        80e-3: (0, 1),
    }
    assert (found.low, found.high) == (8e-3, 20e-3)


BAD = [
    (lambda: ks.Ladder(()), "at least one and none twice"),
    (lambda: ks.Ladder((1e-3, 0.0010000001)), "none twice"),
    (lambda: ks.Ladder((0.0,)), "positive number. Received: 0.0"),
    (lambda: ks.Ladder((math.nan,)), "positive number. Received: nan"),
    (lambda: ks.Ladder("papper"), "Unknown ladder. Did you mean 'paper'"),
    (lambda: ks.Ladder((1e-3,), seeds=(1, 1)), "`seeds`.*none twice"),
    (lambda: ks.Ladder((1e-3,), seeds=(0.5,)), "`seeds` must be integers"),
    (lambda: ks.Ladder((1e-3,), (0,), at_ends=(0,)), "seeds and at_ends"),
    (lambda: ks.Bisection(1e-2, 1e-3), "low=0.01, high=0.001"),
    (lambda: ks.Bisection(1e-3, 1e-2, ratio=1.0), "`ratio`.*greater than 1"),
    (lambda: ks.Bisection(1e-3, 1e-2, seeds=()), "`seeds`.*at least one"),
    (lambda: ks.Outcome("a", 1e-3, 0, "converge"), "ending. Did you mean"),
    (lambda: ks.Outcome("a", -1e-3, 0, "converged"), "positive number"),
    (lambda: ks.Outcome("a", 1e-3, "0", "converged"), "`seed` must be an"),
    (lambda: TPESearch(1e-2, 1e-3, trials=5), "`low` must be less"),
    (lambda: TPESearch(1e-3, 1e-2, trials=3), "`trials`.*at least 5"),
    (lambda: TPESearch(1e-3, 1e-2, 9, seeds=(0, 0)), "`seeds`.*none twice"),
]


@pytest.mark.parametrize("make, pattern", BAD)
def test_nonsense_is_refused(make, pattern):
    with pytest.raises(ValueError, match=pattern):
        make()


def test_outcomes_of_several_arms_or_twice_of_one_run_are_refused():
    one, other = (ks.Outcome(x, 1e-3, 0, "converged", path=x) for x in "ab")
    for look in (SEARCH.wanted, ks.Ladder((1e-3,)).wanted):
        with pytest.raises(ValueError, match="several arms.*a, b"):
            look([one, other])
        with pytest.raises(ValueError, match="two outcomes at learning rate"):
            look([one, dataclasses.replace(one, path="c")])


# Optuna.

optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="Optuna is optional"
)


def valley(rate, seed):
    """Lost above 2e-2, without a loss; the best rate is 5e-3."""
    if rate > 2e-2:
        loss = math.nan if rate > 5e-2 else 7.0
        return ks.Outcome("a", rate, seed, "nonfinite", loss=loss)
    loss = 2 + abs(math.log10(rate / 5e-3)) + 0.01 * seed
    return ks.Outcome("a", rate, seed, "converged", loss=loss)


@optuna
def test_optuna_from_outcomes_alone():
    search = TPESearch(1e-3, 1e-1, trials=16, seeds=(0, 1))
    known = []
    while wanted := search.wanted(known):
        assert wanted == search.wanted(known[::-1])
        assert {seed for _, seed in wanted} <= {0, 1}
        assert all(1e-3 <= rate <= 1e-1 for rate, _ in wanted)
        # The two seeds of a rate may end one after the other.
        known.append(valley(*wanted[0]))
    rates = [rate for rate, seed in search.wanted([])]
    assert len(known) == 32 and {o.learning_rate for o in known} >= {*rates}
    proposed = {o.learning_rate for o in known} - {*rates}
    # Lost rates are kept away from: by chance it would be a third of them.
    assert sum(rate > 2e-2 for rate in proposed) <= 2
    assert 3e-3 < ks.best_rate(known) < 8e-3


@optuna
def test_optuna_outlives_runs_that_all_fail_or_are_lost():
    for ending in ("failed", "nonfinite"):
        search, known = TPESearch(1e-3, 1e-1, trials=8), []
        while wanted := search.wanted(known):
            known += [ks.Outcome("a", *run, ending) for run in wanted]
        assert len(known) == 8 and ks.best_rate(known) is None


def test_optuna_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    search = TPESearch(1e-3, 1e-1, trials=6)
    known = [valley(*run) for run in search.wanted([])]
    with pytest.raises(ImportError, match=r"pip install 'keras-stable\[lab\]"):
        search.wanted(known)
