"""AdamW against its formula in float64."""

import math
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from test_schedules import reference_lr

from keras_stable.optimizers import AdamW
from keras_stable.schedules import WarmupSchedule

# `keras.Variable.__array__` is behind NumPy 2; Keras itself calls it when it
# saves and in `get_config`.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword"
)

STEPS = 6
SHAPES = {"kernel": (3, 2), "gain": (3,), "scalar": ()}


def reference_adamw(
    weights,
    grads_of_steps,
    rates,
    weight_decay=0.1,
    beta_1=0.9,
    beta_2=0.95,
    epsilon=1e-8,
    clip=1.0,
    peak=None,
    decayed=lambda w: w.ndim >= 2,
):
    """AdamW in float64, in Kingma and Ba's order with the bias-corrected
    moments written out; clips the global norm at `clip`.
    """
    weights = [np.array(w, "float64") for w in weights]
    m = [np.zeros_like(w) for w in weights]
    v = [np.zeros_like(w) for w in weights]
    for t, (grads, lr) in enumerate(zip(grads_of_steps, rates), start=1):
        grads = [np.array(g, "float64") for g in grads]
        if clip is not None:
            norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
            grads = [g * min(1.0, clip / norm) for g in grads]
        for i, g in enumerate(grads):
            if decayed(weights[i]):
                fraction = lr if peak is None else lr / peak
                weights[i] = weights[i] - fraction * weight_decay * weights[i]
            m[i] = beta_1 * m[i] + (1 - beta_1) * g
            v[i] = beta_2 * v[i] + (1 - beta_2) * g**2
            m_hat = m[i] / (1 - beta_1**t)
            # In these terms Keras's epsilon shrinks as v's correction does.
            epsilon_t = epsilon / math.sqrt(1 - beta_2**t)
            v_hat = v[i] / (1 - beta_2**t)
            weights[i] = weights[i] - lr * m_hat / (np.sqrt(v_hat) + epsilon_t)
    return weights


def make_variables(seed=0):
    rng = np.random.default_rng(seed)
    return [
        keras.Variable(rng.normal(size=shape), dtype="float32", name=name)
        for name, shape in SHAPES.items()
    ]


def make_grads(steps=STEPS, scale=1.0, seed=1):
    rng = np.random.default_rng(seed)
    shapes = SHAPES.values()
    return [
        [scale * rng.normal(size=s).astype("float32") for s in shapes]
        for _ in range(steps)
    ]


def values(variables):
    return [ops.convert_to_numpy(v.value) for v in variables]


def run(optimizer, grads_of_steps):
    """The weights after these steps, from `make_variables()`."""
    variables = make_variables()
    optimizer.build(variables)
    for grads in grads_of_steps:
        optimizer.apply([ops.convert_to_tensor(g) for g in grads], variables)
    return values(variables)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# The formula.


@pytest.mark.parametrize("decay", ["coupled", "independent"])
@pytest.mark.parametrize("scale", [0.1, 10.0])  # unclipped, clipped
@pytest.mark.parametrize("scheduled", [False, True])
def test_update_is_the_formula(decay, scale, scheduled):
    grads = make_grads(scale=scale)
    peak, rates = 0.1, [0.1] * STEPS
    learning_rate = peak
    if scheduled:
        learning_rate = WarmupSchedule(peak, STEPS, warmup_steps=2)
        rates = [
            reference_lr(i, peak, STEPS, 2, "cosine", 0.1)
            for i in range(STEPS)
        ]
    # Strong enough for a wrong decay to show in every step.
    optimizer = AdamW(learning_rate, weight_decay=0.3, decay=decay)
    expected = reference_adamw(
        values(make_variables()),
        grads,
        rates,
        weight_decay=0.3,
        peak=peak if decay == "independent" else None,
    )
    assert_close(run(optimizer, grads), expected)


def test_epsilon_is_added_before_the_bias_correction():
    grads = make_grads(scale=0.01)
    expected = reference_adamw(
        values(make_variables()), grads, [0.1] * STEPS, epsilon=0.01
    )
    assert_close(run(AdamW(0.1, epsilon=0.01), grads), expected)


def test_betas_and_no_clipping():
    grads = make_grads(scale=10.0)
    # With one scale for all gradients, clipping would not show in Adam.
    grads[2] = [100 * g for g in grads[2]]
    settings = {"beta_1": 0.5, "beta_2": 0.8}
    start = values(make_variables())
    rates = [0.1] * STEPS
    free = reference_adamw(start, grads, rates, clip=None, **settings)
    clipped = reference_adamw(start, grads, rates, clip=1.0, **settings)
    off = AdamW(0.1, global_clipnorm=None, **settings)
    assert_close(run(off, grads), free)
    assert_close(run(AdamW(0.1, **settings), grads), clipped)
    assert not np.allclose(free[0], clipped[0], rtol=1e-2)


