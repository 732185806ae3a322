"""What the monitor costs: modes that take turns, and the README's numbers."""

import concurrent.futures
import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.append(str(RECIPES))  # What `python recipes/...` has by itself.
overhead = importlib.import_module("overhead")


def test_modes_take_turns_also_if_one_fails():
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


def test_shares_are_those_of_rounds():
    modes = {
        "plain": {"epochs": [1.0, 2.0, 4.0]},
        "guard": {"epochs": [1.1, 2.2, 5.2]},
    }
    median, error = overhead.beyond(modes, "guard", "plain")
    assert median == pytest.approx(0.1)
    # Of shares 0.1, 0.1 and 0.3.
    assert error == pytest.approx((0.04 / 3) ** 0.5 / 3**0.5)
    # A second model of a mode: their means are 1.2, 2.4 and 4.8.
    modes["guard_again"] = {"epochs": [1.3, 2.6, 4.4]}
    assert overhead.beyond(modes, "guard", "plain")[0] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "modes", ["guard,plain", "guard", "plain,plain", "plain,gaurd", ""]
)
def test_modes_that_tell_nothing_are_refused(modes, capsys):
    with pytest.raises(SystemExit):
        overhead.parse(["--modes", modes])
    assert "beside which all are measured" in capsys.readouterr().err
    assert overhead.parse([]).modes.startswith("plain,")


@pytest.mark.parametrize("shape, file", [("8 x 64", "_512"), ("8 x 256", "")])
def test_costs_are_those_of_the_committed_runs(shape, file):
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


@pytest.mark.parametrize(
    "backend, card, version",
    [
        ("jax", "H200", ""),
        ("jax", "H200", ", before"),
        ("torch", "H200", ""),
        ("torch", "H100", ", before"),
    ],
)
def test_costs_on_a_gpu_are_those_of_the_committed_runs(backend, card, version):
    end = version.replace(", ", "_")
    name = f"overhead_{card.lower()}_rescue_{backend}{end}.json"
    path = RECIPES / "results" / name
    modes = json.loads(path.read_text())["modes"]
    plain = statistics.median(overhead.rounds(modes, "plain"))
    share, error = overhead.beyond(modes, "guard", "default")
    means = [modes[m]["mean_milliseconds"] for m in ("recover", "guard")]
    peaks = [modes[m]["peak_bytes"] for m in ("plain", "guard", "recover")]
    cells = [
        *(backend + version, card, f"{plain:.1f}"),
        f"{100 * modes['default']['overhead']:+.1f} %",
        f"{100 * share:+.1f} ± {100 * error:.1f} %",
        f"{100 * (means[0] / means[1] - 1):+.1f} %",
        *(f"{peak / 1e9:.1f}" for peak in peaks),
    ]
    row = f"| {' | '.join(cells)} |"
    assert row in (RECIPES / "README.md").read_text()
