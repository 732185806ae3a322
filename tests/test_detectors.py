"""Detectors: what they must find, how soon, and what must not alarm them."""

import dataclasses
import doctest
import json
import math

import keras
import numpy as np
import pytest

from keras_stable import detectors
from keras_stable import events
from keras_stable import layerwise
from keras_stable.detectors import LevelShift
from keras_stable.detectors import NonFinite
from keras_stable.detectors import Spike
from keras_stable.detectors import collapsed
from keras_stable.events import Verdict
from keras_stable.judge import Judge
from keras_stable.layerwise import Frozen
from keras_stable.layerwise import Growth
from keras_stable.layerwise import Jump
from keras_stable.layerwise import Staleness

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="no backend takes part"
)

START = 2000  # First step of an injected event.
NAN, INF = float("nan"), float("inf")


def lm_losses(rng, steps=3000, noise=0.03):
    """From 10.8 to 2.8 nats, with Student's t5 noise; soon flat."""
    descent = 8.0 * (1 + np.arange(steps) / 20) ** -1.5
    return 2.8 + descent + noise * rng.standard_t(5, steps)


def byte_losses(rng, steps, noise, tau):
    """From 5.5 to 1.2 nats."""
    descent = 4.3 * np.exp(-np.arange(steps) / tau)
    return 1.2 + descent + noise * rng.standard_t(5, steps)


def judged(losses, **kwargs):
    """The judge and the events after these losses of steps 0, 1, ..."""
    judge = Judge(**kwargs)
    found = []
    for step, loss in enumerate(losses):
        for event in judge.update(step, {"loss": loss}):
            if event.detector == "verdict":
                event = dataclasses.replace(event, detail=str(judge.verdict))
            found.append(event)
    return judge, found


def steps_of(found, detector):
    return [event.step for event in found if event.detector == detector]


def verdicts_of(found):
    return [
        (event.step, event.detail)
        for event in found
        if event.detector == "verdict"
    ]


@pytest.mark.parametrize("module", [events, detectors, layerwise])
def test_examples(module):
    assert not doctest.testmod(module).failed


def test_verdicts_are_ordered_and_print_their_names():
    assert [str(v) for v in Verdict] == [v.name for v in Verdict]
    assert f"{Verdict.SPIKE_SLOW:>12}" == "  SPIKE_SLOW"
    assert {v for v in Verdict if v.lost} == {
        Verdict.COLLAPSED,
        Verdict.LEVEL_SHIFT,
        Verdict.DIVERGED,
        Verdict.NONFINITE,
    }
    assert max(Verdict.STALLED, Verdict.LEVEL_SHIFT).lost
    assert json.dumps({"verdict": Verdict.WARN}) == '{"verdict": 1}'