def test_independent_decay_does_not_see_the_peak():
    zeros = [[np.zeros(s, "float32") for s in SHAPES.values()]] * STEPS

    def decayed(peak, decay):
        schedule = WarmupSchedule(peak, STEPS, warmup_steps=2)
        return run(AdamW(schedule, 0.1, decay=decay), zeros)[0]

    low, high = decayed(1e-3, "independent"), decayed(1e-1, "independent")
    np.testing.assert_allclose(low, high, rtol=1e-5)
    assert not np.allclose(decayed(1e-1, "coupled"), high, rtol=1e-2)
    # By how much: the product over the schedule's fractions.
    fractions = [
        reference_lr(i, 1.0, STEPS, 2, "cosine", 0.1) for i in range(STEPS)
    ]
    kept = math.prod(1 - 0.1 * f for f in fractions)
    start = values(make_variables())[0]
    np.testing.assert_allclose(high, kept * start, rtol=1e-5)


def test_lowering_a_float_lowers_independent_decay():
    optimizer = AdamW(0.2, 0.1, decay="independent")
    optimizer.learning_rate = 0.05
    zeros = [[np.zeros(s, "float32") for s in SHAPES.values()]]
    start = values(make_variables())[0]
    kept = run(optimizer, zeros)[0] / start
    np.testing.assert_allclose(kept, 1 - 0.1 * 0.05 / 0.2, rtol=1e-5)
    # The peak is not the present learning rate, also after a round trip.
    assert AdamW.from_config(optimizer.get_config()).peak_learning_rate == 0.2


def test_peak_of_other_schedules_is_given():
    stock = keras.optimizers.schedules.CosineDecay(0.2, 10)
    with pytest.raises(ValueError, match="CosineDecay has no .*`peak`"):
        AdamW(stock, decay="independent")
    optimizer = AdamW(stock, decay="independent", peak_learning_rate=0.2)
    zeros = [[np.zeros(s, "float32") for s in SHAPES.values()]]
    start = values(make_variables())[0]
    np.testing.assert_allclose(run(optimizer, zeros)[0], 0.9 * start, rtol=1e-5)


def test_learning_rate_may_be_a_callable():
    grads = make_grads()
    expected = reference_adamw(
        values(make_variables()), grads, [0.05] * STEPS
    )
    assert_close(run(AdamW(lambda: 0.05), grads), expected)


# What is decayed.


def test_matrices_only():
    zeros = [[np.zeros(s, "float32") for s in SHAPES.values()]]
    start = values(make_variables())
    kernel, gain, scalar = run(AdamW(0.1, 0.5), zeros)
    np.testing.assert_allclose(kernel, 0.95 * start[0], rtol=1e-6)
    np.testing.assert_array_equal(gain, start[1])
    np.testing.assert_array_equal(scalar, start[2])


def test_more_can_be_excluded():
    zeros = [[np.zeros(s, "float32") for s in SHAPES.values()]]
    start = values(make_variables())
    by_path = AdamW.from_config(AdamW(0.1, no_decay=["ker.el"]).get_config())
    by_call = AdamW(0.1)
    by_call.exclude_from_weight_decay(var_names=["kernel"])
    for optimizer in (by_path, by_call):
        np.testing.assert_array_equal(run(optimizer, zeros)[0], start[0])


def test_a_model_without_matrices():
    gain = keras.Variable([1.0, 2.0])
    optimizer = AdamW(0.1)
    optimizer.build([gain])
    optimizer.apply([ops.ones((2,))], [gain])
    assert_close(values([gain]), [np.array([0.9, 1.9])])


# Gradient accumulation.


def test_accumulation_is_one_large_batch():
    k = 3
    micro = make_grads(steps=k * STEPS, scale=1.0)
    # Micro-batches of unequal norm: clipping each would not be the same.
    micro = [[g * (1 + 5 * (i % k)) for g in gs] for i, gs in enumerate(micro)]
    mean = [
        [np.mean(g, axis=0) for g in zip(*micro[i : i + k])]
        for i in range(0, k * STEPS, k)
    ]
    rates = [
        reference_lr(i, 0.1, STEPS, 2, "linear", 0.1) for i in range(STEPS)
    ]
    schedule = WarmupSchedule(0.1, STEPS, warmup_steps=2, shape="linear")
    optimizer = AdamW(schedule, 0.3, gradient_accumulation_steps=k)
    expected = reference_adamw(
        values(make_variables()), mean, rates, weight_decay=0.3
    )
    assert_close(run(optimizer, micro), expected)
    assert int(optimizer.iterations) == STEPS


