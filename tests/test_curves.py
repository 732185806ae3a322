"""What is kept of curves and tables, and that it is what was there."""

import keras
import numpy as np
import pytest

from keras_stable.curves import decimate
from keras_stable.curves import numbers
from keras_stable.curves import pack
from keras_stable.curves import thin
from keras_stable.curves import trailing_median
from keras_stable.curves import unpack

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="numpy alone, tested once"
)


@pytest.mark.parametrize("length", [1, 7, 99, 100, 101, 2000, 12345])
@pytest.mark.parametrize("points", [8, 100, 1000])
def test_decimated_curves_keep_extremes_and_ends(length, points):
    random = np.random.default_rng(length)
    steps = np.arange(length) * 3
    values = random.standard_normal(length)
    spike = random.integers(length)
    values[spike] = 50.0
    x, y = decimate(steps, values, points)
    assert len(x) == len(y) <= max(points, length if length <= points else 0)
    assert (x[0], x[-1]) == (0, steps[-1]) and (np.diff(x) > 0).all()
    # Points of the curve, nothing between them.
    np.testing.assert_array_equal(y, values[x // 3])
    assert y.max() == values.max() and y.min() == values.min()
    # Every piece of the curve has its extremes near.
    if length > points >= 100:
        piece = length // ((points - 2) // 3) + 2
        for begin in range(0, length - 2 * piece, piece):
            near = (x >= 3 * (begin - piece)) & (x < 3 * (begin + 2 * piece))
            whole = values[begin : begin + piece]
            assert y[near].max() >= whole.max()
            assert y[near].min() <= whole.min()


def test_what_is_not_finite_stays_a_gap():
    values = np.sin(np.arange(3000))
    values[1000:1100] = np.nan
    values[2000] = np.inf
    x, y = decimate(np.arange(3000), values, 300)
    bad = x[~np.isfinite(y)]
    assert ((bad >= 1000) & (bad < 1100)).any() and 2000 in bad
    assert np.nanmax(y[np.isfinite(y)]) == np.nanmax(values[values < 2])
    assert len(decimate(range(500), [np.nan] * 500, 100)[0]) <= 100


def test_trailing_median_is_the_median_of_what_is_finite():
    values = np.random.default_rng(0).standard_normal(200)
    values[[3, 4, 5, 90]] = np.nan, np.inf, -np.inf, np.nan
    found = trailing_median(values, 7)
    for t in range(200):
        window = values[max(0, t - 6) : t + 1]
        window = window[np.isfinite(window)]
        assert found[t] == pytest.approx(np.median(window), abs=1e-12)
    assert np.isnan(trailing_median([np.nan] * 9, 3)).all()


def test_thinned_tables_are_evenly_spread():
    steps = list(range(1000))
    for rows, cells in ((1, 10), (96, 8000), (400, 100), (0, 5)):
        kept = thin(steps, rows, cells)
        assert kept[0] == 0 and kept[-1] == 999
        assert len(kept) == len(set(kept)) <= max(2, cells // max(rows, 1))
        assert np.ptp(np.diff(kept)) <= 1
    assert thin([5], 10, 10) == [0] and thin([], 1, 1) == []


@pytest.mark.parametrize("kind, error", [("f4", 1e-6), ("i2", 2e-5)])
def test_packed_arrays_are_read_again(kind, error):
    values = np.random.default_rng(1).standard_normal((7, 50)) * 100
    values[2, 3], values[4, 5] = np.nan, np.inf
    packed = pack(values, kind)
    found = unpack(packed)
    assert found.shape == (7, 50) and np.isnan(found[[2, 4], [3, 5]]).all()
    values = np.where(np.isfinite(values), values, np.nan)
    most = np.nanmax(np.abs(values))
    np.testing.assert_allclose(found, values, atol=error * most, rtol=0)
    assert len(packed["data"]) < values.size * int(kind[1]) * 4 / 3 + 4
    assert unpack(pack([[0.0, 0.0]], kind)).tolist() == [[0.0, 0.0]]
    assert np.isnan(unpack(pack([np.nan], kind))).all()


def test_numbers_of_whatever_there_is():
    found = numbers([1, 2.5, "3", "nan", "-inf", None, [], {}, "x", 10**400])
    assert found[:3].tolist() == [1, 2.5, 3] and found[4] == -np.inf
    assert np.isnan(found[[3, *range(5, 10)]]).all()
