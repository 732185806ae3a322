"""A guarded step: one that is left out is as if it had never been."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_stable as ks

BACKEND = keras.backend.backend()
VOCABULARY, LENGTH = 31, 6
INFINITY = float("inf")


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x))


def state(model):
    """All that training changes, by its path."""
    variables = (
        *model.variables,
        *model.optimizer.variables,
        *model.metrics_variables,
    )
    return [(v.path, numpy(v)) for v in variables]


def differences(a, b):
    return [
        path
        for (path, x), (_, y) in zip(a, b, strict=True)
        if not np.array_equal(x, y, equal_nan=True)
    ]


def schedule():
    return ks.WarmupSchedule(1e-2, 20, warmup_steps=4)


def language_model(optimizer=None, variant="qk_norm", **kwargs):
    keras.utils.set_random_seed(0)
    sizes = (VOCABULARY, 1, 2, 8)
    backbone = ks.StableBackbone(*sizes, variant=variant, **kwargs)
    lm = ks.StableCausalLM(backbone)
    lm.compile(optimizer or ks.AdamW(schedule()), weighted_metrics=None)
    return lm


def tokens(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, (4, LENGTH + 1))
    return {"token_ids": ids[:, :-1]}, ids[:, 1:], np.ones((4, LENGTH), "f")


def bad_tokens(seed):
    x, y, weights = tokens(seed)
    return x, y, np.nan * weights


def normalized(optimizer=None, **compile):
    """Running statistics, and dropout's seeds."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    optimizer = optimizer or keras.optimizers.Adam(1e-2)
    model.compile(optimizer, "mse", metrics=["mae"], **compile)
    return model


def pairs(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4, 5)).astype("float32")
    return x, rng.normal(size=(4, 3)).astype("float32")


def bad_pairs(seed):
    x, y = pairs(seed)
    x[0, 0] = np.nan
    return x, y


MODELS = {
    "adamw": lambda: language_model(),
    "independent": lambda: language_model(
        ks.AdamW(schedule(), decay="independent", weight_decay=1e-3)
    ),
    "adam": lambda: language_model(keras.optimizers.Adam(schedule())),
    "momentum": lambda: language_model(keras.optimizers.SGD(0.1, momentum=0.9)),
    "ema": lambda: language_model(ks.AdamW(schedule(), use_ema=True)),
    "accumulation": lambda: language_model(
        ks.AdamW(schedule(), gradient_accumulation_steps=4)
    ),
    "stock_accumulation": lambda: language_model(
        keras.optimizers.Adam(1e-2, gradient_accumulation_steps=4)
    ),
    "remat": lambda: language_model(remat="block"),
    "normalized": normalized,
    "eager": lambda: normalized(run_eagerly=True),
    "qk_norm_cap": lambda: language_model(variant="qk_norm_cap"),
    "sigma_reparam": lambda: language_model(variant="sigma_reparam"),
    "soft_clip": lambda: language_model(variant="soft_clip"),
}


# Where programs take long to compile, the others are left for `-m slow`.
QUICK = "adamw accumulation normalized eager sigma_reparam".split()
SLOW = [] if BACKEND == "torch" else [pytest.mark.slow]


@pytest.fixture(
    params=[
        pytest.param(name, marks=[] if name in QUICK else SLOW)
        for name in MODELS
    ]
)
def build(request):
    return MODELS[request.param]


@pytest.fixture
def half():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def batches(model):
    """Functions from a seed to a batch, and to one of NaN."""
    if isinstance(model, ks.StableCausalLM):
        return tokens, bad_tokens
    return pairs, bad_pairs


def fit(model, data, guard=None, before=lambda step: None, full=False):
    """Trains in one epoch of `fit`; returns samples and the history."""
    samples = []
    with ks.watch(model, guard=guard) as watch:
        watch.full = full

        def begin(step, logs):
            samples.extend(watch.read())
            before(step)

        callback = keras.callbacks.LambdaCallback(on_train_batch_begin=begin)
        x, y, *weights = keras.tree.map_structure(
            lambda *parts: np.concatenate(parts), *data
        )
        history = model.fit(
            x,
            y,
            batch_size=4,
            sample_weight=weights[0] if weights else None,
            shuffle=False,
            callbacks=[callback],
            verbose=0,
        )
        samples += watch.read()
    return samples, history.history


def guarded(samples):
    return [int(s.scalars["guarded"]) for s in samples]