def test_weights_rest_between_updates():
    grads = make_grads(steps=3)
    optimizer = AdamW(0.1, gradient_accumulation_steps=4)
    for moved, start in zip(run(optimizer, grads), values(make_variables())):
        np.testing.assert_array_equal(moved, start)


def regression(seed=0, dtype="float32"):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="tanh", dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )


def regression_data(rows=24):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, 4)).astype("float32")
    return x, 5 * x[:, :1] + 1


def fit(model, optimizer, batch_size, epochs=2):
    x, y = regression_data()
    model.compile(optimizer, loss="mse")
    model.fit(
        x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0
    )
    return values(model.weights)


@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_accumulation_in_fit(decay):
    def trained(batch_size, k):
        schedule = WarmupSchedule(0.05, 6, warmup_steps=2, shape="wsd")
        optimizer = AdamW(
            schedule, decay=decay, gradient_accumulation_steps=k
        )
        return fit(regression(), optimizer, batch_size)

    large = trained(batch_size=8, k=1)
    assert_close(trained(batch_size=2, k=4), large, rtol=1e-4, atol=1e-5)
    assert not np.allclose(large[0], values(regression().weights)[0], rtol=0.1)


def test_repeated_tokens_add_up():
    # d sum(table[tokens]) / d table counts each token.
    tokens = np.array([[1, 1, 1, 2]])
    counts = np.array([0.0, 3.0, 1.0])[:, None] * np.ones((3, 2))
    model = keras.Sequential(
        [keras.Input((4,), dtype="int32"), keras.layers.Embedding(3, 2)]
    )
    start = values(model.weights)
    # An epsilon that lets v matter, and a clip that lets the norm matter.
    optimizer = AdamW(0.1, epsilon=0.5)
    total = lambda y, prediction: ops.sum(prediction, axis=(1, 2))  # noqa: E731
    model.compile(optimizer, loss=total)
    model.fit(tokens, np.zeros((1, 1)), epochs=2, verbose=0)
    expected = reference_adamw(
        start, [[counts], [counts]], [0.1, 0.1], epsilon=0.5
    )
    assert_close(values(model.weights), expected)


# float16.


def test_loss_scaling_skips_a_step_whole():
    x, y = regression_data(rows=8)
    model = regression(dtype="mixed_float16")
    inner = AdamW(WarmupSchedule(0.05, 10, warmup_steps=5))
    scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    model.compile(scaled, loss="mse")
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    before = values(model.weights + inner.variables)
    assert int(inner.iterations) == 2

    model.fit(np.full_like(x, np.inf), y, batch_size=8, verbose=0)
    for old, new in zip(before, values(model.weights + inner.variables)):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_allclose(float(inner.learning_rate), 0.03, rtol=1e-6)
    assert float(scaled.dynamic_scale) == 4.0

    model.fit(x, y, batch_size=8, verbose=0)
    assert int(inner.iterations) == 3
    assert not np.array_equal(values(model.weights)[0], before[0])


def test_loss_scaling_with_accumulation():
    def trained(batch_size, k):
        schedule = WarmupSchedule(0.05, 6, warmup_steps=2)
        inner = AdamW(schedule, gradient_accumulation_steps=k)
        scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
        return fit(regression(), scaled, batch_size)

    def unscaled():
        schedule = WarmupSchedule(0.05, 6, warmup_steps=2)
        return fit(regression(), AdamW(schedule), 8)

    accumulated = trained(batch_size=4, k=2)
    assert_close(accumulated, unscaled(), rtol=1e-4, atol=1e-5)


# Saving.

LOAD = """
import sys, keras, numpy as np
import keras_stable, keras_stable.optimizers
model = keras.saving.load_model(sys.argv[1])
optimizer = model.optimizer
assert type(optimizer) is keras_stable.optimizers.AdamW, type(optimizer)
state = {str(i): v.numpy() for i, v in enumerate(optimizer.variables)}
x, y = np.load(sys.argv[2]).values()
model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
for i, v in enumerate(model.weights):
    state[f"w{i}"] = v.numpy()
np.savez(sys.argv[3], config=repr(optimizer.get_config()), **state)
"""


