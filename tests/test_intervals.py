"""Intervals and ranks against tables, closed forms and simulation."""

import math

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable.intervals import student_quantile

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="no backend takes part"
)


# Of every table of the t distribution.
@pytest.mark.parametrize(
    "probability, freedom, t",
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 3, 3.1824),
        (0.975, 4, 2.7764),
        (0.975, 10, 2.2281),
        (0.975, 63, 1.9983),
        (0.995, 2, 9.9248),
        (0.95, 5, 2.0150),
        (0.90, 7, 1.4149),
        (0.5, 3, 0.0),
    ],
)
def test_student_quantiles_are_those_of_the_tables(probability, freedom, t):
    assert student_quantile(probability, freedom) == pytest.approx(t, abs=1e-4)
    lower = student_quantile(1 - probability, freedom)
    assert lower == pytest.approx(-t, abs=1e-4)


def test_student_by_hand():
    found = ks.student([1.0, 2.0, 3.0])
    # s = 1, so 4.3027 / sqrt(3).
    assert found.mean == 2.0 and found.count == 3
    assert found.high - 2 == pytest.approx(2.48414, abs=1e-5)
    assert 2 - found.low == pytest.approx(2.48414, abs=1e-5)
    assert ks.student([0.0, 0.0]).low == 0.0
    assert str(found) == "2 [-0.4841, 4.484]"


def test_student_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for count, level in ((3, 0.95), (3, 0.5), (8, 0.8)):
        found = [
            ks.student(rng.normal(1.0, 2.0, count), level) for _ in range(3000)
        ]
        covered = np.mean([f.low < 1.0 < f.high for f in found])
        # Three standard deviations of the count.
        slack = 3 * math.sqrt(level * (1 - level) / 3000)
        assert covered == pytest.approx(level, abs=slack)


def test_few_values_and_bad_ones():
    one = ks.student([2.0])
    assert (one.mean, one.low, one.high) == (2.0, -math.inf, math.inf)
    assert str(one) == "2" and one.exp().low == 0.0
    for values in ([], [1.0, math.nan], [1.0, math.inf]):
        found = ks.student(values)
        assert math.isnan(found.mean) and math.isnan(found.low)
        assert math.isnan(found.exp().mean)
    assert ks.Estimate(800.0, 1.0, 801.0, 2).exp().mean == math.inf


def test_wilson_by_hand():
    # z = 1.959964: 1 / (1 + z^2 / 3), z^2 / (2 * 3) and so on.
    assert ks.wilson(3, 3) == pytest.approx((0.4385, 1.0), abs=1e-4)
    assert ks.wilson(0, 3) == pytest.approx((0.0, 0.5615), abs=1e-4)
    assert ks.wilson(1, 2) == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert ks.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert ks.wilson(0, 0) == (0.0, 1.0)
    # It is the set of p whose own noise reaches k / n.
    low, high = ks.wilson(2, 7, level=0.9)
    for p in (low, high):
        z = abs(2 / 7 - p) / math.sqrt(p * (1 - p) / 7)
        assert z == pytest.approx(1.6449, abs=1e-4)
    for k, n in ((4, 3), (-1, 3)):
        with pytest.raises(ValueError, match=f"Received: {k} of {n}"):
            ks.wilson(k, n)
    with pytest.raises(ValueError, match="`level` must be in"):
        ks.wilson(1, 3, level=95)


def test_rank_correlation():
    rank = ks.rank_correlation
    assert rank([1, 2, 3], [10, 20, 30]) == 1.0
    assert rank([1, 2, 3], [9, 4, 1]) == -1.0
    # 1 - 6 sum(d^2) / (n (n^2 - 1)), without ties.
    assert rank([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    # Ties share their mean rank: 1.5, 1.5, 3 against 1, 2, 3.
    assert rank([5, 5, 7], [1, 2, 3]) == pytest.approx(0.8660254)
    # Infinity is a rank like others; a monotone map changes nothing.
    a, b = [0.1, 3.0, math.inf, 2.0], [1.0, 7.0, 9.0, 8.0]
    assert rank(a, b) == rank([math.atan(x) for x in a], np.square(b)) == 0.8
    for bad in ([1, 1, 1], [1, 2, math.nan]):
        assert math.isnan(rank(bad, [1, 2, 3]))
    with pytest.raises(ValueError, match="one length"):
        rank([1, 2], [1, 2, 3])
