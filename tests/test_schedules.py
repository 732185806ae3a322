"""Learning rate schedules against their formula, and against Keras's."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_stable.optimizers import AdamW
from keras_stable.schedules import SCHEDULES
from keras_stable.schedules import WarmupSchedule

RESTARTING = [shape for shape in SCHEDULES if shape != "constant"]


def ends_of(total, warmup, cycles, growth):
    """The last update of each cycle, from the sum of a geometric series."""
    if growth == 1:
        part = [(i + 1) / cycles for i in range(cycles)]
    else:
        whole = growth**cycles - 1
        part = [(growth ** (i + 1) - 1) / whole for i in range(cycles)]
    return [warmup + round((total - warmup) * x) for x in part]


def reference_lr(
    step,
    peak,
    total,
    warmup,
    shape,
    final,
    fraction=0.2,
    cycles=1,
    growth=1.0,
    decay=1.0,
    rewarmup=0,
):
    """One learning rate, by cases instead of clipped fractions."""
    update, floor, begin, low = step + 1, peak * final, 0, 0.0
    if update > total:
        return peak if shape == "constant" else floor
    for end in ends_of(total, warmup, cycles, growth):
        if update <= end:
            break
        begin, low, warmup, peak = end, floor, rewarmup, peak * decay
    if update <= begin + warmup:
        return low + (peak - low) * (update - begin) / warmup
    if shape == "constant":
        return peak
    start = end - (end - begin) * fraction if shape == "wsd" else begin + warmup
    if update <= start:
        return peak
    q = (update - start) / (end - start)
    fall = {
        "cosine": (1 + math.cos(math.pi * q)) / 2,
        "linear": 1 - q,
        "wsd": 1 - math.sqrt(q),
    }[shape]
    return floor + (peak - floor) * fall


def rates(schedule, steps):
    return [float(schedule(step)) for step in steps]


# One cycle.


@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_is_the_formula(shape, warmup, final):
    settings = {"warmup_steps": warmup, "shape": shape, "final": final}
    schedule = WarmupSchedule(0.3, 50, **settings)
    steps = range(60)
    expected = [reference_lr(i, 0.3, 50, warmup, shape, final) for i in steps]
    actual = rates(schedule, steps)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_landmarks():
    schedule = WarmupSchedule(1.0, total_steps=100)
    at = rates(schedule, (0, 4, 99, 100, 10**9))
    np.testing.assert_allclose(at, [0.2, 1, 0.1, 0.1, 0.1], rtol=1e-6)
    held = WarmupSchedule(1.0, 100, shape="wsd", decay_fraction=0.5, final=0)
    at = rates(held, (4, 30, 49, 50, 61, 99))
    expected = [1, 1, 1, 1 - 0.02**0.5, 1 - 0.24**0.5, 0]
    np.testing.assert_allclose(at, expected, atol=1e-6)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_wsd_decays_also_in_few_steps(total):
    # A fifth of these rounds to no step at all.
    schedule = WarmupSchedule(1.0, total, shape="wsd")
    expected = [1.0] * (total - 1) + [0.1, 0.1]
    np.testing.assert_allclose(rates(schedule, range(total + 1)), expected)


@pytest.mark.parametrize("shape", SCHEDULES)
def test_ten_million_steps(shape):
    total, warmup = 10_000_000, 100_000
    schedule = WarmupSchedule(1e-3, total, warmup, shape, final=0.1)
    for step in (0, 1, 99_999, 5_000_000, 7_999_999, 9_999_998, 9_999_999):
        count = keras.Variable(step, dtype="int", trainable=False)
        expected = reference_lr(step, 1e-3, total, warmup, shape, 0.1)
        np.testing.assert_allclose(float(schedule(count)), expected, rtol=1e-5)
    # Warm-up tells neighbours apart: float32 counts them exactly.
    early = rates(schedule, (50_000, 50_001))
    assert early[0] < early[1]


def test_stock_optimizers_take_the_schedule():
    schedule = WarmupSchedule(
        0.1, 8, warmup_steps=2, cycles=2, rewarmup_steps=1
    )
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(schedule), "mse")
    x, y = np.ones((3, 2), "float32"), np.ones((3, 1), "float32")
    found = []
    for _ in range(3):  # epochs of three steps
        model.fit(x, y, batch_size=1, verbose=0)
        found.append(float(model.optimizer.learning_rate))
    expected = [
        reference_lr(step, 0.1, 8, 2, "cosine", 0.1, cycles=2, rewarmup=1)
        for step in (3, 6, 9)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Warm restarts.


@pytest.mark.parametrize("shape", RESTARTING)
@pytest.mark.parametrize("cycles, growth", [(1, 3.0), (2, 1.0), (3, 2.0)])
@pytest.mark.parametrize("rewarmup", [0, 1, 5])
@pytest.mark.parametrize("warmup", [0, 10])
def test_restarts_are_the_formula(shape, cycles, growth, rewarmup, warmup):
    # Cycles of lengths whose fifth, the decay of "wsd", is whole too.
    total = warmup + 70 if warmup == 0 or shape != "wsd" else 150
    schedule = WarmupSchedule(
        0.3,
        total,
        warmup,
        shape,
        0.125,
        cycles=cycles,
        cycle_growth=growth,
        peak_decay=0.5,
        rewarmup_steps=rewarmup,
    )
    given = (0.3, total, warmup, shape, 0.125)
    kwargs = {"cycles": cycles, "growth": growth, "rewarmup": rewarmup}
    steps = range(total + 10)
    expected = [reference_lr(i, *given, decay=0.5, **kwargs) for i in steps]
    np.testing.assert_allclose(
        rates(schedule, steps), expected, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "t_mul, m_mul, alpha", [(1.0, 1.0, 0.1), (2.0, 1.0, 0.1), (2.0, 0.5, 0.0)]
)
def test_is_kerass_cosine_decay_restarts(t_mul, m_mul, alpha):
    first, cycles = 8, 3
    ends = np.cumsum([first * t_mul**i for i in range(cycles)]).astype(int)
    keras_schedule = keras.optimizers.schedules.CosineDecayRestarts(
        0.3, first, t_mul=t_mul, m_mul=m_mul, alpha=alpha
    )
    schedule = WarmupSchedule(
        0.3,
        int(ends[-1]),
        warmup_steps=0,
        final=alpha,
        cycles=cycles,
        cycle_growth=t_mul,
        peak_decay=m_mul,
    )
    # Ours counts the update being made, so it is ahead by one. At the end of
    # a cycle it is at the floor where Keras has restarted.
    within = [u for u in range(1, ends[-1]) if u not in ends]
    ours = rates(schedule, [u - 1 for u in within])
    np.testing.assert_allclose(
        ours, rates(keras_schedule, within), rtol=2e-5, atol=2e-6
    )
    floors = rates(schedule, ends - 1)
    np.testing.assert_allclose(floors, [0.3 * alpha] * cycles, rtol=1e-6)
    assert float(keras_schedule(int(ends[0]))) > 0.14


@pytest.mark.parametrize("shape", RESTARTING)
@pytest.mark.parametrize("growth", [0.7, 1.0, 1.9])
@pytest.mark.parametrize("rewarmup", [0, 1, 7])
def test_what_holds_of_every_cycle(shape, growth, rewarmup):
    total, warmup, cycles = 211, 11, 4
    schedule = WarmupSchedule(
        1.0,
        total,
        warmup,
        shape,
        cycles=cycles,
        cycle_growth=growth,
        peak_decay=0.8,
        rewarmup_steps=rewarmup,
    )
    rate = [0.0] + rates(schedule, range(total + 5))  # by number of update
    ends = [0] + ends_of(total, warmup, cycles, growth)
    assert ends[-1] == total
    for i, (begin, end) in enumerate(zip(ends, ends[1:])):
        climb = warmup if i == 0 else rewarmup
        peak = np.float32(0.8**i)
        own = rate[begin + 1 : end + 1]
        assert own[-1] == np.float32(0.1)
        if climb:
            np.testing.assert_allclose(own[climb - 1], peak, rtol=1e-6)
            assert (np.diff([rate[begin], *own[:climb]]) > 0).all()
        # A step down from the peak, at most the step of its steepest shape.
        np.testing.assert_allclose(max(own), peak, rtol=0.12)
        assert max(own) <= peak * (1 + 1e-6)
        assert (np.diff(own[max(climb - 1, 0) :]) <= 1e-7).all()
    assert set(rate[total:]) == {rate[total]}


def test_restarts_at_ten_million_steps():
    given = (1e-3, 10_000_000, 100_000, "cosine", 0.1)
    kwargs = {"cycles": 7, "rewarmup": 1000, "growth": 1.3, "decay": 0.9}
    schedule = WarmupSchedule(
        *given,
        cycles=7,
        rewarmup_steps=1000,
        cycle_growth=1.3,
        peak_decay=0.9,
    )
    for end in ends_of(10_000_000, 100_000, 7, 1.3):
        for step in (end - 2, end - 1, end, end + 1, end + 999, end + 1000):
            count = keras.Variable(step, dtype="int", trainable=False)
            np.testing.assert_allclose(
                float(schedule(count)),
                reference_lr(step, *given, **kwargs),
                rtol=1e-5,
            )


def traced(function):
    """Compiled once, with the step unknown."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    import torch

    class Module(torch.nn.Module):
        def forward(self, step):
            return function(step)

    return torch.export.export(Module(), (ops.array(0, "int32"),)).module()


