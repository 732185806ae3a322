"""One of two replicas meets a bad batch: none of them trains on it."""

import functools
import pathlib

import distributed
import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()
SCRIPT = pathlib.Path(__file__).parent / "replicas.py"
pytestmark = pytest.mark.skipif(
    BACKEND == "jax", reason="jax sees the whole batch, see test_guard"
)


def launch(runs, distribution="data", **settings):
    """What each process found in each run."""
    several = BACKEND == "torch" and distribution == "data"
    return distributed.launch(
        2 if several else 1,
        1 if BACKEND == "torch" else 2,
        BACKEND,
        str(SCRIPT),
        distribution=distribution,
        how="nan",
        runs=runs,
        **settings,
    )


@functools.cache
def guarded(model):
    good = [0, 1, 3, 4]
    return launch(
        [
            {"bad": [2], "places": [0, 1, 2, 3, 4]},
            {"bad": [2], "places": [0, 1, 2, 3, 4], "how": "over"},
            {"bad": [], "places": good},
            {"bad": [], "places": good, "guard": False},
        ],
        model=model,
    )


# Of the accumulated one, the bad batch would be the third: an update.
MODELS = pytest.mark.parametrize(
    "model",
    ["normalized", "language"] + ["accumulated"] * (BACKEND == "torch"),
)


@MODELS
def test_a_step_left_out_changes_nothing_in_any_replica(model):
    for process in guarded(model):
        for run in process[:2]:
            assert [x[3] for x in run["scalars"]] == [0, 0, 1, 0, 0]
            assert run["states"][1] == run["states"][2]
            assert run["scalars"][2][2] == 0  # The norm of the update.


@MODELS
def test_a_run_with_bad_batches_is_the_run_without(model):
    for *bad, clean, plain in guarded(model):
        for run in bad:
            assert run["states"][:2] + run["states"][3:] == clean["states"]
            assert run["final"] == clean["final"]
            assert run["history"] == clean["history"]
        # The guard itself changes nothing.
        assert clean["states"] == plain["states"]


@MODELS
def test_all_replicas_have_the_same_numbers_and_weights(model):
    first, *others = guarded(model)
    for i, run in enumerate(first):
        for shared, _ in run["states"]:
            assert len(set(shared)) == 1
        for other in others:
            np.testing.assert_equal(other[i]["scalars"], run["scalars"])
            assert other[i]["first"] == run["first"]
            theirs = [shared for shared, _ in other[i]["states"]]
            assert theirs == [shared for shared, _ in run["states"]]


def test_scalars_are_of_the_whole_batch():
    run = {"bad": [], "places": [0, 1, 2, 3]}
    ((alone,),) = launch([run], "none", model="language")
    found = guarded("language")[0][2]["scalars"]
    expected = alone["scalars"]
    # What both were given.
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-4)


@functools.cache
def monitored():
    seeks = BACKEND == "torch"
    bad = list(range(120, 130))
    without = [p for p in range(300) if not 100 <= p < 136]
    return launch(
        [
            {"bad": bad, "policy": "recover", "steps": 200, "seeks": seeks},
            {"bad": [], "policy": None, "steps": 200, "places": without},
            {"bad": [7], "policy": "guard", "steps": 30},
            {"bad": [], "policy": None, "steps": 3, "places": [0, 1, 2]},
            {"bad": [], "policy": "observe", "steps": 3, "every": None},
            {"bad": [], "policy": "guard", "steps": 3, "every": 5},
            {"bad": [], "policy": "recover", "steps": 3, "seeks": True},
            {
                **{"bad": bad, "policy": "recover", "steps": 200},
                **{"seeks": True, "autopsy": True},
            },
        ],
        kind="monitored",
        model="normalized",
    )


def test_all_replicas_go_back_to_the_same_state():
    for recovered, plain, *_ in monitored():
        kinds = [event[2] for event in recovered["events"]]
        assert kinds.count("rewind") == 1
        assert recovered["position"] == 236
        assert recovered["shared"] == plain["shared"]
        assert len(set(recovered["shared"])) == 1
    first, *others = (process[0] for process in monitored())
    for other in others:
        assert other["events"] == first["events"]
        assert other["shared"] == first["shared"]


@pytest.mark.skipif(BACKEND != "torch", reason="its `data` is refused")
def test_all_replicas_find_the_same_cause_and_leave_no_trace():
    """Each tries its own rows, of which one replica's alone are bad."""
    first = monitored()[0][-1]
    kinds = [event[2] for event in first["events"]]
    assert kinds.count("autopsy") == 1
    detail = first["details"][kinds.index("autopsy")]
    assert detail.startswith("BAD_DATA: loss of batch 120")
    for recovered, *_, examined in monitored():
        assert examined["shared"] == recovered["shared"]
        assert examined["moving"] == recovered["moving"]
        assert examined["position"] == recovered["position"]
        assert examined["events"] == first["events"]
        assert examined["details"] == first["details"]


def test_a_monitor_guards_without_tables():
    for _, _, guard, *_ in monitored():
        assert [event[:3] for event in guard["events"]] == [[8, 8, "guard"]]
        assert guard["overhead"] is None


def test_what_would_be_of_a_part_is_refused():
    for process in monitored():
        plain, observed, tables, seeking, _ = process[3:]
        assert observed["shared"] == plain["shared"]
        assert observed["moving"] == plain["moving"]
        assert "its own part of the batch" in tables["error"]
        if BACKEND == "tensorflow":
            assert "cannot be taken from `data`" in seeking["error"]


def test_other_optimizers_and_several_steps_at_a_time_are_refused():
    from keras_stable.backend.parts import check_part

    with pytest.raises(ValueError, match="AdamW.*Received: Adam"):
        check_part(keras.optimizers.Adam(), False, "Here, each replica")
    if BACKEND == "tensorflow":
        (process,) = launch(
            [{"bad": [], "policy": "guard", "steps": 4, "size": 2}],
            kind="monitored",
            model="normalized",
        )
        assert "`steps_per_execution=1`" in process[0]["error"]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="torch can")
def test_accumulation_by_replicas_is_refused():
    runs = [
        {"bad": [], "policy": policy, "steps": 4} for policy in ("guard", None)
    ]
    (process,) = launch(runs, kind="monitored", model="accumulated")
    for run in process:
        assert "Keras cannot accumulate gradients" in run["error"]
        assert run["error"].startswith("ValueError")
