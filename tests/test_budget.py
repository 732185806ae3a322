"""The interval of full tables, on a clock that is not the machine's."""

import gc
import math

import pytest

from keras_stable.budget import BLOCK
from keras_stable.budget import LEAST
from keras_stable.budget import MOST
from keras_stable.budget import ROUNDS
from keras_stable.budget import Budget

MEASURED = 2 * BLOCK * (1 + ROUNDS)


class Clock:
    """Seconds that pass when told so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


def run(budget, clock, steps, light=1.0, full=1.5, host=0.0, first=0):
    """Steps of known length: which were full, and the reports."""
    kinds, reports = [], []
    for step in range(first, first + steps):
        kinds.append(budget.full(step))
        reports.append(budget.tick(host))
        clock.now += full if kinds[-1] else light
    return kinds, reports


@pytest.mark.parametrize("full", [0.5, 1.0, 1.19, 1.213, 3.003, 99.0])
@pytest.mark.parametrize("share", [0.02, 0.005])
def test_the_interval_keeps_to_the_share(monkeypatch, full, share):
    clock, budget = Clock(monkeypatch), Budget("auto", share)
    _, reports = run(budget, clock, 200, full=full, host=0.25)
    (report,) = [r for r in reports if r]
    assert reports[MEASURED] is report is budget.report
    cost = max(full - 1, 0)
    assert budget.every == min(max(math.ceil(cost / share), LEAST), MOST)
    assert report == {
        "light_step_seconds": pytest.approx(1.0),
        "full_step_seconds": pytest.approx(full),
        "host_share": pytest.approx(0.25),
        "every": budget.every,
        "overhead": pytest.approx(cost / budget.every + 0.25),
    }


def test_blocks_alternate_then_the_interval_is_kept(monkeypatch):
    clock, budget = Clock(monkeypatch), Budget("auto", 0.02)
    kinds, _ = run(budget, clock, 300, full=1.41)
    # Both programs first, then five of each in turn.
    assert kinds[: 2 * BLOCK] == [i % BLOCK == 0 for i in range(2 * BLOCK)]
    measured = kinds[2 * BLOCK : MEASURED]
    assert measured == ([False] * BLOCK + [True] * BLOCK) * ROUNDS
    assert budget.every == 21
    # The report comes at the end of the step in which it is due.
    later = [s for s in range(MEASURED + 1, 300) if kinds[s]]
    assert later == [s for s in range(MEASURED + 1, 300) if s % 21 == 0]


def test_slow_steps_that_are_no_rule_do_not_count(monkeypatch):
    clock, budget = Clock(monkeypatch), Budget("auto", 0.02)
    for step in range(MEASURED + 1):
        full = budget.full(step)
        budget.tick(0.0)
        # Compiling, the first steps of a block, and a stray one.
        slow = step < 2 * BLOCK or step % BLOCK < 2 or step == 14
        clock.now += 50.0 if slow else 1.1 if full else 1.0
    assert budget.report["light_step_seconds"] == pytest.approx(1.0)
    assert budget.report["full_step_seconds"] == pytest.approx(1.1)
    assert budget.every == 10


def test_it_does_not_begin_at_step_zero(monkeypatch):
    clock, budget = Clock(monkeypatch), Budget("auto", 0.02)
    kinds, reports = run(budget, clock, 100, first=777)
    assert kinds[0] and kinds[BLOCK] and reports[MEASURED]


@pytest.mark.parametrize("every", [1, 3])
def test_a_given_interval_is_kept_and_nothing_is_measured(monkeypatch, every):
    clock, budget = Clock(monkeypatch), Budget(every, 0.02)
    kinds, reports = run(budget, clock, 200, full=50.0)
    assert kinds == [step % every == 0 for step in range(200)]
    assert budget.every == every and budget.report is None
    assert not any(reports)


def test_no_telemetry_has_no_report(monkeypatch):
    clock, budget = Clock(monkeypatch), Budget(None, 0.02)
    for _ in range(200):
        assert budget.tick(0.0) is None
        clock.now += 1.0
    assert budget.report is None


@pytest.fixture
def collector():
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


def full_collection():
    """Objects that a full collection looks at."""
    return len(gc.get_objects())


def test_what_is_there_is_not_collected_until_the_end(collector, monkeypatch):
    clock, budget = Clock(monkeypatch), Budget(20, 0.02)
    run(budget, clock, MEASURED)
    before = full_collection()
    assert gc.get_freeze_count() == 0
    run(budget, clock, 1)
    frozen = gc.get_freeze_count()
    assert frozen > 0.9 * before
    assert full_collection() < 0.1 * before
    run(budget, clock, 100)
    # Less is left of it, if anything: nothing is frozen anew.
    assert gc.get_freeze_count() <= frozen
    budget.close()
    assert gc.get_freeze_count() == 0
    # In the next `fit` what is there then, from its first step on.
    run(budget, clock, 1)
    assert gc.get_freeze_count() > 0.9 * before
    budget.close()
    budget.close()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("other", [gc.freeze, gc.disable])
def test_a_collector_that_others_see_to_is_left_alone(
    other, collector, monkeypatch
):
    clock, budget = Clock(monkeypatch), Budget(20, 0.02)
    other()
    frozen = gc.get_freeze_count()
    run(budget, clock, MEASURED + 10)
    assert abs(gc.get_freeze_count() - frozen) <= 0.01 * frozen
    budget.close()
    assert abs(gc.get_freeze_count() - frozen) <= 0.01 * frozen
