"""The rungs of rescues, and what an autopsy concludes; no model trains."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_stable.autopsy import Cause
from keras_stable.autopsy import decide
from keras_stable.autopsy import is_bad
from keras_stable.judge import Judge
from keras_stable.rescue import Rescue
from keras_stable.rescue import Rungs

RECIPES = Path(__file__).parents[1] / "recipes"
GOOD = {"loss": 2.0, "gradient_norm": 1.0, "guarded": 0.0}
BAD = {"loss": 5.0, "gradient_norm": 1.0, "guarded": 1.0}
BROKEN = {"loss": math.nan, "gradient_norm": math.nan, "guarded": 1.0}


def trained(steps=300, seed=0):
    """A judge that has seen a healthy run."""
    rng, judge = np.random.default_rng(seed), Judge()
    for step in range(1, steps + 1):
        loss = 2 + 3 / step + 0.02 * rng.standard_normal()
        norm = math.exp(0.1 * rng.standard_normal())
        judge.update(step, {"loss": loss, "gradient_norm": norm})
    return judge


@pytest.mark.parametrize(
    "name, value",
    [
        *(("back_off", x) for x in (0, 1.5, "half", math.nan)),
        *(("most", x) for x in (-1, 1.5)),
        *(("every", x) for x in (0, True)),
        ("gradient_ratio", 1.0),
        ("share", 0.0),
        ("sigma", math.inf),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Rescue(**{name: value})


def test_limits_are_those_of_the_formula():
    rungs, judge = Rungs(Rescue()), trained()
    for series, floor, found in zip(
        ("loss", "gradient_norm"),
        (0.4, math.log(100)),
        rungs.limits(301, judge),
    ):
        window = np.array(judge.spikes[series].window, "float64")
        median = np.median(window)
        scale = 1.4826 * np.median(np.abs(window - median))
        limit = median + max(floor, 6 * scale)
        limit = limit if series == "loss" else math.exp(limit)
        assert found == pytest.approx(limit, rel=1e-12)


def test_there_are_no_limits_in_the_warm_up():
    assert Rungs(Rescue()).limits(64, trained(63)) == (math.inf, math.inf)
    assert Rungs(Rescue()).limits(66, trained(65))[0] < math.inf


def test_a_single_bad_step_changes_nothing_else():
    rungs = Rungs(Rescue())
    events, lost = rungs.update(500, BAD, calm=True)
    assert [e.detector for e in events] == ["guard"] and not lost
    assert rungs.row == 1 and rungs.unwell == 500
    assert rungs.update(501, GOOD, calm=True) == ([], False)
    assert rungs.row == 0 and rungs.rate(502) == 1.0


def test_five_in_a_row_back_off_and_the_rate_comes_back():
    rescue, rungs = Rescue(), Rungs(Rescue())
    for step in range(500, 504):
        assert len(rungs.update(step, BAD, True)[0]) == 1
    events, lost = rungs.update(504, BAD, True)
    assert [e.detector for e in events] == ["guard", "back_off"] and not lost
    assert events[1].onset == 500
    for step in (504, 604, 1004, 1503):
        gone = (step - 504) / rescue.recovery
        assert rungs.rate(step) == pytest.approx(0.5 + 0.5 * gone)
    assert rungs.rate(1504) == rungs.rate(9999) == 1.0
    # While it rests there are no limits, then there are.
    assert rungs.limits(504 + rescue.rest, trained()) == (math.inf, math.inf)
    assert rungs.limits(505 + rescue.rest, trained())[0] < math.inf


def test_where_it_can_a_run_goes_back_first():
    rungs, found = Rungs(Rescue(), recovers=True), []
    for step in range(500, 520):
        events, lost = rungs.update(step, BAD, True)
        found += [e.detector for e in events if e.detector != "guard"]
        if lost:
            rungs.rewind(step, step - 100)
            found.append("rewind")
    # The second time, soon after, something else is tried.
    assert found == ["rewind", "back_off", "back_off", "back_off"]


def test_one_in_a_hundred_backs_off():
    rungs, found = Rungs(Rescue()), []
    for step in range(1, 2001):
        bad = step % 100 == 0
        events, _ = rungs.update(step, BAD if bad else GOOD, True)
        found += [e.step for e in events if e.detector == "back_off"]
    assert found == [1000, 2000]
    # Just below that share, nothing.
    rungs = Rungs(Rescue())
    for step in range(1, 3001):
        scalars = BAD if step % 112 == 0 else GOOD
        events, lost = rungs.update(step, scalars, True)
        assert not lost and "back_off" not in [e.detector for e in events]


def test_numbers_that_are_not_finite_are_lost_at_once():
    rungs = Rungs(Rescue())
    lost = [rungs.update(step, BROKEN, True)[1] for step in range(5)]
    assert lost == [False] * 4 + [True]


def test_rungs_are_bounded():
    rungs, lost = Rungs(Rescue(most=2, horizon=5000)), []
    for step in range(1, 3001):
        # It never gets better: every five steps a back-off, but for the last.
        lost.append(rungs.update(step, BAD, True)[1])
    assert lost.index(True) == 14 and len(rungs.back_offs) == 2
    rungs = Rungs(Rescue(most=2, horizon=5000))
    for step in (100, 200):
        assert rungs.may_rewind(step)
        rungs.rewind(step, step - 50)
    assert not rungs.may_rewind(5099) and rungs.may_rewind(5100)


def test_a_rewind_warms_up_and_the_second_backs_off():
    rungs = Rungs(Rescue(rewarmup=100, back_off=0.5))
    rungs.rewind(400, 200)
    assert rungs.rate(401) == pytest.approx(0.01)
    assert rungs.rate(450) == pytest.approx(0.5)
    assert rungs.rate(500) == rungs.rate(700) == 1.0
    rungs.rewind(800, 600)
    assert rungs.rate(850) == pytest.approx(0.5 * (0.5 + 0.5 * 50 / 1000))
    plain = Rungs(Rescue(rewarmup=0))
    plain.rewind(400, 200)
    assert plain.rate(401) == 1.0


def test_it_goes_on_from_its_state():
    rungs = Rungs(Rescue())
    for step in range(500, 503):
        rungs.update(step, BAD, True)
    rungs.rewind(503, 400)
    other = Rungs(Rescue())
    other.restore(json.loads(json.dumps(rungs.state())))
    for step in range(504, 900):
        scalars = BAD if step % 9 < 6 else GOOD
        assert rungs.update(step, scalars, True) == other.update(
            step, scalars, True
        )
        assert rungs.rate(step) == other.rate(step)
    assert not other.may_rewind(504) or len(other.rewinds) < 3


@pytest.mark.parametrize(
    "again, older, after, cause",
    [
        ((False, False), False, False, Cause.TRANSIENT_FAULT),
        ((True, False), True, True, Cause.TRANSIENT_FAULT),
        ((True, True), True, False, Cause.BAD_DATA),
        ((True, True), True, True, Cause.BAD_DATA),
        ((True, True), False, True, Cause.BAD_STATE),
        ((True, True), False, False, Cause.INTERACTION),
    ],
)
def test_causes(again, older, after, cause):
    assert decide(again, older, after) is cause


def test_what_is_bad():
    limits = 3.0, 10.0
    assert not is_bad((2.9, 9.9), limits)
    assert is_bad((3.1, 1.0), limits) and is_bad((1.0, 11.0), limits)
    assert is_bad((math.nan, 1.0), limits) and is_bad((1.0, math.inf), limits)
    none = math.inf, math.inf
    assert not is_bad((1e30, 1e30), none)
    assert is_bad((math.inf, 1.0), none) and is_bad((1.0, math.nan), none)


@pytest.fixture
def rescue_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    spec = importlib.util.spec_from_file_location(
        "rescue_runs", RECIPES / "rescue_runs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("detection_models", None)


def test_the_table_is_of_the_committed_runs(rescue_runs):
    file = RECIPES / "results" / "rescue.json"
    result = json.loads(file.read_text(), parse_constant=pytest.fail)
    rows = rescue_runs.summarize(result["runs"])
    text = (RECIPES / "README.md").read_text()
    assert rescue_runs.table(rows) in text
    saved = [
        sum(rescue_runs.saved(row, policy) for row in rows)
        for policy in rescue_runs.POLICIES
    ]
    assert f"{saved[0]} of {len(rows)} end as if nothing" in text
    assert f"(`recover`) {saved[2]}: " in text
    count, touched = rescue_runs.interventions(result["runs"])
    same = rescue_runs.same(result["runs"])
    clean = {"runs": count, "touched": touched, "same": same}
    assert result["clean"] == clean
    assert f"{count} runs without a fault" in text
    assert f"{same} end with" in text


def test_every_broken_run_has_a_clean_twin(rescue_runs):
    runs = rescue_runs.planned()
    for name, run in runs.items():
        twin = runs[name.removesuffix(run["fault"]) + "none"]
        changed = {k for k in run if run[k] != twin[k]}
        changes = rescue_runs.FAULTS[run["fault"]].get("changes", {})
        assert changed <= {"fault", *changes}
