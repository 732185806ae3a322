"""Watching: what it measures of updates, and that it leaves no trace."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_stable as ks
from keras_stable.packing import SCALARS
from keras_stable.telemetry import STATISTICS
from keras_stable.updates import VARIABLE_STATISTICS
from keras_stable.watch import KEY

BACKEND = keras.backend.backend()
VOCABULARY, LENGTH = 31, 6


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def dense(optimizer, seed=0, **compile):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((5,))
    x = keras.layers.Dense(8, activation="tanh", name="first")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="last")(x))
    model.compile(optimizer, loss="mse", **compile)
    return model


def language_model(optimizer=None, seed=0, variant="qk_norm", **kwargs):
    keras.utils.set_random_seed(seed)
    sizes = (VOCABULARY, 2, 2, 16)
    backbone = ks.StableBackbone(*sizes, variant=variant, **kwargs)
    lm = ks.StableCausalLM(backbone)
    lm.compile(optimizer or ks.AdamW(1e-2), weighted_metrics=None)
    return lm


def pairs(batch=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, 5)).astype("float32")
    return x, rng.normal(size=(batch, 3)).astype("float32")


def tokens(batch=4, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, (batch, LENGTH + 1))
    return {"token_ids": ids[:, :-1]}, ids[:, 1:]


def gradients(model, x, y):
    """Float64 gradients of the mean square error of `dense`, by hand."""
    kernel1, bias1, kernel2, bias2 = (numpy(w) for w in model.weights)
    x, y = x.astype("float64"), y.astype("float64")
    h = np.tanh(x @ kernel1 + bias1)
    error = 2 * (h @ kernel2 + bias2 - y) / y.size
    inner = (error @ kernel2.T) * (1 - h**2)
    return [x.T @ inner, inner.sum(0), h.T @ error, error.sum(0)], (
        ((h @ kernel2 + bias2 - y) ** 2).mean()
    )


def norm(arrays):
    return np.sqrt(sum((a**2).sum() for a in arrays))


def rms(x):
    return np.sqrt((x**2).mean())


CLIPPING = [
    {},
    {"global_clipnorm": 0.05},
    {"clipnorm": 0.02},
    {"clipvalue": 0.01},
]


@pytest.mark.parametrize("clip", CLIPPING, ids=lambda c: "-".join(c) or "none")
def test_updates_are_as_in_float64(clip):
    model = dense(keras.optimizers.Adam(0.01, beta_2=0.9, **clip))
    moments = [np.zeros(w.shape) for w in model.weights]
    with ks.watch(model) as watch:
        for step in range(1, 4):
            x, y = pairs(seed=step)
            before = [numpy(w) for w in model.weights]
            expected, loss = gradients(model, x, y)
            model.train_on_batch(x, y)
            (sample,) = watch.read()
            after = [numpy(w) for w in model.weights]
            changes = [b - a for a, b in zip(before, after)]
            clipped, share = clip_by_hand(expected, clip)
            moments = [0.9 * v + 0.1 * g**2 for v, g in zip(moments, clipped)]
            stale = [
                rms(g / np.sqrt(v / (1 - 0.9**step)))
                for g, v in zip(clipped, moments)
            ]
            found = sample.scalars
            assert list(found) == list(SCALARS)
            close = pytest.approx
            assert found["loss"] == close(loss, rel=1e-5)
            assert found["gradient_norm"] == close(norm(expected), rel=1e-4)
            assert found["update_norm"] == close(norm(changes), rel=1e-3)
            assert found["clipped"] == close(share)
            assert found["updated"] == 1 and found["skipped"] == 0
            assert found["first_nonfinite"] is None
            assert np.isnan(found["max_logit"])
            table = np.stack(
                [
                    [rms(g) for g in expected],
                    [rms(c) for c in changes],
                    [rms(w) for w in after],
                    stale,
                ],
                axis=1,
            )
            assert len(VARIABLE_STATISTICS) == 4
            np.testing.assert_allclose(
                sample.variables, table, rtol=2e-3, atol=1e-8
            )
    assert watch.layouts[True].variables == [w.path for w in model.weights]


def clip_by_hand(grads, clip):
    ((kind, limit),) = clip.items() or {None: None}.items()
    if kind == "global_clipnorm":
        factor = min(1, limit / norm(grads))
        return [factor * g for g in grads], float(norm(grads) > limit)
    if kind == "clipnorm":
        norms = [norm([g]) for g in grads]
        clipped = [g * min(1, limit / n) for g, n in zip(grads, norms)]
        return clipped, np.mean([n > limit for n in norms])
    if kind == "clipvalue":
        flat = np.concatenate([g.ravel() for g in grads])
        clipped = [np.clip(g, -limit, limit) for g in grads]
        return clipped, (np.abs(flat) > limit).mean()
    return grads, 0.0


def test_gradient_accumulation():
    model = dense(keras.optimizers.SGD(0.1, gradient_accumulation_steps=3))
    sums, found = [0.0] * 4, []
    with ks.watch(model) as watch:
        for step in range(6):
            x, y = pairs(seed=step)
            count = step % 3 + 1
            grads, loss = gradients(model, x, y)
            sums = [g + (s if count > 1 else 0) for s, g in zip(sums, grads)]
            before = [numpy(w) for w in model.weights]
            model.train_on_batch(x, y)
            (sample,) = watch.read()
            change = norm([numpy(w) - b for w, b in zip(model.weights, before)])
            scalars = sample.scalars
            mean = norm([s / count for s in sums])
            assert scalars["gradient_norm"] == pytest.approx(mean, rel=1e-4)
            assert scalars["update_norm"] == pytest.approx(change, rel=1e-3)
            assert scalars["loss"] == pytest.approx(loss, rel=1e-5)
            found.append(scalars["updated"])
    assert found == [0, 0, 1, 0, 0, 1]


def test_loss_scaling_is_taken_out_and_skips_are_told():
    keras.config.set_dtype_policy("mixed_float16")
    lm = language_model(ks.AdamW(1e-3))
    with ks.watch(lm) as watch:
        for _ in range(2):
            lm.train_on_batch(*tokens())
        fine = watch.read()
        lm.optimizer.dynamic_scale.assign(1e30)
        lm.train_on_batch(*tokens())
        (skipped,) = watch.read()
    keras.config.set_dtype_policy("float32")
    plain = language_model(ks.AdamW(1e-3))
    with ks.watch(plain) as watch:
        plain.train_on_batch(*tokens())
        expected = watch.read()[0].scalars
    first = fine[0].scalars
    assert first["loss_scale"] == 2**15 and not first["skipped"]
    for name in ("loss", "gradient_norm", "update_norm"):
        assert first[name] == pytest.approx(expected[name], rel=0.02)
    assert skipped.scalars["skipped"] == 1
    assert skipped.scalars["update_norm"] == 0
    assert not np.isfinite(skipped.scalars["gradient_norm"])
    assert np.isfinite(skipped.scalars["loss"])


def test_several_optimizers():
    table = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1))
    table["last/.*"] = keras.optimizers.Adam(0.01)
    model = dense(keras.optimizers.MultiOptimizer(table))
    with ks.watch(model) as watch:
        model.train_on_batch(*pairs())
    (sample,) = watch.read()
    stale = sample.variables[:, -1]
    # SGD has no second moment.
    assert np.isnan(stale).tolist() == [True, True, False, False]
    assert (sample.variables[:, :3] > 0).all()


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has none on torch")
def test_steps_per_execution():
    many = dense(keras.optimizers.Adam(0.01), steps_per_execution=3)
    one = dense(keras.optimizers.Adam(0.01))
    x, y = pairs(28)
    found = []
    for model in (many, one):
        with ks.watch(model) as watch:
            model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
            sizes = [len(samples) for samples in watch.executions()]
            watch.full = False
            model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
            samples = watch.read()
        found.append([s.scalars["loss"] for s in samples])
        assert sum(sizes) == 14 and len(samples) == 7
    assert sizes == [1] * 14
    np.testing.assert_allclose(*found, rtol=1e-5)


def described(model):
    return {
        "weights": [w.tolist() for w in model.get_weights()],
        "count": model.count_params(),
        "names": [w.path for w in model.weights],
        "slots": [v.path for v in model.optimizer.variables],
        "metrics": [m.name for m in model.metrics],
        "config": str(model.get_config()),
    }


def test_nothing_is_left_behind(tmp_path):
    model = language_model()
    x, y = tokens()
    model.train_on_batch(x, y)
    optimizer = model.optimizer
    before = described(model)
    layers = list(model._flatten_layers())
    methods = {
        name
        for owner in (*layers, optimizer)
        for name in dir(type(owner))
        if callable(getattr(type(owner), name, None))
    }
    own = [methods & set(vars(owner)) for owner in (*layers, optimizer)]
    outputs = numpy(model(x))
    model.save_weights(tmp_path / "plain.weights.h5")
    stock = model.train_function

    watch = ks.watch(model)
    assert (numpy(model(x)) == outputs).all()
    assert described(model) == before
    model.save_weights(tmp_path / "watched.weights.h5")
    assert keys(tmp_path / "watched.weights.h5") == keys(
        tmp_path / "plain.weights.h5"
    )
    # A train function that was traced before is made again.
    model.train_on_batch(x, y)
    assert len(watch.read()) == 1
    assert model.train_function is not stock
    model.save(tmp_path / "watched.keras")
    evaluated = model.evaluate(x, y, verbose=0, return_dict=True)
    assert not {"gradient_norm", "max_logit", KEY} & set(evaluated)
    assert not watch.read()

    watch.remove()
    watch.remove()
    now = [methods & set(vars(owner)) for owner in (*layers, optimizer)]
    assert now == own
    model.train_on_batch(x, y)
    assert not watch.read()
    # The stock classes load what was saved while it was watched.
    loaded = keras.models.load_model(tmp_path / "watched.keras")
    assert [v.shape for v in loaded.optimizer.variables] == [
        v.shape for v in optimizer.variables
    ]
    assert int(loaded.optimizer.iterations) == 2


def keys(path):
    import h5py

    found = []
    with h5py.File(path) as file:
        file.visit(found.append)
    return found


@pytest.mark.parametrize(
    "variant", ["qk_norm_cap", "soft_clip", "sigma_reparam"]
)
def test_watched_training_is_bit_equal(variant):
    weights = []
    for watched in (False, True):
        lm = language_model(variant=variant)
        watch = ks.watch(lm) if watched else None
        for step in range(60):
            if watched:
                watch.full = step % 3 == 0
            lm.train_on_batch(*tokens(seed=step))
        weights.append(lm.get_weights())
    assert len(watch.read()) == 60
    for a, b in zip(*weights):
        assert (a == b).all()


def test_full_and_light_steps_agree():
    lm = language_model()
    scalars = []
    for full in (True, False):
        lm = language_model()
        with ks.watch(lm) as watch:
            watch.full = full
            lm.train_on_batch(*tokens())
            (sample,) = watch.read()
        assert (sample.tensors is not None) == full
        scalars.append(sample.scalars)
    for name in SCALARS:
        if isinstance(scalars[0][name], float):
            assert scalars[0][name] == pytest.approx(scalars[1][name], rel=1e-4)


def tables(model, data, **kwargs):
    with ks.watch(model, **kwargs) as watch:
        model.train_on_batch(*data)
        (sample,) = watch.read()
    return watch.layouts[True], sample


@pytest.mark.parametrize("policy", ["mlp", "block"])
def test_remat_measures_what_it_would_without(policy):
    layouts, samples = zip(
        *(
            tables(language_model(remat=remat), tokens(), inputs=True)
            for remat in ("none", policy)
        )
    )
    assert layouts[0] == layouts[1]
    np.testing.assert_allclose(
        samples[0].tensors, samples[1].tensors, rtol=1e-4, atol=1e-6
    )
    for a, b in zip(samples[0].heads, samples[1].heads):
        np.testing.assert_allclose(a, b, rtol=1e-4)


# Keras's remat on TensorFlow cannot pass the argument `training`.
@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras raises")
@pytest.mark.parametrize("mode", ["full", "larger_than"])
def test_foreign_layers_inside_a_remat_scope(mode):
    def build():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6, 8))
        mask = np.tril(np.ones((6, 6), bool))[None]
        attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
        x = attention(inputs, inputs, attention_mask=ops.array(mask))
        x = keras.layers.Dense(8, name="inner")(x)
        return keras.Model(inputs, keras.layers.Dense(3, name="last")(x))

    plain = build()
    kwargs = {"output_size_threshold": 1} if mode == "larger_than" else {}
    with keras.RematScope(mode=mode, **kwargs):
        again = build()
    data = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
    found = []
    for model in (plain, again):
        model.compile("sgd", "mse", jit_compile="auto")
        found.append(tables(model, (data, data[..., :3])))
    (layout, sample), (other, same) = found
    assert layout.tensors == other.tensors and not other.unreachable
    np.testing.assert_allclose(sample.tensors, same.tensors, rtol=1e-4)
    np.testing.assert_allclose(sample.heads[0], same.heads[0], rtol=1e-4)


@pytest.mark.skipif(BACKEND != "jax", reason="only traces can be left")
def test_what_runs_inside_a_foreign_function_is_reported():
    class Wrapped(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(5, name="inner")

        def build(self, shape):
            self.inner.build(shape)

        def call(self, x):
            return keras.remat(lambda x: self.inner(x))(x)

    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(3)(Wrapped()(inputs)))
    model.compile("sgd", "mse")
    layout, sample = tables(model, pairs())
    assert [name for name in layout.unreachable if "inner" in name]
    assert len(layout.tensors) == len(sample.tensors) == 2


def test_a_layer_called_twice_is_one_row():
    shared = keras.layers.Dense(5, name="shared")
    inputs = keras.Input((5,))
    model = keras.Model(inputs, shared(shared(inputs)))
    model.compile("sgd", "mse")
    x = pairs()[0]
    once = numpy(shared(x))
    twice = numpy(shared(once))
    layout, sample = tables(model, (x, x))
    assert layout.tensors == ["shared"]
    found = dict(zip(STATISTICS, sample.tensors[0]))
    both = np.concatenate([once, twice])
    assert found["rms"] == pytest.approx(rms(both), rel=1e-5)
    assert found["abs_max"] == pytest.approx(np.abs(both).max(), rel=1e-5)
    assert found["mean"] == pytest.approx(both.mean(), rel=1e-4)


def test_subclassed_models():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.a = keras.layers.Dense(4, name="a")
            self.b = keras.layers.Dense(3, name="b")

        def call(self, x):
            return self.b(ops.tanh(self.a(x)))

    model = Two()
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="is not built"):
        ks.watch(model)
    model(pairs()[0])
    layout, _ = tables(model, pairs())
    assert [name.split("/")[-1] for name in layout.tensors] == ["a", "b"]


def test_first_bad_layer_and_shallowest_clean_gradient():
    lm = language_model()
    kernel = lm.backbone.transformer_layers[1].mlp.fc1.kernel
    value = numpy(kernel)
    value[0, 0] = np.nan
    kernel.assign(value)
    for full in (True, False):
        with ks.watch(lm) as watch:
            watch.full = full
            lm.train_on_batch(*tokens())
            (sample,) = watch.read()
        assert sample.scalars["first_nonfinite"] == "block_1/mlp/fc1"
        assert sample.scalars["nonfinite"] >= 3
        if full:
            # The update has made every weight bad: begin again.
            lm = language_model()
            kernel = lm.backbone.transformer_layers[1].mlp.fc1.kernel
            kernel.assign(value)


def test_gradients_that_turn_bad_on_their_way_back():
    # sqrt at zero: a finite loss whose gradient is infinite below it.
    inputs = keras.Input((5,))
    x = keras.layers.Dense(4, name="deep", kernel_initializer="zeros")(inputs)
    x = keras.layers.Lambda(lambda x: ops.sqrt(x))(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="last")(x))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    _, sample = tables(model, pairs())
    scalars = sample.scalars
    assert np.isfinite(scalars["loss"]) and scalars["nonfinite"] == 0
    assert scalars["nonfinite_gradients"] == 2
    assert scalars["clean_gradient"] == "last/kernel"


@pytest.mark.skipif(BACKEND != "jax", reason="jax alone distributes")
@pytest.mark.parametrize("kind", ["data", "model"])
def test_four_devices_measure_what_one_does(kind):
    import jax

    four, found = jax.devices()[:4], []
    for distributed in (False, True):
        keras.distribution.set_distribution(None)
        if distributed and kind == "data":
            ks.set_distribution("data", batch_size=4, devices=four)
        elif distributed:
            mesh = keras.distribution.DeviceMesh(
                (2, 2), ("batch", "model"), four
            )
            layout = keras.distribution.LayoutMap(mesh)
            layout[".*(query|key|value|fc1)/kernel"] = (None, "model")
            layout[".*(output|fc2)/kernel"] = ("model", None)
            keras.distribution.set_distribution(
                keras.distribution.ModelParallel(
                    layout_map=layout,
                    batch_dim_name="batch",
                    auto_shard_dataset=False,
                )
            )
        found.append(tables(language_model(variant="qk_norm_cap"), tokens()))
    (layout, one), (other, four) = found
    assert layout == other
    np.testing.assert_allclose(one.tensors, four.tensors, rtol=1e-4, atol=1e-6)
    # Adam divides noise by noise where gradients vanish in theory.
    gradient = list(VARIABLE_STATISTICS).index("gradient_rms")
    np.testing.assert_allclose(
        one.variables[:, gradient],
        four.variables[:, gradient],
        rtol=1e-3,
        atol=1e-7,
    )
    for a, b in zip(one.heads, four.heads):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_choosing_layers():
    lm = language_model()
    with ks.watch(lm, include="query$|fc2") as watch:
        assert watch.paths == [
            f"block_{i}/{name}"
            for i in range(2)
            for name in ("attention/query", "mlp/fc2")
        ]
    with ks.watch(lm, exclude="attention|mlp|embedding") as watch:
        assert watch.paths == ["block_0", "block_1"]
    # Any layer that is named, not only those with matrices.
    with ks.watch(lm, include="final_norm$") as watch:
        lm.train_on_batch(*tokens())
        assert watch.layouts[True].tensors == ["final_norm"]


def test_errors():
    model = dense("adam")
    with pytest.raises(ValueError, match="No layer is left.*'qurey'.*first"):
        ks.watch(model, include="qurey")
    with pytest.raises(ValueError, match="regular expression.*'\\('"):
        ks.watch(model, exclude="(")
    with pytest.raises(ValueError, match="keras.Model.*Dense"):
        ks.watch(keras.layers.Dense(3))
    inputs = keras.Input((5,))
    bare = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    with pytest.raises(ValueError, match="not compiled"):
        ks.watch(bare)
    assert "call" not in vars(model.layers[1])


def test_compiling_anew_goes_on_being_watched():
    model = dense("sgd")
    with ks.watch(model) as watch:
        model.train_on_batch(*pairs())
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.train_on_batch(*pairs())
        first, second = watch.read()
    assert np.isnan(first.variables[:, -1]).all()
    assert np.isfinite(second.variables[:, -1]).all()
    assert not set(vars(model.optimizer)) & {"apply", "stateless_apply"}


def test_watching_anew_ends_the_first():
    model = dense("sgd")
    first = ks.watch(model)
    second = ks.watch(model, include="last")
    model.train_on_batch(*pairs())
    assert not first.read()
    (sample,) = second.read()
    assert len(sample.tensors) == 1
    second.remove()
    assert "call" not in vars(model.layers[-1])


def test_an_error_in_the_step_ends_the_watch():
    def broken(x):
        raise RuntimeError("out of coffee")

    model = dense("sgd")
    watch = ks.watch(model)
    model.train_on_batch(*pairs())
    last, right = model.layers[-1], model.layers[-1].activation
    last.activation = broken
    with pytest.raises(RuntimeError, match="coffee"):
        model.train_on_batch(*pairs(5))
    assert "call" not in vars(last)
    last.activation = right
    model.train_on_batch(*pairs(5))
    assert len(watch.read()) == 1


@pytest.mark.skipif(BACKEND != "torch", reason="torch alone is asked by Python")
@pytest.mark.parametrize("guarded", [False, True])
def test_no_step_asks_the_device_for_a_number(guarded, monkeypatch):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from keras_stable.backend import torch_guard

    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                asked.append(function)
            return function(*args, **(kwargs or {}))

    # As on a GPU, which would stand still until the next step is launched.
    monkeypatch.setattr(torch_guard, "waits", lambda left_out: False)
    model, (x, y) = language_model(), tokens()
    batch = keras.tree.map_structure(torch.as_tensor, ({**x}, y))
    guard = ks.Guard() if guarded else None
    with ks.watch(model, guard=guard) as telemetry:
        model.make_train_function()
        for telemetry.full in (True, False):
            # The first counts the updates that were made.
            model.train_function([batch])
        for telemetry.full in (True, False):
            with Asked():
                model.train_function([batch])
        assert not asked
        assert len(telemetry.read()) == 4
    with Asked():
        ops.full((), ops.ones(()))
    assert asked, "what this counts is still how torch asks"


@pytest.mark.parametrize("clip", [None, 0.1, 1e3])
@pytest.mark.parametrize("steps", [None, 2])
def test_staleness_is_of_the_gradient_as_it_was_clipped(clip, steps):
    optimizer = ks.AdamW(
        1e-2, global_clipnorm=clip, gradient_accumulation_steps=steps
    )
    model, stale = dense(optimizer), VARIABLE_STATISTICS.index("staleness")
    with ks.watch(model) as telemetry:
        for _ in range(steps or 1):
            model.train_on_batch(*pairs())
        sample = telemetry.read()[-1]
    # The second moment, without its bias, is the square of the first gradient.
    np.testing.assert_allclose(sample.variables[:, stale], 1.0, rtol=1e-5)
