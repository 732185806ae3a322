"""The kernels of GPUs, run without one, against the formula in float64."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

import keras_stable as ks
from keras_stable.attend import attend
from keras_stable.choices import Clip
from keras_stable.choices import Softmax

if keras.backend.backend() != "jax":
    pytest.skip("Pallas is a part of jax", allow_module_level=True)

import jax  # noqa: E402
from jax import numpy as jnp  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402

from keras_stable.backend import jax_attention_tiles as tiles  # noqa: E402
from keras_stable.backend.jax_attention import HEAD_SIZES  # noqa: E402
from keras_stable.backend.jax_attention import attend_fused  # noqa: E402

PASSES = ("forward", "dq", "dkv")
# Unlike one another, and several of them in a short sequence.
SMALL = {
    "forward": tiles.Blocks(32, 16),
    "dq": tiles.Blocks(16, 32),
    "dkv": tiles.Blocks(32, 16),
}


def tensors(B, T, N, K, H, dtype="float32", size=2.0, seed=0):
    """Queries, keys, values and a gradient of outputs; documents."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, n, H) for n in (N, K, K, N)]
    arrays = [rng.normal(size=shape) for shape in shapes]
    arrays = [size * arrays[0], size * arrays[1], *arrays[2:]]
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    return arrays, np.sort(rng.integers(0, 4, (B, T)), axis=1)


