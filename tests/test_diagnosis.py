"""From samples to events and a verdict: synthetic tables, no model."""

import json
import math

import numpy as np
import pytest

from keras_stable.diagnosis import MOST_SKIPS
from keras_stable.diagnosis import Diagnosis
from keras_stable.events import Verdict
from keras_stable.packing import STATISTICS
from keras_stable.packing import VARIABLE_STATISTICS
from keras_stable.packing import Layout
from keras_stable.packing import Sample

LAYOUT = Layout(
    tensors=["embed", "a/query", "a/query/input", "fc", "fc/input"],
    heads={"a": 2},
    variables=["embed/embeddings", "a/query/kernel", "fc/kernel", "fc/bias"],
    labels={"a": "exact"},
)
NAN = float("nan")


def sample(rng, full=True, **scalars):
    """A step of a healthy run: noise of a hundredth about constants."""
    scalars = {
        "loss": 2.0 + 0.01 * rng.normal(),
        "max_logit": 5.0,
        "nonfinite": 0.0,
        "first_nonfinite": None,
        "gradient_norm": 1.0 + 0.01 * rng.normal(),
        "update_norm": 0.1,
        "nonfinite_gradients": 0.0,
        "clean_gradient": None,
        "clipped": 0.0,
        "skipped": 0.0,
        "updated": 1.0,
        "loss_scale": 1.0,
        **scalars,
    }
    if not full:
        return Sample(scalars)

    def noise(*shape):
        return np.exp(0.01 * rng.normal(size=shape)).astype("float32")

    tensors = noise(len(LAYOUT.tensors), len(STATISTICS))
    tensors[:, STATISTICS.index("nonfinite")] = 0
    variables = noise(len(LAYOUT.variables), len(VARIABLE_STATISTICS))
    return Sample(scalars, tensors, [5 * noise(3, 2)], variables)


def run(diagnosis, steps, change=None, first=1, full=True, seed=0):
    """Feeds samples, each changed by `change(step, sample)`; the events."""
    rng, events = np.random.default_rng(seed), []
    for step in range(first, first + steps):
        one = sample(rng, full)
        if change is not None:
            change(step, one)
        events += diagnosis.update(step, one)
    return events


def scaled(name, factor):
    """A change of one layer's scale."""

    def change(step, one):
        row = LAYOUT.tensors.index(name)
        one.tensors[row, :3] *= factor(step)

    return change


def entropies(of_step):
    """A change of the entropies of the two heads."""

    def change(step, one):
        one.heads[0][2] = of_step(step)

    return change


def capped(of_step, cap=50.0):
    """A change of the largest logits of the two heads, before and after a cap.

    The entropies stay high.
    """

    def change(step, one):
        raw = np.array(of_step(step))
        one.heads[0] = np.stack([raw, cap * np.tanh(raw / cap), [0.9, 0.7]])

    return change


@pytest.mark.parametrize(
    "single",
    [
        entropies(lambda step: (0.003, 0.009) if step >= 80 else 0.5),
        capped(lambda step: (6e3, 3e5) if step >= 80 else (300.0, 3e5)),
    ],
    ids=["single keys", "saturated"],
)
@pytest.mark.parametrize("warmup", [0, 1000])
def test_collapsed_attention_is_lost_after_a_hundred_steps(single, warmup):
    diagnosis = Diagnosis(LAYOUT, warmup)
    found = run(diagnosis, 178, single)
    (event,) = (e for e in found if e.detector == "collapse")
    assert (event.step, event.onset, event.value) == (80, 80, 1.0)
    assert diagnosis.verdict is Verdict.WARN
    found = run(diagnosis, 3, single, first=179)
    assert [(e.detector, e.step, e.onset) for e in found] == [
        ("collapse", 180, 80),
        ("verdict", 181, 80),
    ]
    assert diagnosis.verdict is Verdict.COLLAPSED and diagnosis.verdict.lost
    # Also where tables are rare; it ends 200 steps after the last of them.
    run(diagnosis, 1, single, first=380)
    run(diagnosis, 199, first=381, full=False)
    assert diagnosis.verdict is Verdict.COLLAPSED
    run(diagnosis, 3, first=580)
    assert diagnosis.verdict is Verdict.OK


FEW, MANY = (0.0, 0.0), (0.3, 0.3)  # Keys.
NEAR, FAR = (300.0, 4e3), (6e3, -6e3)  # Logits, of a cap of 50.