@pytest.mark.parametrize("shape", RESTARTING)
def test_step_may_be_traced(shape):
    settings = {"cycles": 3, "cycle_growth": 2.0, "rewarmup_steps": 2}
    schedule = WarmupSchedule(0.3, 40, 5, shape, peak_decay=0.7, **settings)
    compiled = traced(schedule)
    for step in range(0, 45, 2):
        np.testing.assert_allclose(
            float(compiled(ops.array(step, "int32"))),
            float(schedule(step)),
            rtol=1e-6,
        )


def test_is_float32_under_any_policy():
    keras.config.set_dtype_policy("bfloat16")
    schedule = WarmupSchedule(0.3, 1000, cycles=3)
    for step in (257, keras.Variable(257, dtype="int", trainable=False)):
        rate = schedule(step)
        assert keras.backend.standardize_dtype(rate.dtype) == "float32"
        expected = reference_lr(257, 0.3, 1000, 50, "cosine", 0.1, cycles=3)
        np.testing.assert_allclose(float(rate), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SCHEDULES)
def test_config_round_trip(shape):
    settings = {"shape": shape, "name": "mine"}
    if shape != "constant":
        settings |= {"cycles": np.int64(3), "cycle_growth": np.float32(1.5)}
        settings |= {"peak_decay": 0.9, "rewarmup_steps": np.int32(2)}
    schedule = WarmupSchedule(0.3, 100, **settings)
    config = json.loads(json.dumps(schedule.get_config()))
    again = WarmupSchedule.from_config(config)
    assert again.get_config() == config
    assert rates(again, range(110)) == rates(schedule, range(110))
    loaded = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(schedule)
    )
    assert loaded.get_config() == config