def left_out(build, steps=7, out=(1, 4, 5)):
    """A run with bad steps, and the run without them."""
    model = build()
    good, bad = batches(model)
    data = [(bad if i in out else good)(i) for i in range(steps)]
    samples, history = fit(model, data, ks.Guard(loss=1e4, gradient_norm=1e4))
    assert guarded(samples) == [int(i in out) for i in range(steps)]
    other = build()
    data = [good(i) for i in range(steps) if i not in out]
    _, expected = fit(other, data, ks.Guard())
    return model, other, history, expected


def test_a_run_with_bad_batches_is_the_run_without(build):
    model, other, history, expected = left_out(build)
    assert not differences(state(model), state(other))
    # Neither is the mean of the epoch spoilt.
    assert np.isfinite(history["loss"][0])
    assert history["loss"] == expected["loss"]


def test_the_last_batch_does_not_spoil_the_epoch():
    _, _, history, expected = left_out(MODELS["normalized"], 4, (3,))
    assert np.isfinite(history["loss"][0])
    assert history["loss"] == expected["loss"]
    assert history["mae"] == expected["mae"]


ACCUMULATING = {
    "adamw": lambda: ks.AdamW(schedule(), gradient_accumulation_steps=3),
    "adam": lambda: keras.optimizers.Adam(
        1e-2, gradient_accumulation_steps=3, clipnorm=0.1
    ),
    "momentum": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, gradient_accumulation_steps=3
    ),
}


def micro_steps(optimizer, good):
    """Each step's sample and state, of batches that are good or not."""
    model, found = normalized(ACCUMULATING[optimizer]()), []
    with ks.watch(model, guard=ks.Guard(loss=1e4)) as watch:
        watch.full = False
        for seed, fine in enumerate(good):
            x, y = (pairs if fine else bad_pairs)(seed)
            model.train_on_batch(x, y)
            (sample,) = watch.read()
            # Keras resets metrics before each of these steps.
            trained = state(model)[: -len(model.metrics_variables)]
            found.append((sample.scalars, trained))
    return found


@pytest.mark.parametrize("optimizer", ACCUMULATING)
def test_any_batch_of_an_update_may_be_left_out(optimizer):
    """The first, the last, several; what is gathered of the others stays."""
    good = [1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1]
    found = micro_steps(optimizer, good)
    assert [1 - int(s["guarded"]) for s, _ in found] == good
    made = np.cumsum(good)
    updates = [int(g and n % 3 == 0) for g, n in zip(good, made)]
    assert sum(updates) == 2
    assert [int(s["updated"]) for s, _ in found] == updates
    assert [int(s["update_norm"] > 0) for s, _ in found] == updates
    for fine, (_, before), (_, after) in zip(good[1:], found, found[1:]):
        changed = differences(before, after)
        assert bool(changed) == bool(fine)
    counts = [
        int(next(x for path, x in after if path.endswith("iteration")))
        for _, after in found
    ]
    assert counts == made.tolist()


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        *(pytest.param(name, marks=SLOW) for name in ("adam", "momentum")),
    ],
)
def test_the_norm_is_that_of_the_mean_so_far(optimizer):
    model = normalized(ACCUMULATING[optimizer]())
    data = [pairs(seed) for seed in range(3)]
    samples, _ = fit(model, data, ks.Guard())
    norms = [s.scalars["gradient_norm"] for s in samples]
    below = float(np.nextafter(np.float32(norms[1]), np.float32(0)))
    for limit, out in ((norms[1], 0), (below, 1)):
        model, guard = normalized(ACCUMULATING[optimizer]()), ks.Guard()

        def before(step):
            guard.gradient_norm = limit if step == 1 else INFINITY

        samples, _ = fit(model, data, guard, before)
        assert guarded(samples) == [0, out, 0]
        assert samples[1].scalars["gradient_norm"] == norms[1]


def test_loss_scaling_of_accumulated_batches(half):
    def build():
        return language_model(
            ks.AdamW(schedule(), gradient_accumulation_steps=3)
        )

    model, other, _, _ = left_out(build, 9, (2, 3, 6))
    assert not differences(state(model), state(other))


