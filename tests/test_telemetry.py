"""Statistics against float64 numpy, for every layer of every variant."""

import keras
import numpy as np
import pytest
from keras import ops
from keras_hub import models as hub

import keras_stable as ks
from keras_stable import VARIANTS
from keras_stable import logits
from keras_stable import telemetry
from keras_stable.mlp import ACTIVATIONS
from keras_stable.telemetry import STATISTICS

# A backbone's loss here does not use its untied head.
pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist")
VOCABULARY = 31


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def formula(x):
    """`STATISTICS` of an activation, written again in float64."""
    x = x.reshape(-1, x.shape[-1]).astype("float64")
    bad = ~np.isfinite(x)
    x = np.where(bad, 0, x)
    first = x[:1024]
    centred = first - first.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1)
    with np.errstate(invalid="ignore"):
        kurtosis = (centred**4).mean(-1) / variance**2
    return np.array(
        [
            np.sqrt((x**2).sum(-1)).mean(),
            np.sqrt((x**2).mean()),
            np.abs(x).max(),
            x.mean(),
            np.nan_to_num(kurtosis).mean(),
            bad.sum(),
        ]
    )


def head_formula(z, visible, cap=None):
    """`HEAD_STATISTICS` of (B, N, T, S) logits, in float64."""
    z = z.astype("float64")
    visible = np.broadcast_to(visible, z.shape)
    largest = np.where(visible, z, -np.inf).max((0, 2, 3))
    capped = largest
    if cap is not None:
        z, capped = (cap * np.tanh(x / cap) for x in (z, largest))
    z = np.where(visible, z, -np.inf)
    with np.errstate(all="ignore"):
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        entropy = -np.nan_to_num(p * np.log(p)).sum(-1)
        keys = visible.sum(-1)
        share = np.where(keys > 1, entropy / np.log(keys), np.nan)
    return np.stack([largest, capped, np.nanmean(share, axis=(0, 2))])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(4, 9, 33), (2000, 7), (2, 5, 6, 8), (3,)])
def test_measure_is_its_formula(dtype, shape):
    rng = np.random.default_rng(0)
    x = 3 + 50 * rng.standard_t(3, shape)
    x = ops.cast(ops.convert_to_tensor(x.astype("float32")), dtype)
    seen = numpy(ops.cast(x, "float32"))
    found = numpy(telemetry.measure(x))
    np.testing.assert_allclose(found, formula(seen), rtol=2e-5, atol=1e-4)