@pytest.mark.parametrize("cap", [1.0, 5.0, 50.0, 3e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_head_is_saturated_beyond_a_hundred_caps(cap, sign):
    raw = sign * cap * np.array([0.0, 1.0, 8.0, 98.0, 102.0, 1e9])
    share = collapsed(np.full(6, 0.9), raw, cap * np.tanh(raw / cap))
    assert share == 2 / 6
    # As it is recorded, to a few digits.
    rounded = [float(f"{x:.5g}") for x in cap * np.tanh(raw / cap)]
    assert collapsed(np.full(6, 0.9), raw, rounded) == share


def test_logits_without_a_cap_are_never_saturated():
    raw = np.array([-1e30, -7.0, 0.0, 1e-30, 50.0, 1e30, INF, NAN])
    assert collapsed(np.full(8, 0.9), raw, raw) == 0.0


def test_both_kinds_of_heads_count_together_and_once():
    raw, capped = [1e4, 1e4, 9.0, 9.0, 1e4], [50.0, 50.0, 9.0, 9.0, 50.0]
    entropy = [0.9, 0.001, 0.001, 0.9, NAN]
    assert collapsed(entropy, raw, capped) == 3 / 4
    # Entropies alone, as of records without logits.
    assert collapsed(entropy) == 2 / 4
    assert collapsed([], [], []) == collapsed([NAN]) == 0.0


# Injected into a healthy curve: after k steps, this is added. The delays are
# twice those of the reference's table (9, 9, 29, 132, 84), as its largest.
FAULTS = {
    "+2.0": (lambda k: 2.0 * np.exp(-k / 20), 18),
    "+0.5": (lambda k: 0.5 * np.exp(-k / 20), 18),
    "+0.06": (lambda k: 0.06 + 0 * k, 60),
    "drift": (lambda k: 5e-4 * k, 264),
    "blow-up": (lambda k: np.minimum(0.01 * np.exp(k / 40), 20), 168),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(5))
def test_faults_are_found_in_time(fault, seed):
    added, delay = FAULTS[fault]
    losses = lm_losses(np.random.default_rng(seed))
    losses[START:] += added(np.arange(len(losses) - START))
    judge, found = judged(losses)
    (alarm, *_) = [s for s in steps_of(found, "level_shift") if s >= START]
    assert alarm - START <= delay
    (event,) = [e for e in found if e.step == alarm and e.series == "loss"][:1]
    assert START - 20 <= event.onset <= alarm
    spikes = [s for s in steps_of(found, "spike") if s >= START]
    if fault in ("+2.0", "+0.5"):
        assert spikes[0] - START <= 2
        assert judge.worst == Verdict.SPIKE_RECOVERED
        assert judge.verdict == Verdict.OK
    elif fault == "blow-up":
        assert judge.verdict == Verdict.DIVERGED
    else:
        assert judge.verdict == Verdict.LEVEL_SHIFT
        (step, name) = verdicts_of(found)[-1]
        assert name == "LEVEL_SHIFT" and step == alarm + 501


@pytest.mark.parametrize("hard", [0.0, 0.02])
def test_healthy_runs_are_not_lost(hard):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        losses = lm_losses(rng)
        losses += (rng.random(len(losses)) < hard) * rng.uniform(0.1, 0.5)
        judge, found = judged(losses)
        assert judge.worst <= Verdict.SPIKE_RECOVERED, (seed, found)
        assert not steps_of(found, "level_shift")


@pytest.mark.parametrize("steps", [300, 600, 1500])
def test_short_healthy_runs_are_not_lost(steps):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        noise, tau = rng.choice([0.01, 0.05, 0.15]), rng.choice([20, 60, 150])
        losses = byte_losses(rng, steps, noise, tau)
        judge, found = judged(losses, warmup=int(rng.choice([0, steps // 10])))
        assert judge.worst <= Verdict.SPIKE_RECOVERED, (seed, found)


def test_an_early_bump_comes_back_but_divergence_does_not():
    rng = np.random.default_rng(0)
    step = np.arange(400)
    losses = byte_losses(rng, 400, 0.03, 150)
    bump = 4 * np.exp(-step / 100) * (1 - np.exp(-step / 3))
    assert not judged(losses + bump)[0].worst.lost
    losses[200:] += 4
    judge, found = judged(losses)
    assert judge.verdict == Verdict.DIVERGED
    step, name = verdicts_of(found)[-1]
    assert name == "DIVERGED" and 250 <= step <= 265
    assert 195 <= found[-1].onset <= 200


@pytest.mark.parametrize("level", [30.0, 300.0, 1e8])
def test_a_blow_up_in_the_first_steps_is_found(level):
    rng = np.random.default_rng(0)
    losses = level * np.exp(0.2 * rng.standard_normal(300))
    losses[:2] = 5.5, 2 * level
    judge, found = judged(losses)
    ((step, name),) = verdicts_of(found)
    # Not before the warm-up is over: by 50 steps more, or 100 if it is noisy.
    assert name == "DIVERGED" and 113 <= step <= 163
    assert judge.verdict == Verdict.DIVERGED
    # One that comes back is none, and what it has then is to be kept.
    losses[60:] = 5.5 - 3 * np.arange(240) / 240
    assert not judged(losses)[0].worst.lost
    losses = np.append(losses, np.full(60, 12.0))
    assert judged(losses)[0].verdict == Verdict.DIVERGED


def test_a_noisy_plateau_is_not_lost_by_a_low_first_loss():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        losses = 5.5 + 0.3 * rng.standard_normal(400)
        losses[:5] -= 1.0
        assert not judged(losses)[0].worst.lost
        # Squares of small numbers, where 1 is above whatever comes.
        assert not judged(0.02 * losses**2)[0].worst.lost


def test_a_plateau_is_stalled_after_500_steps():
    rng = np.random.default_rng(0)
    losses = 5.5 + 0.2 * rng.standard_t(5, 800)
    judge, found = judged(losses)
    assert judge.worst == judge.verdict == Verdict.STALLED
    assert (500, "STALLED") in verdicts_of(found)
    # A plateau that ends is none.
    losses[440:] -= np.minimum(0.02 * np.arange(360), 3)
    assert judged(losses)[0].worst <= Verdict.SPIKE_RECOVERED
    assert judged(losses)[0].verdict == Verdict.OK


@pytest.mark.parametrize(
    "length, worst",
    [(1, "SPIKE_RECOVERED"), (100, "SPIKE_RECOVERED"), (400, "SPIKE_SLOW")],
)
def test_spikes_by_length(length, worst):
    losses = lm_losses(np.random.default_rng(3))
    losses[1000 : 1000 + length] += 1.0
    judge, found = judged(losses)
    assert str(judge.worst) == worst and judge.verdict == Verdict.OK
    assert [e.onset for e in found if e.detector == "spike"][0] == 1000


def test_a_spike_says_when_it_ends_and_32_points_are_a_new_level():
    rng = np.random.default_rng(0)
    losses = 3.0 + 0.02 * rng.standard_normal(400)
    losses[200:203] += 0.2
    spike = Spike("loss", 0.1, 0.4)
    found = [spike.update(step, loss) for step, loss in enumerate(losses)]
    (event,) = [event for event in found if event]
    assert (event.step, event.onset, event.detector) == (202, 200, "spike")
    assert not spike.active and spike.ended == 207
    losses[300:] += 1.0
    spike = Spike("loss", 0.1, 0.4)
    for step, loss in enumerate(losses):
        spike.update(step, loss)
        assert spike.active == (202 <= step < 207 or 300 <= step < 331), step
    assert spike.ended == 331 and spike.median == pytest.approx(4.0, abs=0.02)


def test_nothing_but_nonfinite_in_the_warmup():
    losses = np.full(200, 3.0)
    losses[50:70] += 5
    for warmup, quiet in ((0, 64), (120, 120)):
        losses[quiet - 5 : quiet] = 9.0
        assert not judged(losses[:quiet], warmup=warmup)[1]
    assert steps_of(judged([3.0, NAN])[1], "nonfinite") == [1]


@pytest.mark.parametrize("first, top", [(5.5, 11.0), (0.2, 1.2), (-3.0, 0.0)])
def test_a_blow_up_in_a_long_warmup_does_not_wait_for_its_end(first, top):
    rng = np.random.default_rng(0)
    losses = first + 0.02 * rng.standard_normal(1000)
    losses[0] = first
    losses[300:] += np.linspace(0, top - first + 1, 700)
    over = np.flatnonzero(losses > top)[0]
    (event,) = judged(losses, warmup=1000)[1]
    assert (event.detector, event.detail) == ("verdict", "DIVERGED")
    assert over + 50 <= event.step <= over + 70
    assert over <= event.onset <= over + 20
    # Nor is such a state one to go back to, as soon as its gain is lost.
    judge = Judge(warmup=1000)
    calm = []
    for step, loss in enumerate(losses):
        judge.update(step, {"loss": loss})
        calm.append(judge.calm)
    assert all(calm[:300]) and not any(calm[over:])
    # Neither what stays below nor what comes back is called lost before.
    for losses[300:] in (top - 0.1, first):
        losses[400:440] = top + 10
        assert not judged(losses, warmup=1000)[1]
    # Nor the beginning, whatever it does.
    losses[1:64] = top + 10
    assert not judged(losses, warmup=1000)[1]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nonfinite_values_poison_nothing(bad):
    rng = np.random.default_rng(0)
    losses = lm_losses(rng)
    clean, _ = judged(np.delete(losses, [50, 1500, 1501]))
    losses[[50, 1500, 1501]] = bad
    judge, found = judged(losses)
    assert steps_of(found, "nonfinite") == [50, 1500]
    assert verdicts_of(found) == [(50, "NONFINITE"), (1500, "NONFINITE")]
    assert judge.worst == Verdict.NONFINITE and judge.verdict == Verdict.OK
    for series in ("losses", "best", "first"):
        assert getattr(judge, series) == getattr(clean, series)
    assert judge.spikes["loss"].window == clean.spikes["loss"].window
    # The next fault is found as ever.
    last = len(losses)
    (event, *_) = judge.update(last, {"loss": losses[-1] + 1})
    assert event.detector == "spike" and event.onset == last


def test_norms_are_judged_by_their_logarithm():
    judge = Judge()
    rng = np.random.default_rng(0)
    norms = np.exp(0.1 * rng.standard_normal(403))
    norms[300], norms[400:] = 15.0, 3.0  # Once 15 times, then 3 times.
    found = []
    for step, norm in enumerate(norms):
        loss = 3.0 - step / 1000
        values = {"loss": loss, "gradient_norm": norm, "update_norm": norm}
        # Zeros of gradient accumulation, infinities of loss scaling.
        if step % 2:
            values = {"gradient_norm": norm, "update_norm": 0.0}
        found += judge.update(step, values)
        skipped = {"loss": loss, "gradient_norm": INF, "update_norm": NAN}
        found += judge.update(step, skipped, skipped=True)
    spikes = [e for e in found if e.series == "gradient_norm"]
    assert [e.step for e in spikes] == [300, 402]
    assert [e.onset for e in spikes] == [300, 400]
    assert spikes[0].value == 15.0 and "times its median" in spikes[0].detail
    assert judge.worst == judge.verdict == Verdict.WARN
    judge.update(403, {"gradient_norm": INF})
    assert judge.verdict == Verdict.NONFINITE


def test_warnings_from_outside_decay():
    judge = Judge()
    event = detectors.Event(10, 5, "growth", "fc1 rms", 3.0, "fc1 grows")
    judge.warn(event)
    assert judge.verdict == Verdict.WARN
    verdicts = []
    for step in range(10, 300):
        assert not judge.update(step, {"loss": 3.0 - step / 1000})
        verdicts.append(judge.verdict)
    assert verdicts.count(Verdict.WARN) == 201
    assert verdicts[-1] == Verdict.OK and judge.worst == Verdict.WARN


def test_growth_is_the_regression_of_polyfit():
    rng = np.random.default_rng(0)
    names = [f"layer_{i}" for i in range(40)]
    growth = Growth(names, 12.0, horizon=2000, warmup=100)
    steps = np.cumsum(rng.integers(1, 20, 300))
    rates = np.linspace(-0.002, 0.006, 40)
    values = 2 + rates * steps[:, None] + rng.normal(0, 0.3, (300, 40))
    reference = values[np.argmax(steps >= 100)]
    active, fired = np.zeros(40, bool), set()
    for t, (step, x) in enumerate(zip(steps, values)):
        found = {event.series for event in growth.update(int(step), x)}
        if t < 63:
            assert not found
            continue
        near, y = steps[t - 63 : t + 1], values[t - 63 : t + 1]
        line, residual, *_ = np.polyfit(near, y, 1, full=True)
        slope = line[0]
        r2 = 1 - residual / ((y - y.mean(0)) ** 2).sum(0)
        growing = (slope > 0) & ((12 - x) / slope < 2000)
        growing &= x - reference >= 2
        new = growing & (r2 > 0.8) & ~active
        active = (active & ~(x - reference < 1)) | new
        assert found == {names[i] for i in np.flatnonzero(new)}, t
        fired |= found
    assert 5 < len(fired) < 35 and names[0] not in fired


def test_growth_bears_missing_and_constant_values():
    growth = Growth(["grows", "late", "constant", "never"], None)
    found = []
    for step in range(1000):
        late = NAN if step < 100 or step % 7 == 0 else step / 100
        x = [-INF if step % 9 == 0 else step / 100, late, 1.0, NAN]
        found += growth.update(step, x)
    assert [event.series for event in found] == ["grows", "late"]
    assert all(event.onset >= event.step - 63 for event in found)


def chain(rng, steps, layers):
    """log2(rms) of a chain of layers that starts fast and settles."""
    tau = rng.uniform(5, 60, layers)
    early = rng.uniform(-3, 3, layers) * np.exp(
        -np.arange(steps)[:, None] / tau
    )
    return rng.uniform(-4, 4, layers) + early


@pytest.mark.parametrize("fault", ["gain 4", "dead"])
def test_jump_names_the_layer(fault):
    right = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        layers, every = 24, int(rng.choice([1, 2, 5]))
        x = chain(rng, 400, layers)
        bad, start = int(rng.integers(layers)), int(rng.integers(120, 390))
        # What follows moves too: less and less, and some over two samples.
        echo = 2.0 * 0.9 ** np.arange(layers - bad)
        x[start:, bad:] += echo * rng.choice([-1, 1], layers - bad)
        x[start, bad + 1 :] -= rng.uniform(0, 1, layers - bad - 1)
        x[start:, bad] += 2.0 - (x[start, bad] - x[start - 1, bad])
        x += rng.normal(0, 0.05, x.shape)
        if fault == "dead":
            x[start:, bad] = -INF
        jump = Jump([f"layer_{i}" for i in range(layers)])
        found = []
        for step in range(0, 400, every):
            found += jump.update(step, x[step])
        named = [event.series for event in found]
        late = found[0].step - start if found else INF
        right += named == [f"layer_{bad}"] and late < 2 * every
    assert right >= 95


def test_jump_is_silent_in_healthy_training():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x = chain(rng, 500, 50) + rng.normal(0, 0.1, (500, 50))
        x[np.arange(500) % 11 == 0, 3] = NAN
        x[:, 4] = -INF  # Zero from the start, as a LoRA's second factor.
        jump = Jump([str(i) for i in range(50)])
        found = [jump.update(step, row) for step, row in enumerate(x)]
        assert not any(found), seed


def test_staleness_and_frozen_count_samples_in_a_row():
    stale = Staleness(["a", "b"])
    samples = [[3, 1], [1, 3], [3, NAN], [3, 3], [3, 3], [1, 9], [3, 1], [9, 1]]
    found = [stale.update(10 * i, x) for i, x in enumerate(samples)]
    assert [[e.series for e in part] for part in found] == [
        *([], [], [], ["a", "b"], [], [], [], ["a"])
    ]
    assert [e.onset for e in found[3]] == [20, 10] and found[7][0].onset == 60
    frozen = Frozen(["a", "b"])
    samples = [[0, 1], [0, 1], [0, 0], [NAN, 0], [0, NAN], [0, 1], [0, 1]]
    found = [frozen.update(i, x) for i, x in enumerate(samples)]
    # Where all are zero, or nothing else is known, nothing is known.
    assert [[e.series for e in part] for part in found] == [
        *([], [], [], [], [], ["a"], [])
    ]
    assert found[5][0].onset == 0


def streams():
    rng = np.random.default_rng(5)
    losses = lm_losses(rng, 1200)
    losses[700:] += 0.1
    losses[500:510] += 1
    losses[600] = NAN
    ramp = np.arange(1200) / 100
    many = np.stack([ramp, -ramp, np.where(ramp > 8, 7, 5.0)], axis=1)
    many[1000:, 1] = -INF
    ratios = np.abs(rng.normal(1.5, 1, (1200, 3)))
    zeros = np.where(rng.random((1200, 3)) < 0.5, 0.0, ratios)
    norms = [
        {"loss": x, "gradient_norm": 1 + (t % 300 > 280), "update_norm": 0}
        for t, x in enumerate(losses)
    ]
    names = ["a", "b", "c"]
    yield lambda: NonFinite("loss"), losses
    yield lambda: Spike("loss", 0.1, 0.4), losses
    yield lambda: LevelShift("loss"), losses
    yield lambda: Growth(names, 12.0), many
    yield lambda: Jump(names), many
    yield lambda: Staleness(names), ratios
    yield lambda: Frozen(names), zeros
    yield Judge, norms


@pytest.mark.parametrize("make, values", list(streams()))
def test_a_restored_detector_goes_on_as_if_never_interrupted(make, values):
    whole, found = make(), []
    for step, value in enumerate(values):
        found.append(repr(whole.update(step, value)))
    assert len(set(found)) > 1  # Something happens in the stream.
    now = make()
    for step, value in enumerate(values):
        if step % 97 == 5 or 505 < step < 515:
            state = json.dumps(now.state())
            now.update(step, value)  # Must not reach into the state taken.
            restored = make()
            restored.restore(json.loads(state))
            now = restored
        assert repr(now.update(step, value)) == found[step], step
    assert json.dumps(now.state()) == json.dumps(whole.state())


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: Spike("loss", -0.1, 0.4), "`floor` must be at least 0.*-0.1"),
        (lambda: Spike("loss", 0.4, 0.1), "`large` must be at least 0.4.*0.1"),
        (lambda: Spike("loss", 0.1, 0.4, sigma=-6), "`sigma`.*greater than 0"),
        (lambda: Spike("loss", 0.1, 0.4, window=1), "`window`.*at least 2"),
        (lambda: Spike("loss", 0.1, 0.4, warmup=NAN), "`warmup`.*nan"),
        (lambda: LevelShift("loss", floor=0), "`floor`"),
        (lambda: Growth(["a"], [1.0, 2.0]), "each of the 1 series"),
        (lambda: Growth(["a"], 1.0, window=2), "`window`"),
        (lambda: Growth(["a"], 1.0, horizon=0), "`horizon`"),
        (lambda: Jump("query"), "must be a list.*'query'"),
        (lambda: Jump(["a"], octaves=0), "`octaves`"),
        (lambda: Jump(["a"]).update(1, [1.0, 2.0]), r"1 series.*\(2,\)"),
        (lambda: Staleness(["a"], limit="2"), "`limit`.*'2'"),
        (lambda: Frozen(["a"], samples=0), "`samples`"),
        (lambda: Judge(warmup=-1), "`warmup`"),
        (lambda: Judge().update(1, {"los": 1.0}), "'loss'.*'los'"),
        (lambda: Judge().restore(NonFinite("a").state()), "no state of Judge"),
        (
            lambda: Jump(["a"]).restore(Jump(["a", "b"]).state()),
            r"other series.*\(2, 16\)",
        ),
    ],
)
def test_nonsense_is_refused(make, what):
    with pytest.raises(ValueError, match=what):
        make()


def test_events_are_plain():
    event = Judge().update(3, {"loss": np.float32("nan")})[0]
    assert event.series == "loss" and math.isnan(event.value)
    assert type(event.value) is float and type(event.step) is int
    for make, values in streams():
        detector = make()
        for step, value in enumerate(values):
            found = detector.update(step, value)
            for event in found if isinstance(found, list) else [found]:
                if event:
                    types = (type(event.step), type(event.onset))
                    assert types == (int, int) and type(event.value) is float