def test_loss_scaling(half):
    model, other, _, _ = left_out(language_model)
    assert not differences(state(model), state(other))
    # What is its own business stays it.
    model = language_model()
    samples, _ = fit(model, [tokens(0)], ks.Guard())
    model.optimizer.dynamic_scale.assign(1e30)
    before = int(model.optimizer.iterations)
    samples, _ = fit(model, [tokens(1)], ks.Guard(gradient_norm=1e3))
    scalars = samples[0].scalars
    assert scalars["skipped"] == 1 and scalars["guarded"] == 0
    assert not np.isfinite(scalars["gradient_norm"])
    assert numpy(model.optimizer.dynamic_scale) == np.float32(5e29)
    assert int(model.optimizer.iterations) == before


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("number", ["loss", "gradient_norm"])
def test_limits_are_of_what_is_measured(number, full):
    model = language_model()
    data = [tokens(seed) for seed in range(3)]
    (first, *_), _ = fit(model, data[:1], ks.Guard(), full=full)
    found = first.scalars[number]
    below = float(np.nextafter(np.float32(found), np.float32(0)))
    for limit, out in ((found, 0), (below, 1)):
        model = language_model()
        before = model.get_weights()
        guard = ks.Guard(**{number: limit})
        samples, _ = fit(model, data[:1], guard, full=full)
        scalars = samples[0].scalars
        assert scalars[number] == found
        assert scalars["guarded"] == out
        assert scalars["updated"] == 1 - out
        assert (scalars["update_norm"] == 0) == out
        assert scalars["loss_scale"] == 1 and scalars["skipped"] == 0
        same = [(a == b).all() for a, b in zip(before, model.get_weights())]
        assert all(same) == out


def test_a_full_table_of_a_step_left_out_is_of_the_weights_that_stay():
    model = language_model()
    samples, _ = fit(model, [bad_tokens(0)], ks.Guard(), full=True)
    table = samples[0].variables
    weights = {v.path: numpy(v) for v in model.trainable_variables}
    assert (table[:, 1] == 0).all()
    rms = sorted(np.sqrt((w**2).mean()) for w in weights.values())
    np.testing.assert_allclose(sorted(table[:, 2]), rms, rtol=1e-5)
    assert np.isnan(table[:, 3]).all()


def test_numbers_change_between_steps_without_compiling_anew():
    model, guard, traces = language_model(), ks.Guard(), []
    original = model.compute_loss

    def compute_loss(*args, **kwargs):
        traces.append(1)
        return original(*args, **kwargs)

    model.compute_loss = compute_loss

    def before(step):
        guard.loss = -INFINITY if step % 2 else INFINITY

    data = [tokens(seed) for seed in range(6)]
    samples, _ = fit(model, data, guard, before)
    assert guarded(samples) == [0, 1] * 3
    once = len(traces)
    assert once <= 2 or BACKEND == "torch"
    assert int(model.optimizer.iterations) == 3


def test_every_step_left_out_leaves_all_as_it_was(build):
    model = build()
    if BACKEND == "jax" and getattr(model.optimizer, "use_ema", False):
        pytest.skip("Keras cannot `fit` a second time")
    good, _ = batches(model)
    fit(model, [good(seed) for seed in range(3)])
    before = state(model)[: -len(model.metrics_variables)]
    data = [good(seed) for seed in range(3, 6)]
    samples, _ = fit(model, data, ks.Guard(loss=-INFINITY))
    assert guarded(samples) == [1] * 3
    after = state(model)[: -len(model.metrics_variables)]
    assert not differences(before, after)


def test_what_keeps_to_the_limits_is_bit_equal_to_no_guard(build):
    found = []
    for guard in (None, ks.Guard(), ks.Guard(1e6, 1e6)):
        model = build()
        good, _ = batches(model)
        data = [good(seed) for seed in range(8)]
        samples, _ = fit(model, data, guard, full=False)
        assert guarded(samples) == [0] * 8
        found.append(state(model))
    assert not differences(found[0], found[1])
    assert not differences(found[0], found[2])


STOCK = {
    "adafactor": lambda: keras.optimizers.Adafactor(1e-2),
    "ftrl": lambda: keras.optimizers.Ftrl(1e-2),
    "lion": lambda: keras.optimizers.Lion(1e-2),
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-2, centered=True),
}


@pytest.mark.parametrize(
    "name",
    ["lion", *(pytest.param(n, marks=SLOW) for n in STOCK if n != "lion")],
)
def test_stock_optimizers_are_bit_equal_to_no_guard(name):
    """Compilers fuse these updates with whatever is chosen after them."""
    found = []
    for guard in (None, ks.Guard(1e6, 1e6)):
        model = normalized(STOCK[name]())
        data = [pairs(seed) for seed in range(4)]
        samples, _ = fit(model, data, guard, full=False)
        assert guarded(samples) == [0] * 4
        found.append(state(model))
    assert not differences(*found)


