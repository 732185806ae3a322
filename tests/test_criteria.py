"""Scores and classes of whole runs."""

import doctest
import math

import numpy as np
import pytest

from keras_stable import criteria


def test_examples():
    assert not doctest.testmod(criteria).failed


def naive_olmo_core(loss, norm, window, sigma):
    spikes = 0
    for step in range(window, len(loss)):
        spike = False
        for values in (loss, norm):
            past = values[step - window : step]
            mean = sum(past) / window
            std = math.sqrt(sum((x - mean) ** 2 for x in past) / window)
            spike |= std >= 1e-10 and values[step] > mean + sigma * std
        spikes += spike
    return spikes / len(loss)


@pytest.mark.parametrize("seed", range(3))
def test_olmo_core_score_is_the_naive_one(seed):
    rng = np.random.default_rng(seed)
    loss = 2.8 + 8 * np.exp(-np.arange(6000) / 300)
    loss += 0.03 * rng.standard_t(3, 6000)
    norm = np.exp(0.3 * rng.standard_t(3, 6000))
    norm[4000:4500] = 1.0  # No deviations: nothing to count in.
    loss[5000], norm[100] = np.nan, np.inf
    score = criteria.spike_score_olmo_core(loss, norm)
    naive = naive_olmo_core(loss.tolist(), norm.tolist(), 128, 6.0)
    assert score == naive and 0 < score < 0.1


def test_paper_score_is_two_sided_and_in_percent():
    rng = np.random.default_rng(0)
    values = 3 + 0.01 * rng.standard_normal(5000)
    values[[500, 2000, 3000, 4000]] += [1, 1, -1, 0.01]  # 500: no window yet.
    expected = 0
    for step in range(1000, 5000):
        past = values[step - 1000 : step]
        expected += abs(values[step] - past.mean()) >= 7 * past.std()
    score = criteria.spike_score_paper(values)
    assert score == 100 * expected / 5000 == 0.04


def test_robust_rate_counts_what_the_window_surrounds():
    values = np.linspace(6, 3, 1201)  # A steep descent is no spike.
    values[[50, 400, 401, 1190]] += 0.3
    assert criteria.spike_rate_robust(values) == pytest.approx(1e4 * 2 / 1001)


def test_short_curves_have_no_score():
    assert math.isnan(criteria.spike_score_paper([3.0] * 1000))
    assert math.isnan(criteria.spike_score_olmo_core([3.0] * 9, [1.0] * 9))
    assert math.isnan(criteria.spike_rate_robust([3.0] * 200))


def curve(steps=1000, seed=0):
    rng = np.random.default_rng(seed)
    descent = 4.3 * np.exp(-np.arange(steps) / min(60, steps / 20))
    return 1.2 + descent + 0.03 * rng.standard_normal(steps)


@pytest.mark.parametrize("steps", [300, 1000, 3000])
def test_classes(steps):
    classify = criteria.classify
    for seed in range(5):
        losses = curve(steps, seed)
        assert classify(losses) == "converged"
        assert classify(losses.tolist(), np.ones(steps)) == "converged"
        spiked = losses.copy()
        spiked[int(0.8 * steps) :][:8] += 1.5
        assert classify(spiked) == "spiked"
        for late, found in ((0.8, "diverged"), (0.99, "spiked")):
            lost = losses.copy()
            lost[int(late * steps) :] += 1.5  # Too late to be sure.
            assert classify(lost) == found, (late, steps)
        # Up by 1.5 nats, and back.
        lost[steps // 2 : int(0.8 * steps)] += 1.5
        lost[int(0.8 * steps) :] = losses[int(0.8 * steps) :]
        assert classify(lost) == "spiked"
        assert classify(losses[::-1]) == "diverged"
        assert classify(np.full(steps, 5.5)) == "diverged"


def test_classes_by_validation():
    losses = curve()

    def classify(**kwargs):
        return criteria.classify(losses, **kwargs)

    assert classify(validation=1.3, unigram=3.2) == "converged"
    assert classify(validation=3.3, unigram=3.2) == "diverged"
    assert classify(validation=3.3, initial=3.0) == "diverged"
    assert classify(validation=1.6, best_validation=1.3) == "degraded"
    assert classify(validation=1.5, best_validation=1.3) == "converged"
    degraded = classify(validation=1.5, best_validation=1.3, gap=0.1)
    assert degraded == "degraded"
    assert classify(validation=float("inf")) == "nonfinite"
    assert classify(gradient_norms=[1.0, float("nan")]) == "nonfinite"
    losses[-1] = np.nan
    assert classify() == "nonfinite"


@pytest.mark.parametrize(
    "call, what",
    [
        (lambda: criteria.classify([]), r"`losses`.*\(0,\)"),
        (lambda: criteria.classify([[1.0]]), r"`losses`.*\(1, 1\)"),
        (lambda: criteria.classify([1.0], rise=-1), "`rise` must be at least"),
        (lambda: criteria.spike_score_paper([1.0], window=1), "`window`"),
        (lambda: criteria.spike_score_paper([1.0], sigma=0), "`sigma`"),
        (
            lambda: criteria.spike_score_olmo_core([1.0], [1.0, 2.0]),
            "1 and 2 values",
        ),
        (lambda: criteria.spike_rate_robust([1.0], window=200), "odd.*200"),
    ],
)
def test_nonsense_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()