def test_round_trip_in_a_fresh_process(tmp_path):
    schedule = WarmupSchedule(0.05, 100, warmup_steps=7, shape="wsd")
    optimizer = AdamW(
        schedule,
        0.2,
        decay="independent",
        no_decay=["dense_9"],
        clipvalue=0.5,
        gradient_accumulation_steps=4,
    )
    model = regression()
    fit(model, optimizer, batch_size=4, epochs=1)  # stops mid-accumulation
    saved = values(optimizer.variables)
    # iterations, then (accumulator, momentum, velocity) of 4 variables
    assert len(saved) == 13 and all(np.any(value) for value in saved)

    paths = [str(tmp_path / name) for name in ("m.keras", "d.npz", "s.npz")]
    model.save(paths[0])
    x, y = regression_data()
    np.savez(paths[1], x=x, y=y)
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *paths],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = np.load(paths[2])
    for i, value in enumerate(saved):
        np.testing.assert_array_equal(loaded[str(i)], value)
    assert str(loaded["config"]) == repr(optimizer.get_config())
    # Training goes on as if nothing had happened.
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for i, value in enumerate(values(model.weights)):
        np.testing.assert_array_equal(loaded[f"w{i}"], value)


def test_config_round_trip():
    for given in (
        {},
        {"learning_rate": 1, "weight_decay": 0, "clipnorm": 2},
        {"learning_rate": np.float32(0.5), "global_clipnorm": None},
        {"decay": "independent", "amsgrad": True, "name": "mine"},
    ):
        config = AdamW(**given).get_config()
        assert AdamW.from_config(config).get_config() == config


def test_clipping_steps_aside():
    assert AdamW().global_clipnorm == 1.0
    for other in ({"clipnorm": 2.0}, {"clipvalue": 2.0}):
        assert AdamW(**other).global_clipnorm is None
        with pytest.raises(ValueError, match="Only one of"):
            AdamW(global_clipnorm=1.0, **other)


def test_it_is_keras_adamw():
    assert isinstance(AdamW(), keras.optimizers.AdamW)
    # On torch this is the class that updates all variables at once.
    assert type(keras.optimizers.AdamW()) in AdamW.__mro__


# Errors.


@pytest.mark.parametrize(
    "given, message",
    [
        ({"learning_rate": -1e-3}, "`learning_rate` .*at least 0.* -0.001"),
        ({"learning_rate": math.nan}, "`learning_rate` .*finite.* nan"),
        ({"learning_rate": "1e-3"}, "`learning_rate` .*number.*'1e-3'"),
        ({"learning_rate": True}, "`learning_rate` .*finite.* True"),
        ({"learning_rate": None}, "`learning_rate` .*finite.* None"),
        ({"beta_1": 1.0}, "`beta_1` .*less than 1.* 1.0"),
        ({"beta_2": -0.1}, "`beta_2` .*at least 0.* -0.1"),
        ({"beta_2": "0.9"}, "`beta_2` .*finite number.* '0.9'"),
        ({"epsilon": 0}, "`epsilon` must be greater than 0"),
        ({"epsilon": -1e-8}, "`epsilon` .*at least 0.* -1e-08"),
        ({"weight_decay": -0.1}, "`weight_decay` .*at least 0.* -0.1"),
        ({"weight_decay": None}, "`weight_decay` .*finite number.* None"),
        ({"decay": "independant"}, "Did you mean 'independent'"),
        ({"decay": 1e-6}, "Unknown weight decay mode.*1e-06"),
        ({"peak_learning_rate": 1.0}, "for decay='independent' only"),
        (
            {"decay": "independent", "learning_rate": 0.0},
            "`peak_learning_rate` of independent decay must be greater than 0",
        ),
        (
            {"decay": "independent", "learning_rate": lambda: 0.1},
            "function has no attribute `peak`",
        ),
        ({"clipnorm": 0.0}, "`clipnorm` must be greater than 0"),
        ({"global_clipnorm": -1.0}, "`global_clipnorm` .*at least 0"),
        ({"no_decay": "embedding"}, r"write no_decay=\['embedding'\]"),
        ({"no_decay": ["("]}, r"`no_decay` takes regular.*'\('"),
        ({"no_decay": [3]}, "`no_decay` takes regular.* 3"),
        ({"gradient_accumulation_steps": 0}, "at least 1. Received: 0"),
        ({"gradient_accumulation_steps": 2.0}, "an integer.* 2.0"),
        (
            {"gradient_accumulation_steps": 2, "use_ema": True},
            "`use_ema` with gradient accumulation",
        ),
        ({"clip_norm": 1.0}, "not recognized.*clip_norm"),
    ],
)
def test_optimizer_errors(given, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        AdamW(**given)