@pytest.mark.parametrize(
    "change",
    [
        entropies(lambda step: (0.0, 0.02)),  # Half of them.
        entropies(lambda step: FEW if step < 64 else (0.3, 0.0)),  # Early.
        entropies(lambda step: FEW if step % 90 else MANY),  # Comes back.
        entropies(lambda step: (np.nan, np.nan)),
        capped(lambda step: (6e3, 4e3)),
        capped(lambda step: FAR if step < 64 else NEAR),
        capped(lambda step: FAR if step % 90 else NEAR),
        capped(lambda step: (1e5, 1e5), cap=1e9),  # As if without a cap.
    ],
)
def test_other_attention_is_not(change):
    diagnosis = Diagnosis(LAYOUT)
    run(diagnosis, 400, change)
    assert diagnosis.judge.worst <= Verdict.WARN


def test_a_collapse_goes_on_from_a_state():
    single = entropies(lambda step: (0.003, 0.009))
    whole, first, second = (Diagnosis(LAYOUT) for _ in range(3))
    run(whole, 170, single)
    run(first, 120, single)
    second.restore(json.loads(json.dumps(first.state())))
    run(second, 50, single, first=121)
    assert whole.verdict is second.verdict is Verdict.COLLAPSED


def test_a_healthy_run_is_silent():
    diagnosis = Diagnosis(LAYOUT)
    assert run(diagnosis, 300) == []
    assert diagnosis.verdict is Verdict.OK


def test_nonfinite_numbers_name_their_place():
    diagnosis = Diagnosis(LAYOUT)
    run(diagnosis, 10, full=False)
    rng = np.random.default_rng(0)
    bad = sample(
        rng,
        full=False,
        loss=NAN,
        gradient_norm=NAN,
        nonfinite=2.0,
        first_nonfinite="a/query",
        clean_gradient="embed/embeddings",
    )
    loss, gradient, verdict = diagnosis.update(11, bad)
    assert verdict.detector == "verdict" and verdict.onset == 11
    assert loss.series == "loss" and gradient.series == "gradient_norm"
    for event in (loss, gradient):
        assert (event.step, event.detector) == (11, "nonfinite")
        assert event.detail.endswith(
            "; first in the forward pass: a/query"
            "; shallowest clean gradient: embed/embeddings"
        )
    assert diagnosis.verdict is Verdict.NONFINITE and diagnosis.verdict.lost
    # One event for all steps in a row.
    assert diagnosis.update(12, bad) == []


def test_a_bad_loss_behind_good_activations_is_told():
    diagnosis = Diagnosis(LAYOUT)
    bad = sample(np.random.default_rng(0), full=False, loss=math.inf)
    event, _ = diagnosis.update(1, bad)
    expected = "loss is inf; no activation that was looked at is bad"
    assert event.detail == expected


def test_bad_activations_that_leave_the_loss_are_a_warning():
    diagnosis = Diagnosis(LAYOUT)
    one = sample(
        np.random.default_rng(0),
        full=False,
        nonfinite=3.0,
        first_nonfinite="fc",
    )
    (event,) = diagnosis.update(5, one)
    assert (event.detector, event.series, event.value) == ("nonfinite", "fc", 3)
    assert event.detail == "fc is not finite, the first of 3 activations"
    assert diagnosis.verdict is Verdict.WARN and not diagnosis.verdict.lost
    # One event while it lasts, and a warning as long, and 200 steps more.
    assert not any(diagnosis.update(step, one) for step in range(6, 300))
    assert run(diagnosis, 200, first=300, full=False) == []
    assert diagnosis.verdict is Verdict.WARN
    assert run(diagnosis, 1, first=500, full=False) == []
    assert diagnosis.verdict is Verdict.OK
    assert len(diagnosis.update(501, one)) == 1


def test_a_jump_names_the_first_output():
    def change(step, one):
        # An input is another layer's output, and is not named.
        for name in ("a/query", "a/query/input", "fc"):
            scaled(name, lambda step: 8.0 if step >= 200 else 1.0)(step, one)

    diagnosis = Diagnosis(LAYOUT)
    events = run(diagnosis, 220, change)
    (event,) = [e for e in events if e.detector == "jump"]
    assert event.series == "a/query" and event.step in (200, 201)
    assert "with 1 layers after it" in event.detail
    assert diagnosis.verdict is Verdict.WARN


@pytest.mark.parametrize("statistic", ["rms", "abs_max"])
def test_growth_of_an_activation(statistic):
    def change(step, one):
        at = LAYOUT.tensors.index("fc"), STATISTICS.index(statistic)
        one.tensors[at] *= 2 ** (step / 30)

    diagnosis = Diagnosis(LAYOUT, largest=2.0**16)
    events = run(diagnosis, 320, change)
    (event,) = [e for e in events if e.detector == "growth"]
    assert event.series == f"fc {statistic}"


def test_growth_of_logits():
    def change(step, one):
        one.heads[0][0] *= 2 ** (step / 60)

    events = run(Diagnosis(LAYOUT), 240, change)
    assert [(e.detector, e.series) for e in events] == [
        ("growth", "a max_logit")
    ]