class Constant(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return ops.cast(self.rate, "float32") * (1 + ops.cast(step, "float32"))


@pytest.mark.parametrize("kind", ["number", "schedule"])
@pytest.mark.parametrize("optimizer", [ks.AdamW, keras.optimizers.Adam])
def test_half_the_rate_is_half_the_learning_rate(optimizer, kind):
    found = []
    for rate, factor in ((2**-7, 0.5), (2**-8, 1.0)):
        learning = rate if kind == "number" else Constant(rate)
        model = language_model(optimizer(learning))
        guard = ks.Guard(rate=factor)
        fit(model, [tokens(seed) for seed in range(4)], guard)
        found.append(state(model))
        assert float(model.optimizer.learning_rate) in (rate, 5 * rate)
    changed = differences(*found)
    assert [path for path in changed if "learning_rate" not in path] == []


def test_the_rate_is_that_of_the_step_alone():
    model = language_model(ks.AdamW(1e-2))
    with ks.watch(model, guard=ks.Guard(rate=0.5)):
        model.train_on_batch(*tokens(0))
        assert float(model.optimizer.learning_rate) == pytest.approx(1e-2)
    assert not {"apply", "_get_current_learning_rate"} & set(
        vars(model.optimizer)
    )


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has none on torch")
def test_several_steps_in_an_execution():
    x, y = (np.concatenate(parts) for parts in zip(*map(pairs, range(6))))
    x[4 * 3] = np.nan
    found = []
    for size in (1, 3):
        model = normalized(steps_per_execution=size)
        with ks.watch(model, guard=ks.Guard()) as watch:
            history = model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
            samples = watch.read()
        assert guarded(samples) == [0, 0, 0, 1, 0, 0]
        assert np.isfinite(history.history["loss"][0])
        found.append(state(model))
    if BACKEND == "jax":
        assert not differences(*found)
    for (_, a), (_, b) in zip(*found):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="jax alone has simulated devices")
@pytest.mark.parametrize("distribution", ["data", "fsdp"])
def test_one_bad_replica_of_four(distribution):
    import jax

    ks.set_distribution(distribution, batch_size=4, devices=jax.devices()[:4])
    found = []
    for out in ((2,), ()):
        model = language_model()
        data = [tokens(seed) for seed in range(5) if out or seed != 2]
        if out:
            data[2][2][3] = np.nan
        samples, _ = fit(model, data, ks.Guard(1e4, 1e4))
        assert guarded(samples) == [int(i in out) for i in range(len(data))]
        for variable in model.variables:
            # What the devices hold of the same part is the same.
            shards = {}
            for shard in variable.value.addressable_shards:
                known = shards.setdefault(str(shard.index), shard.data)
                assert (np.asarray(known) == np.asarray(shard.data)).all()
        found.append(state(model))
    assert not differences(*found)


def test_frozen_weights_are_not_copied():
    from keras_stable.backend import internals

    model = normalized()
    model.layers[1].trainable = False
    paths = [v.path for v in internals.moving_variables(model)]
    assert len(paths) == 3 and not [p for p in paths if "dense" in p]


@pytest.mark.skipif(BACKEND != "torch", reason="the others compile the step")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own.
@pytest.mark.parametrize(
    "name", ["adamw", "remat", "sigma_reparam", "normalized", "eager"]
)
def test_as_on_a_gpu(name, monkeypatch):
    """Blocks are compiled, and decisions are not waited for."""
    import torch

    from keras_stable.backend import torch_guard
    from keras_stable.backend import torch_programs

    original = torch_programs._measured_last

    def compiled(program):
        program = original(program)
        return torch.compile(program, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(torch_programs, "_programs", {})
    monkeypatch.setattr(torch_programs, "_measured_last", compiled)
    monkeypatch.setattr(torch_guard, "waits", lambda left_out: False)
    test_a_run_with_bad_batches_is_the_run_without(MODELS[name])
    test_every_step_left_out_leaves_all_as_it_was(MODELS[name])
    test_what_keeps_to_the_limits_is_bit_equal_to_no_guard(MODELS[name])


@pytest.mark.skipif(BACKEND != "torch", reason="the others compile the step")
@pytest.mark.parametrize("name", ["adamw", "independent", "sigma_reparam"])
def test_a_device_that_is_not_waited_for(name, monkeypatch):
    from keras_stable.backend import torch_guard

    asked = []
    original = torch_guard.taken_back

    def taken_back(optimizer):
        asked.append(original(optimizer))
        return asked[-1]

    monkeypatch.setattr("keras_stable.backend.torch.taken_back", taken_back)
    monkeypatch.setattr(torch_guard, "waits", lambda left_out: False)
    model, other, _, _ = left_out(MODELS[name])
    assert not differences(state(model), state(other))
    # The host counted updates without asking the device for its count.
    assert asked[:7] == [0, 0, 1, 0, 0, 1, 1]
