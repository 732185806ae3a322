"""`attend` against the formula in float64, over what it can be asked."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_stable as ks
from keras_stable.attend import attend
from keras_stable.attend import soft_cap
from keras_stable.telemetry import Recorder
from keras_stable.telemetry import recording

B, T, N, H = 2, 6, 4, 8


def heads(key_heads=N, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    return [
        (size * rng.normal(size=(B, T, n, H))).astype("float32")
        for n in (N, key_heads, key_heads)
    ]


def formula(q, k, v, softmax, segments=None, window=None, scale=0.3):
    q, k, v = (x.astype("float64") for x in (q, k, v))
    k, v = (np.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    raw = softmax.temperature * scale * np.einsum("btnh,bsnh->bnts", q, k)
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    mask = np.broadcast_to((s <= t)[None], (B, T, T))
    if window:
        mask = mask & (t - s < window)
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None])
    mask = mask[:, None]
    z = raw if softmax.cap is None else softmax.cap * np.tanh(raw / softmax.cap)
    z = np.where(mask, z, -np.inf)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if softmax.clip:
        gamma = softmax.clip.gamma
        p = np.clip((softmax.clip.zeta - gamma) * p + gamma, 0, 1)
    y = np.einsum("bnts,bsnh->btnh", p, v)
    largest = np.where(mask, raw, -np.inf).max((0, 2, 3))
    return y, largest


SOFTMAXES = {
    "plain": ks.Softmax(),
    "temperature": ks.Softmax(temperature=0.5),
    "cap": ks.Softmax(cap=2.0),
    "clip": ks.Softmax(clip=ks.Clip(zeta=1.03, gamma=-0.03)),
    "all": ks.Softmax(temperature=0.7, cap=3.0, clip=ks.Clip(gamma=-0.1)),
}
SEGMENTS = np.array([[1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3]])


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("key_heads", [N, 2, 1])
def test_is_its_formula(softmax, segments, window, key_heads):
    arrays = heads(key_heads, size=2.0)
    arguments = {
        "scale": 0.3,
        "softmax": softmax,
        "segment_ids": segments,
        "sliding_window": window,
    }
    y, largest = formula(*arrays, softmax, segments, window)
    # The fused path if it can; measured or not, it is the same one.
    with recording(Recorder(full=True)) as recorder:
        measured = attend(*arrays, **arguments)
    for found in (measured, attend(*arrays, **arguments)):
        assert np.abs(ops.convert_to_numpy(found) - y).max() < 1e-5
    (record,) = recorder.heads
    assert record.note == "exact"
    found = ops.convert_to_numpy(record.value)[0]
    assert np.abs(found - largest).max() < 1e-5


def test_cap_is_tanh_and_not_the_formula_of_kerass_documentation():
    x = np.linspace(-400, 400, 81).astype("float32")
    found = ops.convert_to_numpy(soft_cap(x, 50.0))
    expected = [50 * math.tanh(v / 50) for v in x.tolist()]
    assert np.abs(found - expected).max() < 1e-4
    other = x / (1 + np.abs(x) / 50)
    assert np.abs(found - other).max() > 10


def test_kerass_own_cap_argument_is_a_trap():
    q, k, v = heads()
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        ops.dot_product_attention(q, k, v, attn_logits_soft_cap=2.0)


def test_dropout_keeps_the_mean():
    q, k, v = heads()
    v = np.ones_like(v)
    seeds = [np.array([0, i], "uint32") for i in range(200)]
    kwargs = {"scale": 0.3, "dropout_rate": 0.5}
    rows = [
        ops.convert_to_numpy(attend(q, k, v, seed=ops.array(s), **kwargs))
        for s in seeds
    ]
    # Rows of p sum to one: y is one on average, and varies.
    assert abs(np.mean(rows) - 1) < 0.02
    assert np.std(rows) > 0.1


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_heads": 4, "num_key_value_heads": 3}, "multiple of"),
        ({"num_heads": 4, "dropout": 1.0}, "1.0"),
        ({"num_heads": 5}, "multiple of `num_heads`"),
        ({"num_heads": 4, "head_dim": 5}, "head_dim=5"),
        ({"num_heads": 4, "variant": "qk_nrom"}, "qk_norm"),
    ],
)
def test_bad_use_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ks.CausalSelfAttention(**kwargs).build((None, None, 32))


def test_full_width_norm_differs_from_per_head():
    x = keras.random.normal((1, 3, 16))
    outputs = []
    for scope in ("head", "full"):
        variant = ks.get_variant("qk_norm").replace(
            qkv_norm=ks.QKVNorm(qk="rms", scope=scope)
        )
        keras.utils.set_random_seed(0)
        layer = ks.CausalSelfAttention(2, variant=variant)
        layer.build(x.shape)
        width = {"head": 8, "full": 16}[scope]
        assert layer.query_norm.scale.shape == (width,)
        layer.query.kernel.assign(np.eye(16) * np.repeat([1, 9], 8))
        outputs.append(ops.convert_to_numpy(layer(x)))
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-5
