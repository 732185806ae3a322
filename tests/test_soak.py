"""The soak's statistics: an interval that is as sure as it says."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
soak = importlib.import_module("soak")


def noise(rng, memory, count=400):
    """AR(1): x_t = memory x_(t-1) + e_t, of variance one."""
    steps = rng.normal(size=count) * (1 - memory**2) ** 0.5
    values = [rng.normal()]
    for step in steps[1:]:
        values.append(memory * values[-1] + step)
    return np.array(values)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_slopes_of_noise_hold_zero(memory):
    rng = np.random.default_rng(1)
    times = np.arange(400.0)
    found = [soak.slope(times, noise(rng, memory)) for _ in range(400)]
    held = np.mean([low <= 0 <= high for _, low, high in found])
    # 95 %, within three deviations of 400 draws; neighbouring blocks are
    # alike a little at 0.9.
    assert (0.90 if memory == 0.9 else 0.917) < held < 0.983
    assert abs(np.mean([slope for slope, *_ in found])) < 3e-4


def test_a_slope_is_found_among_outliers():
    rng = np.random.default_rng(2)
    times = np.arange(400.0)
    held = []
    for slope in [0.02, -0.02] * 100:
        values = noise(rng, 0.5) + slope * times
        # A neighbour, a tenth of the time.
        values[rng.random(400) < 0.1] += 50
        found, low, high = soak.slope(times, values)
        assert np.sign(low) == np.sign(found) == np.sign(high) == np.sign(slope)
        held.append(low <= slope <= high)
    assert np.mean(held) > 0.9


def test_a_constant_has_no_slope():
    assert soak.slope(np.arange(400.0), np.full(400, 12.0)) == (0.0, 0.0, 0.0)


def test_a_short_soak_leaves_its_results(tmp_path):
    seconds = np.linspace(0, 600, 200)
    series = {"seconds": seconds, **{n: np.ones(200) for n in soak.SERIES}}
    series["resident"] = 1000 + seconds / 36
    slopes = soak.judge(series, 0.2)
    assert not slopes["resident"]["holds_zero"]
    assert slopes["resident"]["slope_per_hour"] == pytest.approx(100)
    assert all(slopes[name]["holds_zero"] for name in ("files", "step"))
    soak.draw(series, slopes, 0.2, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_a_process_is_looked_at(tmp_path):
    before = soak.look()
    with open(tmp_path / "a", "w"):
        during = soak.look()
    after = soak.look()
    assert during[1] == before[1] + 1 == after[1] + 1
    assert before[0] > 10 and before[2] >= 1


def test_the_lab_book_has_the_results():
    recipes = Path(soak.__file__).parent
    results = json.loads((recipes / "results/soak-jax.json").read_text())
    series = {k: np.array(v) for k, v in results["series"].items()}
    slopes = soak.judge(series, results["config"]["warmup"])
    assert series["seconds"][-1] >= 1800
    assert all(slopes[name]["holds_zero"] for name in soak.JUDGED)
    book = (recipes / "README.md").read_text()
    for name in ("resident", "step"):
        found = slopes[name]
        low, high = found["low"], found["high"]
        assert f"| {found['slope_per_hour']:+.1f} {found['unit']} |" in book
        assert f"| [{low:+.1f}, {high:+.1f}] |" in book, name
