"""What the monitor costs: modes that take turns, and the README's numbers."""

import concurrent.futures
import importlib.util
import json
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def overhead():
    spec = importlib.util.spec_from_file_location(
        "overhead", RECIPES / "overhead.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_modes_take_turns_also_if_one_fails(overhead):
    names, made = ("a", "b", "c"), []
    member = overhead.turnstile(names)

    def work(name):
        with member(name) as (begin, end):
            for turn in range(3):
                begin()
                made.append((name, turn))
                if (name, turn) == ("b", 1):
                    raise ValueError("broken")
                end()

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = [pool.submit(work, name) for name in names]
        errors = [future.exception(timeout=60) for future in found]
    assert [type(error) for error in errors] == [
        *(type(None), ValueError, type(None))
    ]
    assert made == [
        *(("a", 0), ("b", 0), ("c", 0)),
        *(("a", 1), ("b", 1), ("c", 1)),
        *(("a", 2), ("c", 2)),
    ]


def test_shares_are_those_of_rounds(overhead):
    modes = {
        "plain": {"epochs": [1.0, 2.0, 4.0]},
        "guard": {"epochs": [1.1, 2.2, 5.2]},
    }
    median, error = overhead.beyond(modes, "guard", "plain")
    assert median == pytest.approx(0.1)
    # Of shares 0.1, 0.1 and 0.3.
    assert error == pytest.approx((0.04 / 3) ** 0.5 / 3**0.5)


@pytest.mark.parametrize("shape, file", [("8 x 64", "_512"), ("8 x 256", "")])
def test_costs_are_those_of_the_committed_runs(overhead, shape, file):
    path = RECIPES / "results" / f"overhead_cpu_rescue{file}.json"
    modes = json.loads(path.read_text())["modes"]
    pairs = ("guard", "default"), ("recover", "guard")
    shares = [overhead.beyond(modes, *pair) for pair in pairs]
    row = (
        f"| {shape} | {modes['plain']['milliseconds']:.1f} "
        f"| {100 * modes['default']['overhead']:+.1f} % | "
        + " | ".join(f"{100 * a:+.1f} ± {100 * b:.1f} %" for a, b in shares)
        + " |"
    )
    assert row in (RECIPES / "README.md").read_text()