def formula(q, k, v, dy, scale, cap, clip, ids, window):
    """Outputs, maxima, entropies and gradients, in float64."""
    q, k, v, dy = (np.asarray(x, "float64") for x in (q, k, v, dy))
    B, T, N, H = q.shape
    K = k.shape[2]
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    raw = scale * np.einsum("btnh,bsnh->bnts", q, k)
    tanh = np.zeros_like(raw) if cap is None else np.tanh(raw / cap)
    z = raw if cap is None else cap * tanh
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    mask = (s <= t) & (t - s < (window or T))
    mask = np.broadcast_to(mask, (B, 1, T, T))
    if ids is not None:
        mask = mask & (ids[:, None, :, None] == ids[:, None, None])
    z = np.where(mask, z, -np.inf)
    z = z - z.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    log_p = np.log(p, out=np.zeros_like(p), where=p > 0)
    gamma, zeta = clip or (0.0, 1.0)
    a = (zeta - gamma) * p + gamma
    c = np.clip(a, 0, 1)
    y = np.einsum("bnts,bsnh->btnh", c, v)
    dp = (zeta - gamma) * np.einsum("btnh,bsnh->bnts", dy, v)
    if clip is not None:
        dp = dp * ((a > 0) & (a < 1))
    dz = p * (dp - (p * dp).sum(-1, keepdims=True))
    draw = scale * dz * (1 - tanh**2)
    dq = np.einsum("bnts,bsnh->btnh", draw, k)
    dk = np.einsum("bnts,btnh->bsnh", draw, q)
    dv = np.einsum("bnts,btnh->bsnh", c, dy)
    dk, dv = (x.reshape(B, T, K, N // K, H).sum(3) for x in (dk, dv))
    largest = np.where(mask, raw, -np.inf).max(-1)
    return y, largest, -(p * log_p).sum(-1), dq, dk, dv


def kernels(arrays, *how, blocks=SMALL):
    """The same of the kernels."""
    *qkv, dy = arrays

    def run(*qkv):
        return attend_fused(
            *qkv, *how, statistics=True, blocks=blocks, interpret=True
        )

    @jax.jit
    def way(*qkv):
        (y, rows), back = jax.vjp(run, *qkv)
        zeros = jax.tree.map(jnp.zeros_like, rows)
        return y, *rows, *back((dy, zeros))

    found = way(*qkv)
    assert found[0].dtype == qkv[0].dtype
    assert found[1].dtype == found[2].dtype == "float32"
    return [np.asarray(x, "float32") for x in found]


def compare(arrays, *how, rtol=1e-5, atol=1e-5, **kwargs):
    found = kernels(arrays, *how, **kwargs)
    for a, b in zip(found, formula(*arrays, *how)):
        np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max() + atol)


CLIP = (-0.03, 1.03)
CASES = {
    # B, T, N, K, H; cap, clip, documents, window.
    "plain": (2, 80, 2, 2, 16, None, None, False, None),
    "cap": (1, 77, 2, 2, 32, 3.0, None, False, None),
    "clip": (1, 64, 2, 2, 16, None, CLIP, False, None),
    "window": (1, 90, 1, 1, 16, None, None, False, 20),
    "narrow": (1, 70, 1, 1, 16, 4.0, CLIP, False, 1),
    "groups": (2, 40, 6, 2, 16, None, None, False, None),
    "documents": (2, 65, 2, 1, 16, None, None, True, None),
    "all": (1, 100, 4, 2, 16, 2.0, (-0.01, 1.1), True, 33),
    "one": (2, 1, 2, 1, 64, 5.0, None, True, None),
    "large head": (1, 34, 2, 1, 128, 5.0, CLIP, False, None),
    "odd head": (1, 50, 4, 2, 24, 2.0, CLIP, True, 20),
    "small head": (2, 30, 2, 1, 3, 2.0, None, False, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_are_the_formula(case):
    *shape, cap, clip, documents, window = case
    arrays, ids = tensors(*shape)
    ids = ids if documents else None
    compare(arrays, 0.3, cap, clip, ids, window)


@given(
    st.tuples(*(st.integers(1, n) for n in (2, 70, 2, 2))),
    st.sampled_from([None, 0.5, 30.0]),
    st.sampled_from([None, CLIP, (0.0, 1.5), (-0.2, 1.0)]),
    st.booleans(),
    st.sampled_from([None, 2, 15, 16, 17, 48, 100]),
    st.tuples(*[st.sampled_from([16, 32, 64])] * 6),
)
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
)
def test_kernels_are_the_formula_whatever_is_asked(
    shape, cap, clip, documents, window, sizes
):
    B, T, K, G = shape
    arrays, ids = tensors(B, T, K * G, K, 16)
    pairs = zip(sizes[::2], sizes[1::2])
    blocks = {name: tiles.Blocks(*pair) for name, pair in zip(PASSES, pairs)}
    ids = ids if documents else None
    compare(arrays, 0.25, cap, clip, ids, window, blocks=blocks)


@pytest.mark.parametrize("clip", [(0.0, 1.0), (-0.03, 1.0), (-0.03, 0.9)])
def test_a_clip_without_an_upper_bound(clip):
    """Where a query has one key p is 1, but for its rounding."""
    arrays, _ = tensors(1, 60, 2, 1, 16)
    ids = np.random.default_rng(0).integers(0, 12, (1, 60))
    compare(arrays, 0.9, None, clip, ids, None, rtol=1e-4)


@pytest.mark.parametrize("cap", [None, 50.0, 1e3])
def test_large_logits_are_exact(cap):
    """Of 1e4: a rounding of the logit is one of 1e-3 in the exponent."""
    arrays, _ = tensors(1, 50, 2, 1, 16, size=16.0)
    _, largest, *_ = formula(*arrays, 8.0, cap, None, None, None)
    assert largest.max() > 1e4
    # Gradients of 0 are differences of 1e2, times keys and the scale.
    compare(arrays, 8.0, cap, None, None, None, rtol=2e-3, atol=1e-3)


def test_negative_scales_are_the_formula():
    arrays, _ = tensors(1, 40, 2, 1, 16)
    compare(arrays, -0.3, 3.0, None, None, None)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_rounds_no_more_than_the_explicit_path(cap, clip):
    arrays, _ = tensors(1, 96, 2, 2, 64, "bfloat16")
    *qkv, dy = arrays
    how = (0.125, cap, clip, None, None)
    found = kernels(arrays, *how)
    gamma, zeta = clip or (0.0, 1.0)
    softmax = Softmax(cap=cap, clip=Clip(zeta=zeta, gamma=gamma))

    @jax.jit
    def explicit(*qkv):
        y, back = jax.vjp(
            lambda *qkv: attend(*qkv, scale=0.125, softmax=softmax), *qkv
        )
        return y, *back(dy)

    expected = formula(*arrays, *how)
    expected = [expected[0], *expected[3:]]
    for a, b, c in zip(expected, [found[0], *found[3:]], explicit(*qkv)):
        allowed = 2 * np.abs(np.asarray(c, "float64") - a)
        assert ((b - a) ** 2).mean() <= (allowed**2).mean()
        # The worst is luck: a rounding of the largest is no fault.
        worst = max(allowed.max(), 2.0**-7 * np.abs(a).max())
        assert np.abs(b - a).max() <= worst


def test_statistics_have_no_gradient_and_can_be_left_out():
    arrays, _ = tensors(1, 20, 2, 1, 16)
    *qkv, _ = arrays

    def measured(*qkv):
        y, rows = attend_fused(*qkv, 0.3, statistics=True, interpret=True)
        return sum(x.sum() for x in rows), y

    way = jax.value_and_grad(measured, (0, 1, 2), has_aux=True)
    (_, y), gradients = jax.jit(way)(*qkv)
    assert all((x == 0).all() for x in gradients)
    plain, rows = attend_fused(*qkv, 0.3, interpret=True)
    assert rows is None
    np.testing.assert_array_equal(y, plain)


def test_is_the_same_again_when_rematerialized():
    arrays, ids = tensors(1, 40, 2, 1, 16)
    *qkv, dy = arrays

    def total(*qkv):
        y, _ = attend_fused(
            *qkv, 0.3, 2.0, CLIP, jnp.asarray(ids), interpret=True
        )
        return (y * dy).sum()

    plain = jax.jit(jax.grad(total, (0, 1, 2)))(*qkv)
    again = jax.jit(jax.grad(jax.checkpoint(total), (0, 1, 2)))(*qkv)
    for a, b in zip(plain, again):
        np.testing.assert_array_equal(a, b)


def test_not_a_number_stays_visible():
    arrays, _ = tensors(1, 40, 1, 1, 16)
    q, k, v, _ = arrays
    k = k.at[0, 20].set(np.nan)
    y, rows = attend_fused(
        q, k, v, 0.3, statistics=True, interpret=True, blocks=SMALL
    )
    for x in (y[0, :, 0, 0], *(row[0, 0] for row in rows)):
        assert np.isfinite(x[:16]).all() and np.isnan(x[20:]).all()


def test_nothing_beyond_the_end_is_read_or_written():
    """What is there is poison, and stays."""
    x = jnp.where(jnp.arange(64)[:, None] < 37, 1.0, np.nan)
    x = jnp.broadcast_to(x, (64, 16))

    def kernel(x_ref, _, y_ref):
        for start in (0, 32):
            found = tiles.load(x_ref, start, 32, 37)
            tiles.store(y_ref, start, 32, 37, 2 * found + 1)

    y = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        input_output_aliases={1: 0},
        interpret=True,
    )(x, jnp.full(x.shape, 7.0))
    assert (y[:37] == 3).all() and (y[37:] == 7).all()

    def beyond(x_ref, y_ref):
        y_ref[...] = tiles.load(x_ref, 32, 32, 37)

    y = pl.pallas_call(
        beyond,
        out_shape=jax.ShapeDtypeStruct((32, 16), x.dtype),
        interpret=True,
    )(x)
    assert (y[:5] == 1).all() and (y[5:] == 0).all()


@pytest.mark.parametrize("length", [1, 16, 37, 64, 100])
@pytest.mark.parametrize("window", [None, 1, 16, 20, 64, 1000])
def test_visited_blocks_are_those_that_are_seen(length, window):
    for Q, S in itertools.product((16, 32), repeat=2):
        blocks = tiles.Blocks(Q, S)
        t = np.arange(-(-length // Q) * Q)[:, None]
        s = np.arange(-(-length // S) * S)[None]
        seen = (s <= t) & (t - s < (window or 10**6))
        inside = seen & (t < length) & (s < length)

        def parts(x):
            return x.reshape(len(t) // Q, Q, -1, S).transpose(0, 2, 1, 3)

        some = parts(inside).any((2, 3))
        # Rows beyond the end are computed, and left out when stored.
        every = parts(seen & (s < length)).all((2, 3))
        whole = parts(inside).all((2, 3))
        for i in range(some.shape[0]):
            bounds = tiles.key_phases(jnp.int32(i), blocks, length, window)
            first, full, masked, end = (int(x) for x in bounds)
            assert first <= full <= masked <= end <= some.shape[1]
            assert some[i].nonzero()[0].tolist() == list(range(first, end))
            assert every[i, full:masked].all()
        for j in range(some.shape[1]):
            bounds = tiles.query_phases(jnp.int32(j), blocks, length, window)
            first, full, masked, end = (int(x) for x in bounds)
            assert first <= full <= masked <= end <= some.shape[0]
            assert some[:, j].nonzero()[0].tolist() == list(range(first, end))
            assert whole[full:masked, j].all()


@pytest.mark.parametrize("rows", [4, 3])
def test_devices_share_sequences_and_heads(rows):
    """Divided over a mesh, and whole where its axes do not divide."""
    arrays, ids = tensors(rows, 20, 4, 2, 16)
    how = (0.25, 3.0, CLIP, jnp.asarray(ids), 9)
    expected = kernels(arrays, *how)
    four = jax.devices()[:4]
    ks.set_distribution("fsdp+tensor", 4, tensor_parallel=2, devices=four)
    for a, b in zip(kernels(arrays, *how), expected):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("H", HEAD_SIZES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("card", ["NVIDIA H200", "NVIDIA L4"])
def test_kernels_are_of_instructions_that_gpus_have(H, dtype, card):
    """Translated for CUDA, of which nothing is needed for that."""
    shapes = [(2, 200, n, H) for n in (4, 2, 2)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    ids = jax.ShapeDtypeStruct((2, 200), "int32")
    blocks = {
        name: tiles.blocks_of(name, 200, H, dtype, card) for name in PASSES
    }
    gpu = jax.sharding.AbstractDevice(
        device_kind=card, num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("one",), abstract_device=gpu)
    for cap, clip, documents, window in [
        (None, None, False, None),
        (50.0, None, False, None),
        (50.0, CLIP, True, 100),
    ]:

        def total(q, k, v, ids):
            y, rows = attend_fused(
                *(q, k, v, 0.125, cap, clip, ids if documents else None),
                *(window, True),
                blocks=blocks,
            )
            return y.astype("float32").sum(), rows

        way = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
        with jax.sharding.use_abstract_mesh(mesh):
            text = (
                way.trace(*arrays, ids)
                .lower(lowering_platforms=("cuda",))
                .as_text()
            )
        for name in PASSES:
            assert f"attention_{name}" in text


def test_blocks_are_no_longer_than_the_sequence():
    for name, T in itertools.product(PASSES, (1, 5, 100)):
        found = tiles.blocks_of(name, T, 64, "bfloat16", "NVIDIA H100 80GB")
        assert 16 <= min(found.queries, found.keys)
        assert max(found.queries, found.keys) <= max(16, 2 * T)


def test_what_it_has_not_is_said():
    (q, k, v, _), _ = tensors(1, 4, 3, 2, 16)
    with pytest.raises(ValueError, match="divide query heads"):
        attend_fused(q, k, v, 0.3)
    with pytest.raises(ValueError, match="gamma must not be positive"):
        attend_fused(q, q, q, 0.3, clip=(0.1, 1.0))
    (q, k, v, _), _ = tensors(1, 4, 2, 2, 257)
    with pytest.raises(ValueError, match="heads up to"):
        attend_fused(q, k, v, 0.3)