def test_frozen_and_stale_variables():
    def change(step, one):
        if step > 100:
            one.variables[2, VARIABLE_STATISTICS.index("gradient_rms")] = 0
            # Of the first and the last matrix alone.
            stale = VARIABLE_STATISTICS.index("staleness")
            one.variables[[0, 1, 3], stale] = 5.0

    events = run(Diagnosis(LAYOUT), 110, change)
    assert [(e.detector, e.series, e.step) for e in events] == [
        ("staleness", "embed/embeddings", 102),
        ("frozen", "fc/kernel", 103),
    ]


@pytest.mark.parametrize("warmup", [0, 150])
def test_variables_are_not_judged_in_warm_up_or_without_update(warmup):
    def zero(step, one):
        one.variables[2] = 0
        one.scalars["updated"] = float(step % 2 == 0)

    diagnosis = Diagnosis(LAYOUT, warmup)
    (event,) = run(diagnosis, 180, zero)
    # The third of every other step after the warm-up.
    assert (event.detector, event.step) == ("frozen", max(64, warmup) + 6)


def test_bad_layers_do_not_blind_the_detectors():
    def change(step, one):
        if step == 150:
            one.tensors[3, :3] = np.inf
            one.tensors[3, STATISTICS.index("nonfinite")] = 7
            one.heads[0][0] = np.nan

    diagnosis = Diagnosis(LAYOUT)
    assert run(diagnosis, 200, change) == []
    events = run(diagnosis, 40, scaled("fc", lambda _: 8.0), first=201)
    assert [e.series for e in events if e.detector == "jump"] == ["fc"]


def test_skipped_updates_are_routine_until_they_are_hopeless():
    def skip(step, one):
        one.scalars.update(skipped=1.0, gradient_norm=math.inf, update_norm=0.0)

    diagnosis = Diagnosis(LAYOUT)
    assert run(diagnosis, 100, full=False) == []
    few = MOST_SKIPS - 1
    assert run(diagnosis, few, skip, first=101, full=False) == []
    assert run(diagnosis, 1, first=120, full=False) == []
    events = run(diagnosis, MOST_SKIPS, skip, first=121, full=False)
    event, verdict = events
    assert (event.step, event.series) == (140, "gradient_norm")
    assert verdict.detector == "verdict"
    assert diagnosis.verdict is Verdict.NONFINITE


def test_only_losses_without_a_layout():
    diagnosis = Diagnosis(None)
    for step in range(1, 200):
        assert diagnosis.update(step, Sample({"loss": 2.0})) == []
    event, _ = diagnosis.update(200, Sample({"loss": NAN}))
    assert event.detail == "loss is nan"


def test_a_layout_without_heads_or_matrices():
    layout = Layout(tensors=["fc"], variables=["norm/scale"])
    diagnosis = Diagnosis(layout)
    rng = np.random.default_rng(0)
    for step in range(1, 200):
        one = sample(rng, full=False)
        one.tensors = np.ones((1, len(STATISTICS)), "float32")
        one.tensors[:, STATISTICS.index("nonfinite")] = 0
        one.heads = []
        one.variables = np.ones((1, len(VARIABLE_STATISTICS)), "float32")
        assert diagnosis.update(step, one) == []


@pytest.mark.parametrize("at", [30, 105, 190])
def test_it_goes_on_from_json(at):
    def change(step, one):
        scaled("fc", lambda s: 2 ** (s / 30) * (1 + 8 * (s > 180)))(step, one)
        if step > 100:
            one.variables[2] = 0
        if step in (103, 104, 185):
            one.scalars.update(skipped=1.0, gradient_norm=math.inf)
        if step == 188:
            one.scalars["loss"] = NAN

    whole, first = Diagnosis(LAYOUT), Diagnosis(LAYOUT)
    expected = run(whole, 300, change)
    assert {e.detector for e in expected} >= {"jump", "frozen", "nonfinite"}

    rng = np.random.default_rng(0)
    samples = []
    for step in range(1, 301):
        samples.append(sample(rng))
        change(step, samples[-1])
    events = []
    for step in range(1, at + 1):
        events += first.update(step, samples[step - 1])
    second = Diagnosis(LAYOUT)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert second.state() == first.state()
    for step in range(at + 1, 301):
        events += second.update(step, samples[step - 1])
    assert events == expected
    assert second.verdict == whole.verdict
    assert second.state() == whole.state()


def test_a_state_of_another_model_is_refused():
    state = Diagnosis(LAYOUT).state()
    other = Layout(tensors=["fc"], variables=["fc/kernel"])
    with pytest.raises(ValueError):
        Diagnosis(other).restore(state)
    with pytest.raises(KeyError):
        Diagnosis(LAYOUT).restore(Diagnosis(None).state())
