"""The next-token loss in chunks, against float64 and Keras's own."""

import keras
import numpy as np
import pytest
from reference import with_gradients

import keras_stable as ks
from keras_stable import losses

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)


def numpy(x):
    return keras.ops.convert_to_numpy(x)


def formula(h, w, target, weight, cap=None, z=0.0):
    """`(total, penalty, accuracy, dh, dw)` in float64."""
    h, w, weight = (x.astype("float64") for x in (h, w, weight))
    raw = h @ w
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    slope = 1.0 if cap is None else 1 - np.tanh(raw / cap) ** 2
    lse = np.log(np.exp(logits).sum(-1))
    onehot = np.eye(w.shape[1])[target]
    nll = lse - (logits * onehot).sum(-1)
    penalty = z * (weight * lse**2).mean()
    right = logits.argmax(-1) == target
    p = np.exp(logits - lse[..., None])
    d = (1 + 2 * z * lse)[..., None] * p - onehot
    d = d * slope * weight[..., None] / target.size
    return (
        (weight * nll).mean() + penalty,
        penalty,
        (weight * right).sum() / weight.sum(),
        d @ w.T,
        np.einsum("btd,btv->dv", h, d),
    )


@pytest.mark.parametrize("chunk", [2**28, 100])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("shape", [(2, 7, 4, 11), (3, 1, 5, 2), (1, 13, 3, 30)])
def test_loss_and_gradients_are_the_formula(shape, cap, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    B, T, D, V = shape
    h = RNG.normal(size=(B, T, D)).astype("float32")
    w = RNG.normal(size=(D, V)).astype("float32")
    target = RNG.integers(0, V, (B, T))
    weight = RNG.integers(0, 3, (B, T)) * RNG.random((B, T))
    weight[0, 0] = 1.0
    how = {"output_cap": cap, "z_weight": 0.1}
    expected = formula(h, w, target, weight, cap, 0.1)
    found = losses.next_token_loss(h, w, target, weight, **how)
    np.testing.assert_allclose(
        [float(x) for x in found], expected[:3], rtol=1e-5, atol=1e-6
    )
    # With an upstream gradient that is not 1.
    value, gradients = with_gradients(
        lambda h, w: (
            3.0
            * losses.next_token_loss(
                h, w, target, weight, training=True, **how
            )[0]
        ),
        h,
        w,
    )
    assert value == pytest.approx(3 * expected[0], rel=1e-5)
    for a, b in zip(gradients, expected[3:]):
        np.testing.assert_allclose(numpy(a), 3 * b, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="devices share batches on jax")
def test_chunks_are_as_large_on_each_of_many_devices():
    whole = losses._chunks(64, 2048, 256_000)
    alone = losses._chunks(16, 2048, 256_000)
    assert alone[0] < whole[0]
    four = keras.distribution.list_devices()[:4]
    ks.set_distribution("data", batch_size=64, devices=four)
    assert losses._chunks(64, 2048, 256_000) == alone
    ks.set_distribution("tensor", 64, tensor_parallel=4, devices=four)
    assert losses._chunks(64, 2048, 256_000) == whole


def test_logits_of_any_size_are_stable():
    h, w = np.full((1, 2, 1), 1e4, "float32"), np.array([[1.0, -1, 0.5]], "f")
    total, _, accuracy = losses.next_token_loss(h, w, np.array([[0, 0]]))
    assert float(total) == 0 and float(accuracy) == 1


def test_a_target_outside_of_the_vocabulary_is_nan():
    h, w = np.ones((1, 2, 3), "float32"), np.ones((3, 5), "float32")
    for bad in (5, -1):
        found = losses.next_token_loss(h, w, np.array([[0, bad]]))[0]
        assert np.isnan(float(found))


def test_sixteen_bits_are_rounded_once_in_the_gradient(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 500)
    h = RNG.normal(size=(2, 16, 8)).astype("float32")
    w = RNG.normal(size=(8, 32)).astype("float32")
    target, ones = RNG.integers(0, 32, (2, 16)), np.ones((2, 16))
    for dtype, relative in (("bfloat16", 2**-8), ("float16", 2**-10)):
        low = [keras.ops.cast(x, dtype) for x in (h, w)]
        exact = [numpy(keras.ops.cast(x, "float32")) for x in low]
        total, _, _, dh, dw = formula(*exact, target, ones)
        value, gradients = with_gradients(
            lambda h, w: losses.next_token_loss(
                *(keras.ops.cast(x, dtype) for x in (h, w)),
                target,
                training=True,
            )[0],
            *exact,
        )
        # The sums are of float32: no digit of the loss is lost.
        assert value == pytest.approx(total, rel=1e-5)
        for a, b in zip(gradients, (dh, dw)):
            error = np.abs(numpy(a) - b).max() / np.abs(b).max()
            assert error < 2 * relative


def small(variant, metrics=None, seed=0, **kwargs):
    keras.utils.set_random_seed(seed)
    backbone = ks.StableBackbone(31, 2, 2, 16, variant=variant, **kwargs)
    lm = ks.StableCausalLM(backbone)
    lm.compile(keras.optimizers.SGD(0.5), metrics=metrics)
    return lm


def data(rows=4, length=9):
    ids = RNG.integers(0, 31, (rows, length + 1)).astype("int32")
    weight = RNG.integers(0, 2, (rows, length)).astype("float32")
    weight[:, 0] = 1
    return {"token_ids": ids[:, :-1]}, ids[:, 1:], weight


# Tied and capped; untied with z-loss; a penalty of the layers.
VARIANTS = [
    ks.get_variant("gemma2"),
    ks.get_variant("qk_norm").replace(z_loss=0.01),
    ks.get_variant("entropy_floor"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_equals_the_one_with_all_logits(variant, weighted, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 200)
    x, y, weight = data()
    weight = weight if weighted else None
    # A metric of ours is what asks for logits.
    chunked, whole = (
        small(variant),
        small(variant, ["sparse_categorical_accuracy"]),
    )
    assert chunked._chunked and not whole._chunked
    assert chunked.predict(x, verbose=0).shape == (4, 9, 31)
    for call in ("evaluate", "fit", "evaluate"):
        a, b = (
            getattr(lm, call)(
                x, y, sample_weight=weight, batch_size=2, verbose=0
            )
            for lm in (chunked, whole)
        )
        if call == "fit":
            a, b = a.history, b.history
            assert set(a) == set(b)
            a, b = (
                [h[k][-1] for k in sorted(h) if "acc" not in k] for h in (a, b)
            )
        else:
            a, b = a[:2], b[:2]
        np.testing.assert_allclose(a, b, rtol=1e-4)
    for a, b in zip(chunked.weights, whole.weights):
        np.testing.assert_allclose(numpy(a), numpy(b), atol=2e-5)


def test_accuracy_is_kerass(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 200)
    x, y, weight = data(rows=5)
    lm = small("baseline")
    for w in (None, weight):
        # The last batch is smaller.
        found = lm.evaluate(
            x, y, sample_weight=w, batch_size=2, verbose=0, return_dict=True
        )
        metric = keras.metrics.SparseCategoricalAccuracy()
        metric.update_state(y, lm.predict(x, verbose=0), sample_weight=w)
        name = "sparse_categorical_accuracy"
        assert found[name] == pytest.approx(float(metric.result()), rel=1e-5)


def largest_of_a_step(lm, x, y, training):
    """Entries of the largest tensor that a step makes."""
    found = []
    if BACKEND == "torch":
        from torch.utils._python_dispatch import TorchDispatchMode

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                for tensor in keras.tree.flatten(result):
                    # Tensors of shapes alone take no memory.
                    if hasattr(tensor, "numel") and not tensor.is_meta:
                        found.append(tensor.numel())
                return result

        run = lm.fit if training else lm.evaluate
        with Sizes():
            run(x, y, batch_size=len(y), verbose=0)
    elif BACKEND == "jax":
        import jax

        lm.fit(x, y, batch_size=len(y), verbose=0)
        state = [
            [v.value for v in variables]
            for variables in (
                lm.trainable_variables,
                lm.non_trainable_variables,
                lm.optimizer.variables,
                lm.metrics_variables,
            )
        ]
        step = lm.train_step if training else lm.test_step
        state = state if training else [*state[:2], state[3]]
        program = jax.make_jaxpr(step)(state, (x, y))

        def look(jaxpr):
            for equation in jaxpr.eqns:
                found.extend(v.aval.size for v in equation.outvars)
                for part in jax.tree.leaves(
                    list(equation.params.values()),
                    is_leaf=lambda p: hasattr(p, "eqns"),
                ):
                    part = getattr(part, "jaxpr", part)
                    if hasattr(part, "eqns"):
                        look(part)

        look(program.jaxpr)
    else:
        import tensorflow as tf

        lm.optimizer.build(lm.trainable_variables)
        step = lm.train_step if training else lm.test_step
        graph = (
            tf.function(step)
            .get_concrete_function(
                keras.tree.map_structure(tf.constant, (x, y))
            )
            .graph
        )
        graphs = [graph]
        graphs += [f.graph for f in graph._functions.values()]
        found.extend(
            t.shape.num_elements() or 0
            for g in graphs
            for operation in g.get_operations()
            for t in operation.outputs
            if t.shape.rank is not None
        )
    return max(found)


@pytest.mark.parametrize("training", [True, False])
def test_no_step_makes_all_logits(training, monkeypatch):
    V, rows, length = 4999, 4, 64
    monkeypatch.setattr(losses, "CHUNK", rows * length * V // 8)
    keras.utils.set_random_seed(0)
    lm = ks.StableCausalLM(ks.StableBackbone(V, 1, 2, 8))
    x = {"token_ids": RNG.integers(0, V, (rows, length)).astype("int32")}
    y = RNG.integers(0, V, (rows, length)).astype("int32")
    lm.compile(keras.optimizers.SGD(0.1))
    assert largest_of_a_step(lm, x, y, training) < rows * length * V / 7
    # The measurement sees them where they are.
    lm.compile(keras.optimizers.SGD(0.1), metrics=["accuracy"])
    assert largest_of_a_step(lm, x, y, training) >= rows * length * V


def test_a_saved_model_keeps_its_loss(tmp_path):
    x, y, _ = data()
    lm = small("baseline")
    lm.fit(x, y, verbose=0)
    lm.save(tmp_path / "lm.keras")
    again = keras.saving.load_model(tmp_path / "lm.keras")
    assert again._chunked
    found = again.evaluate(x, y, verbose=0, return_dict=True)
    expected = lm.evaluate(x, y, verbose=0, return_dict=True)
    assert set(found) == set(expected)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_other_losses_and_metrics_get_logits():
    x, y, _ = data()
    seen = []

    def watching(y_true, y_pred):
        seen.append(y_pred.shape[-1])
        return keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=True
        )

    lm = small("baseline")
    lm.compile("sgd", loss=watching)
    lm.fit(x, y, verbose=0)
    lm.compile("sgd", weighted_metrics=[watching])
    lm.fit(x, y, verbose=0)
    assert set(seen) == {31}


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_a_quantized_head_is_used_as_it_is():
    x, y, _ = data()
    lm = small("baseline")
    lm.fit(x, y, verbose=0)
    lm.quantize("int8")
    logits = lm.predict(x, verbose=0)
    expected = keras.losses.sparse_categorical_crossentropy(
        y, logits, from_logits=True
    )
    found = lm.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert found == pytest.approx(numpy(expected).mean(), rel=1e-4)