def test_bad_entries_are_counted_and_left_out():
    x = np.random.default_rng(0).normal(size=(6, 10)).astype("float32")
    x[1, 2], x[1, 3], x[4, 0] = np.nan, np.inf, -np.inf
    found = numpy(telemetry.measure(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(found, formula(x), rtol=1e-5)
    assert found[-1] == 3


@pytest.mark.parametrize("value", [0.0, 5.0, -1e15])
def test_constant_activations(value):
    x = ops.full((4, 8), value)
    found = dict(zip(STATISTICS, numpy(telemetry.measure(x))))
    assert found["kurtosis"] == pytest.approx(0, abs=1e-6)
    assert found["rms"] == pytest.approx(abs(value))


def test_large_outliers_do_not_overflow_kurtosis():
    x = np.zeros((2, 100), "float32")
    x[:, 7] = 1e12
    found = dict(zip(STATISTICS, numpy(telemetry.measure(ops.array(x)))))
    expected = dict(zip(STATISTICS, formula(x)))
    assert found["kurtosis"] == pytest.approx(expected["kurtosis"], rel=1e-4)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("capped", [False, True])
def test_logit_statistics_are_their_formula(cap, capped):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(2, 3, 2, 5, 5)).astype("float32") * 2
    visible = rng.random((2, 1, 1, 5, 5)) > 0.2
    visible &= np.tril(np.ones((5, 5), bool))
    visible |= np.eye(5, dtype=bool)
    expected = head_formula(
        z.reshape(2, 6, 5, 5), visible.reshape(2, 1, 5, 5), cap
    )
    seen = z if cap is None or not capped else cap * np.tanh(z / cap)
    found = logits.logit_statistics(
        ops.array(seen), ops.array(visible), cap, capped
    )
    np.testing.assert_allclose(numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_entropy_of_known_attention():
    # Uniform attention has entropy 1, a single visible key none at all.
    uniform = logits.logit_statistics(ops.zeros((1, 1, 4, 4)), None)
    assert float(uniform[2, 0]) == pytest.approx(1)
    only = np.eye(4, dtype=bool)[None, None]
    one = logits.logit_statistics(ops.zeros((1, 1, 4, 4)), ops.array(only))
    assert float(one[2, 0]) == 0


@pytest.mark.parametrize(
    "batch, length, exact", [(2, 8, True), (9, 300, False)]
)
def test_the_sample_of_queries_is_labelled(batch, length, exact):
    rng = np.random.default_rng(0)
    q, k = (
        rng.normal(size=(batch, length, n, 4)).astype("float32")
        for n in (4, 2)
    )
    value, note = logits.of_kernel(
        True, ops.array(q), ops.array(k), None, 0.5, True, None
    )
    z = 0.5 * np.einsum("btnh,bsnh->bnts", q, k.repeat(2, 2))
    visible = np.tril(np.ones((length, length), bool))
    if exact:
        assert note == "exact"
        rows, at = slice(None), slice(None)
    else:
        assert note == "64 queries of 4 sequences"
        rows, at = slice(0, 4), slice(length - 1 - 63 * 4, None, 4)
        assert len(range(*at.indices(length))) == 64
    expected = head_formula(z[rows][:, :, at], visible[at])
    np.testing.assert_allclose(numpy(value), expected, rtol=1e-4, atol=1e-5)


def test_every_step_looks_at_late_tokens():
    x = np.arange(40 * 20 * 2, dtype="float32").reshape(40, 20, 2)
    found = numpy(telemetry.sample_tokens(ops.array(x)))
    # 128 of 800 tokens: the last 3 positions of each sequence.
    assert found.tolist() == x[:, -3:].ravel().tolist()
    assert telemetry.sample_tokens(ops.array(x[:4])).shape == (160,)


# Models whose activations are computed again by other means.


def record(model, inputs):
    """What `watch` measures in one training step, by name."""
    model.compile(keras.optimizers.SGD(0.0), loss="mse", jit_compile=JIT)
    outputs = model(inputs, training=False)
    with ks.watch(model) as watch:
        model.train_on_batch(inputs, np.zeros(outputs.shape))
    (sample,) = watch.read()
    layout = watch.layouts[True]
    return (
        dict(zip(layout.tensors, sample.tensors)),
        dict(zip(layout.heads, sample.heads)),
        layout,
    )


JIT = "auto"


def activations(model, inputs, names):
    """Outputs of layers by path, taken in an eager forward pass."""
    found, undo = {}, []

    def visit(layer):
        for child in layer._flatten_layers(include_self=False):
            if getattr(child, "path", None) in names:
                keep(child)

    def keep(layer):
        original = layer.call

        def call(*args, **kwargs):
            y = original(*args, **kwargs)
            head = "/head" if kwargs.get("reverse") else ""
            found[layer.path + head] = numpy(y)
            return y

        vars(layer)["call"] = call
        undo.append(layer)

    visit(model)
    model(inputs, training=False)
    for layer in undo:
        vars(layer).pop("call", None)
    return found


def check(model, inputs, least):
    tensors, heads, layout = record(model, inputs)
    plain = {name.removesuffix("/head") for name in tensors}
    expected = activations(model, inputs, plain)
    assert set(tensors) <= set(expected) and len(tensors) >= least
    for name, found in tensors.items():
        np.testing.assert_allclose(
            found,
            formula(expected[name]),
            rtol=2e-4,
            atol=1e-5 * np.abs(expected[name]).max(),
            err_msg=name,
        )
    return tensors, heads, layout


def set_large(model):
    rng = np.random.default_rng(0)
    for w in model.weights:
        if len(w.shape) >= 2 and not w.path.endswith("/u"):
            size = 1 / np.prod(w.shape[:-1]) ** 0.5
            w.assign((size * rng.normal(size=w.shape)).astype("float32"))


def text(batch=2, length=7):
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (batch, length))
    mask = np.ones((batch, length), "int32")
    return {"token_ids": ids.astype("int32"), "padding_mask": mask}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_of_every_variant(name):
    backbone = ks.StableBackbone(VOCABULARY, 2, 2, 16, variant=name)
    set_large(backbone)
    # Not sigma-Reparam's training step, which moves u: see below.
    inputs = text()
    if name == "sigma_reparam":
        for _ in range(60):
            for layer in backbone.transformer_layers:
                layer.next_state(training=True)
    tensors, heads, layout = check(backbone, inputs, 15)
    assert list(heads) == ["block_0/attention", "block_1/attention"]
    assert set(layout.labels.values()) == {"exact"}
    assert not layout.unreachable
    parts = ("attention/query", "attention/key", "attention/value")
    parts += ("attention/output", "mlp/fc1")
    variant = ks.get_variant(name)
    if ACTIVATIONS[variant.architecture.activation][1]:
        parts += ("mlp/gate",)
    parts += ("mlp/fc2",)
    order = ["token_embedding"]
    if variant.architecture.position == "learned":
        order += ["position_embedding"]
    for block in ("block_0", "block_1"):
        order += [f"{block}/{part}" for part in parts] + [block]
    assert list(tensors) == order
    z, cap = logits_of(backbone, tensors, inputs, variant)
    expected = head_formula(z, np.tril(np.ones((7, 7), bool)), cap)
    np.testing.assert_allclose(
        heads["block_0/attention"], expected, rtol=1e-3, atol=1e-4
    )


def logits_of(backbone, tensors, inputs, variant):
    """Logits of the first block from the outputs of its projections."""
    names = {"block_0/attention/query", "block_0/attention/key"}
    found = activations(backbone, inputs, names)
    attention = backbone.transformer_layers[0].attention
    rotary = variant.architecture.position == "rope"
    q, k = (
        numpy(
            attention._heads(
                ops.array(found[f"block_0/attention/{n}"].astype("float32")),
                getattr(attention, f"{n}_norm"),
                rotary,
            )
        )
        for n in ("query", "key")
    )
    scale = variant.softmax.temperature * q.shape[-1] ** -0.5
    return scale * np.einsum("btnh,bsnh->bnts", q, k), variant.softmax.cap


def test_kerashubs_gpt2():
    backbone = hub.GPT2Backbone(
        VOCABULARY, 2, 2, 16, 32, dropout=0.0, max_sequence_length=7
    )
    set_large(backbone)
    inputs = text()
    tensors, heads, layout = check(backbone, inputs, 16)
    assert len(heads) == 2 and all(h.shape == (3, 2) for h in heads.values())
    assert all("self_attention" in name for name in heads)
    assert set(layout.labels.values()) == {"exact"}


@pytest.mark.parametrize("cap", [None, 3.0])
def test_kerashubs_gemma3(cap):
    backbone = hub.Gemma3Backbone(
        VOCABULARY,
        image_size=16,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
        head_dim=8,
        use_query_key_norm=True,
        attention_logit_soft_cap=cap,
        use_sliding_window_attention=True,
        sliding_window_size=4,
        vision_encoder=None,
    )
    set_large(backbone)
    inputs = text()
    _, heads, layout = check(backbone, inputs, 15)
    assert len(heads) == 2
    for found in heads.values():
        raw, capped, entropy = found
        ratio = capped if cap is None else cap * np.tanh(raw / cap)
        np.testing.assert_allclose(capped, ratio, rtol=1e-4)
        assert (0 < entropy).all() and (entropy < 1).all()


def test_a_residual_network():
    x = inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", name="stem")(x)
    for i in range(2):
        y = keras.layers.BatchNormalization(name=f"norm_{i}")(x)
        y = keras.layers.ReLU()(y)
        y = keras.layers.Conv2D(8, 3, padding="same", name=f"conv_{i}")(y)
        x = keras.layers.Add(name=f"add_{i}")([x, y])
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="head")(x))
    # Batch statistics are another function in training.
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
    tensors, heads, _ = check(model, images.astype("float32"), 6)
    names = ["stem", "conv_0", "add_0", "conv_1", "add_1", "head"]
    assert list(tensors) == names
    assert not heads


def test_resnet_of_kerashub():
    backbone = hub.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 16],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    check(backbone, images.astype("float32"), 7)


def test_eager_equals_jitted(monkeypatch):
    found = []
    for jit in (True, False):
        if jit and keras.backend.backend() == "torch":
            jit = False
        monkeypatch.setitem(globals(), "JIT", jit)
        keras.utils.set_random_seed(0)
        backbone = ks.StableBackbone(VOCABULARY, 1, 2, 16, variant="qk_norm")
        set_large(backbone)
        tensors, heads, _ = record(backbone, text())
        found.append(np.concatenate([np.ravel(v) for v in tensors.values()]))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