def test_configs_of_before_restarts_load():
    config = {
        "peak": 0.3,
        "total_steps": 50,
        "warmup_steps": 5,
        "shape": "wsd",
        "final": 0.0,
        "decay_fraction": 0.5,
        "name": None,
    }
    schedule = WarmupSchedule.from_config(config)
    expected = [
        reference_lr(i, 0.3, 50, 5, "wsd", 0.0, fraction=0.5) for i in range(55)
    ]
    np.testing.assert_allclose(
        rates(schedule, range(55)), expected, rtol=1e-5, atol=1e-7
    )


# Errors.


@pytest.mark.parametrize(
    "given, message",
    [
        ({"shape": "cosin"}, "Did you mean 'cosine'"),
        ({"peak": 0}, "`peak` must be greater than 0"),
        ({"peak": -1.0}, "`peak` .*at least 0"),
        ({"peak": math.inf}, "`peak` .*finite"),
        ({"total_steps": 0}, "`total_steps` .*at least 1.* 0"),
        ({"total_steps": 1e3}, "`total_steps` .*integer.* 1000.0"),
        ({"total_steps": True}, "`total_steps` .*integer.* True"),
        ({"warmup_steps": -1}, "`warmup_steps` .*at least 0.* -1"),
        ({"warmup_steps": 100}, "less than `total_steps`.*=100"),
        ({"final": -0.1}, "`final` .*at least 0"),
        ({"final": 3.0}, "`final` is a fraction.*3.0"),
        ({"decay_fraction": 0.0}, r"`decay_fraction` must be in \(0, 1\]"),
        ({"decay_fraction": 1.5}, r"`decay_fraction` must be in \(0, 1\]"),
        (
            {"shape": "wsd", "warmup_steps": 60, "decay_fraction": 0.5},
            "during the warm-up.*0.5.*60.*100",
        ),
        ({"cycles": 0}, "`cycles` .*at least 1.* 0"),
        ({"cycles": 2.0}, "`cycles` .*integer.* 2.0"),
        ({"cycles": 96}, "`cycles` must be at most.*cycles=96, updates=95"),
        ({"cycles": 2, "shape": "constant"}, "nothing to restart.*cycles=2"),
        ({"cycle_growth": 0.0}, "`cycle_growth` must be greater than 0"),
        ({"cycle_growth": -2.0}, "`cycle_growth` .*at least 0"),
        ({"cycle_growth": math.nan}, "`cycle_growth` .*finite"),
        ({"cycles": 9, "cycle_growth": 2.0}, "cycle 1 would have 0 of 95"),
        ({"cycles": 9, "cycle_growth": 0.5}, "cycle 7 would have 0 of 95"),
        ({"cycles": 50, "cycle_growth": 1e300}, "cycle 1 would have 0"),
        ({"peak_decay": 0.0}, r"`peak_decay` must be in \(0, 1\]"),
        ({"peak_decay": 1.1}, r"`peak_decay` must be in \(0, 1\].*1.1"),
        (
            {"cycles": 3, "peak_decay": 0.3},
            "below the final.*0.3.*cycles=3.*0.09 of.*final=0.1",
        ),
        ({"rewarmup_steps": -1}, "`rewarmup_steps` .*at least 0.* -1"),
        ({"rewarmup_steps": 0.1}, "`rewarmup_steps` .*integer.* 0.1"),
        (
            {"cycles": 5, "rewarmup_steps": 19},
            "needs its re-warm-up.*=19.*cycle 2 would have 19 of 95",
        ),
        (
            {"cycles": 5, "rewarmup_steps": 18, "shape": "wsd"},
            "during the warm-up.*0.2.*cycle 2 of 5 a warm-up of 18 of 19",
        ),
    ],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        WarmupSchedule(**{"peak": 0.1, "total_steps": 100, **given})


def program(peak):
    """An update as JAX lowers it, and the weights that it makes of ones."""
    import jax

    schedule = WarmupSchedule(peak, 100)
    optimizer = AdamW(schedule, weight_decay=0.1, decay="independent")
    weight = keras.Variable(np.ones((2, 2)), name="w")
    optimizer.build([weight])
    variables = [*optimizer.variables, weight]

    def update(gradient, values):
        scope = keras.StatelessScope([*zip(variables, values)])
        with scope:
            optimizer.apply([gradient])
        return scope.get_current_value(weight)

    values = [variable.value for variable in variables]
    lowered = jax.jit(update).lower(weight.value, values)
    weights = lowered.compile()(weight.value, values)
    return lowered.as_text(), np.asarray(weights).ravel().tolist()


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Others keep no such programs."
)
def test_programs_of_one_peak_are_those_of_another():
    peaks = (1e-3, 5e-2)
    baked, expected = zip(*map(program, peaks))
    assert baked[0] != baked[1]
    code = (
        "import json, test_schedules; "
        f"print(json.dumps([test_schedules.program(p) for p in {peaks}]))"
    )
    name = "JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, name: "1"},
    )
    assert done.returncode == 0, done.stderr
    given, found = zip(*json.loads(done.stdout))
    assert given[0] == given[1]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] != found[1]
