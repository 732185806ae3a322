"""Attention in chunks against the formula in float64, and its memory."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops
from reference import with_gradients

import keras_stable as ks
from keras_stable import attend as attend_module
from keras_stable.attend import attend
from keras_stable.chunked_attention import _loops
from keras_stable.chunked_attention import attend_chunked
from keras_stable.masks import visible
from keras_stable.masks import visible_keys
from keras_stable.telemetry import Recorder
from keras_stable.telemetry import recording

BACKEND = keras.backend.backend()
numpy = ops.convert_to_numpy


def tensors(rng, B, T, N, K, H, size=2.0):
    """Queries, keys, values and the gradient of their attention."""
    return [
        (a * rng.normal(size=(B, T, n, H))).astype("float32")
        for a, n in ((size, N), (size, K), (1.0, K), (1.0, N))
    ]


def mask_of(T, ids, window):
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    mask = (s <= t) & (t - s < (window or T))
    return (
        mask[None] if ids is None else mask & (ids[:, :, None] == ids[:, None])
    )


def formula(q, k, v, dy, scale, cap=None, clip=None, ids=None, window=None):
    """`(y, maximum, entropy, keys, dq, dk, dv)` in float64."""
    q, k, v, dy = (x.astype("float64") for x in (q, k, v, dy))
    B, T, N, _ = q.shape
    G = N // k.shape[2]
    k, v = (np.repeat(x, G, axis=2) for x in (k, v))
    raw = scale * np.einsum("btnh,bsnh->bnts", q, k)
    mask = mask_of(T, ids, window)[:, None]
    slope = 1.0 if cap is None else 1 - np.tanh(raw / cap) ** 2
    z = raw if cap is None else cap * np.tanh(raw / cap)
    z = np.where(mask, z, -np.inf)
    z = z - z.max(-1, keepdims=True)
    weight = np.exp(z)
    total = weight.sum(-1, keepdims=True)
    p = weight / total
    terms = np.where(mask, p * np.where(mask, z, 0.0), 0.0)
    entropy = np.log(total[..., 0]) - terms.sum(-1)
    gamma, zeta = clip or (0.0, 1.0)
    a = (zeta - gamma) * p + gamma
    c = np.clip(a, 0, 1)
    dp = np.einsum("btnh,bsnh->bnts", dy, v)
    dv = np.einsum("bnts,btnh->bsnh", c, dy)
    if clip:
        dp = dp * (zeta - gamma) * ((a > 0) & (a < 1))
    dz = p * (dp - (p * dp).sum(-1, keepdims=True)) * slope * scale
    dq = np.einsum("bnts,bsnh->btnh", dz, k)
    dk = np.einsum("bnts,btnh->bsnh", dz, q)
    dk, dv = (x.reshape(B, T, N // G, G, -1).sum(3) for x in (dk, dv))
    largest = np.where(mask, raw, -np.inf).max(-1)
    keys = np.broadcast_to(mask[:, 0].sum(-1), (B, T))
    y = np.einsum("bnts,bsnh->btnh", c, v)
    return y, largest, entropy, keys, dq, dk, dv


def chunked(
    q, k, v, dy, scale, cap=None, clip=None, ids=None, window=None, **how
):
    """`(y, maximum, entropy, dq, dk, dv)`."""
    kept = {}

    def total(*qkv):
        y, rows = attend_chunked(
            *qkv, scale, cap, clip, ids, window, statistics=True, **how
        )
        kept["found"] = [numpy(ops.stop_gradient(x)) for x in (y, *rows)]
        return ops.sum(ops.cast(y, "float32") * ops.convert_to_tensor(dy))

    if BACKEND == "jax":
        import jax

        def traced(*qkv):
            y, rows = attend_chunked(
                *qkv, scale, cap, clip, ids, window, statistics=True, **how
            )
            return ops.sum(ops.cast(y, "float32") * dy), (y, *rows)

        way = jax.value_and_grad(traced, (0, 1, 2), has_aux=True)
        (_, found), gradients = jax.jit(way)(q, k, v)
        return [numpy(x) for x in (*found, *gradients)]
    _, gradients = with_gradients(total, q, k, v)
    return [*kept["found"], *(numpy(x) for x in gradients)]


def check(found, expected, tolerance=1e-5):
    y, largest, entropy, _, *gradients = expected
    for a, b in zip(found, (y, largest, entropy, *gradients), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() < tolerance * max(1.0, np.abs(b).max())


CLIP = (-0.03, 1.03)
CASES = {
    "plain": {},
    "cap": {"cap": 2.0},
    "clip": {"clip": CLIP},
    "window": {"window": 5},
    "cap, clip, window": {"cap": 3.0, "clip": (-0.2, 1.1), "window": 11},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_formula(case, packed):
    rng = np.random.default_rng(0)
    arrays = tensors(rng, 2, 37, 4, 2, 8)
    # Of any order: equal numbers see each other across others.
    ids = rng.integers(0, 3, (2, 37)) if packed else None
    check(
        chunked(*arrays, 0.3, ids=ids, chunk=8, **case),
        formula(*arrays, 0.3, ids=ids, **case),
    )


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_shapes_masks_and_chunks(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    seed = data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    B, T = draw(1, 2), draw(1, 2, 7, 16, 17, 23)
    N, K = draw((1, 1), (2, 1), (4, 2), (3, 3))
    case = {
        "cap": draw(None, 1.5),
        "clip": draw(None, CLIP, (0.0, 1.2)),
        "window": draw(None, 1, 3, 40),
        "ids": draw(None, np.sort(rng.integers(0, 3, (B, T)))),
    }
    arrays = tensors(rng, B, T, N, K, draw(1, 4))
    check(
        chunked(*arrays, 0.5, chunk=draw(1, 3, 5, 64), **case),
        formula(*arrays, 0.5, **case),
    )


@pytest.mark.parametrize("cap", [None, 50.0])
def test_logits_of_ten_thousand(cap):
    rng = np.random.default_rng(0)
    arrays = tensors(rng, 1, 19, 2, 1, 16, size=50.0)
    found = chunked(*arrays, 1.0, cap=cap, chunk=4)
    expected = formula(*arrays, 1.0, cap=cap)
    assert np.abs(expected[1]).max() > 9000
    for x in found:
        assert np.isfinite(x).all()
    # Sixteen products of 2500 are rounded to 1e-3, and so are differences.
    assert np.abs(found[0] - expected[0]).max() < 5e-3
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-2)
    assert np.abs(found[2] - expected[2]).max() < 5e-3


def test_keys_before_the_window_of_a_chunk_are_not_read():
    rng = np.random.default_rng(0)
    q, k, v, _ = tensors(rng, 1, 24, 2, 2, 8)
    how = {"sliding_window": 6, "chunk": 8}
    expected = numpy(attend_chunked(q, k, v, 0.3, **how)[0])
    # Queries from 16 on are a chunk, which sees keys from 11 on.
    for x in (k, v):
        x[:, :11] = np.nan
    found = numpy(attend_chunked(q, k, v, 0.3, **how)[0])
    np.testing.assert_array_equal(found[:, 16:], expected[:, 16:])
    assert np.isnan(found[:, :16]).any()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_sixteen_bits_round_like_the_formula_in_sixteen_bits(cap):
    rng = np.random.default_rng(0)
    *qkv, dy = tensors(rng, 2, 40, 4, 2, 16)
    qkv = [numpy(ops.cast(ops.cast(x, "bfloat16"), "float32")) for x in qkv]
    expected = formula(*qkv, dy, 0.25, cap=cap)
    wanted = [expected[0], *expected[4:]]
    # A clip that changes nothing: the formula, not Keras's kernels.
    softmax = ks.Softmax(cap=cap, clip=ks.Clip(zeta=1.0, gamma=0.0))

    def errors(function):
        def total(*qkv):
            y = function(*(ops.cast(x, "bfloat16") for x in qkv))
            assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
            y = ops.cast(y, "float32")
            return ops.sum(y * ops.convert_to_tensor(dy))

        low = [ops.cast(x, "bfloat16") for x in qkv]
        y = numpy(ops.cast(function(*low), "float32"))
        found = [y, *(numpy(x) for x in with_gradients(total, *qkv)[1])]
        return [np.abs(a - b).max() for a, b in zip(found, wanted)]

    ours = errors(lambda *x: attend_chunked(*x, 0.25, cap, chunk=16)[0])
    theirs = errors(lambda *x: attend(*x, scale=0.25, softmax=softmax))
    assert all(a <= 2 * b for a, b in zip(ours, theirs))


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("T", [1, 20, 1100])
def test_keys_are_those_of_the_mask(T, window):
    ids = np.random.default_rng(0).integers(0, 3, (2, T))
    for segment_ids in (None, ids):
        found = numpy(visible_keys(T, segment_ids, window))
        mask = mask_of(T, segment_ids, window)
        np.testing.assert_array_equal(found, mask.sum(-1))
        mine = visible(T, segment_ids=segment_ids, sliding_window=window)
        np.testing.assert_array_equal(numpy(mine), mask)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 60])
@pytest.mark.parametrize("T", [1, 15, 16, 50, 128])
def test_chunks_multiply_what_they_see_and_little_else(T, window):
    loops, pairs = _loops(T, window, 8), 0
    starts = [
        loop.start + i * loop.L for loop in loops for i in range(loop.count)
    ]
    assert starts == list(range(0, T, 8))
    for loop in loops:
        stop = loop.start + loop.count * loop.L
        seen = min(stop, loop.L + (window or T) - 1)
        assert loop.S == seen
        pairs += loop.count * loop.L * loop.S
        for i in range(loop.count):
            start = loop.start + i * loop.L
            first, size = loop.keys(start)
            assert first <= max(0, start - (window or T) + 1)
            assert first + size == start + loop.L
            assert (first, size) <= tuple(int(x) for x in loop.keys(start))
    if T == 128:
        assert pairs <= (5 / 8) * T * T


@pytest.fixture
def small(monkeypatch):
    """Chunks wherever they can be."""
    calls = []

    def watched(*args, **kwargs):
        calls.append(kwargs)
        return attend_chunked(*args, chunk=8, **kwargs)

    monkeypatch.setattr(attend_module, "LOGITS", 0)
    monkeypatch.setattr(attend_module, "LENGTH", 2)
    monkeypatch.setattr(attend_module, "attend_chunked", watched)
    return calls


SOFTMAXES = {
    "cap": ks.Softmax(cap=2.0),
    "clip": ks.Softmax(clip=ks.Clip(zeta=1.03, gamma=-0.03)),
    "alpha": ks.Softmax(temperature=0.7, clip=ks.Clip(alpha=1.0, gamma=None)),
    "plain": ks.Softmax(),
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
def test_attend_takes_chunks_and_measures_them(
    softmax, full, small, monkeypatch
):
    rng = np.random.default_rng(0)
    q, k, v, _ = tensors(rng, 2, 21, 4, 2, 8)
    ids = np.sort(rng.integers(0, 3, (2, 21)))
    how = {"scale": 0.3, "softmax": softmax, "segment_ids": ids}
    with recording(Recorder(full)) as recorder:
        measured = numpy(attend(q, k, v, **how))
    found = numpy(attend(q, k, v, **how))
    # On a CPU, also torch's own kernel would make a mask of all pairs.
    assert [call["statistics"] for call in small] == [full, False]
    np.testing.assert_array_equal(measured, found)
    monkeypatch.setattr(attend_module, "LENGTH", 2**30)
    with recording(Recorder(full)) as formula:
        expected = numpy(attend(q, k, v, **how))
    assert len(small) == 2
    np.testing.assert_allclose(found, expected, atol=1e-5)
    (record,), (reference,) = recorder.heads, formula.heads
    assert record.note == reference.note == "exact"
    np.testing.assert_allclose(
        numpy(record.value), numpy(reference.value), rtol=1e-5, atol=1e-6
    )


def test_what_needs_all_logits_gets_them(small):
    q, k, v, _ = tensors(np.random.default_rng(0), 1, 20, 2, 2, 4)
    cap = ks.Softmax(cap=2.0)
    attend(q, k, v, scale=0.3, softmax=cap, penalize=lambda z, mask: 0.0)
    seed = ops.array([1, 2], "uint32")
    attend(q, k, v, scale=0.3, softmax=cap, dropout_rate=0.5, seed=seed)
    attend(q, k, v, scale=0.3, softmax=cap, positions=ops.arange(20))
    low = ks.Softmax(cap=2.0, logits_dtype="bfloat16")
    attend(q, k, v, scale=0.3, softmax=low)
    assert not small


@pytest.mark.parametrize(
    "name, remat", [("qk_norm_cap", "none"), ("soft_clip", "block")]
)
def test_training_is_that_of_the_formula(name, remat, small, monkeypatch):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 31, (3, 13)).astype("int32")

    def losses():
        keras.utils.set_random_seed(0)
        backbone = ks.StableBackbone(31, 1, 2, 16, variant=name, remat=remat)
        lm = ks.StableCausalLM(backbone)
        lm.compile(keras.optimizers.SGD(0.5))
        # The last batch is smaller.
        history = lm.fit(
            {"token_ids": ids[:, :-1]}, ids[:, 1:], batch_size=2, verbose=0
        )
        return [*history.history["loss"], *(numpy(v) for v in lm.weights)]

    found = losses()
    assert small
    monkeypatch.setattr(attend_module, "LENGTH", 2**30)
    for a, b in zip(found, losses()):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="devices share on jax")
def test_devices_share_sequences_and_heads():
    """Each computes its own, and waits for no other."""
    import jax

    *qkv, dy = tensors(np.random.default_rng(0), 4, 20, 4, 2, 8)

    def step(*qkv):
        y, rows = attend_chunked(
            *qkv, 0.3, 3.0, CLIP, None, 9, statistics=True, chunk=8
        )
        return ops.sum(y * dy), (y, *rows)

    way = jax.jit(jax.value_and_grad(step, (0, 1, 2), has_aux=True))
    expected = jax.tree.leaves(way(*qkv))
    four = jax.devices()[:4]
    ks.set_distribution("fsdp+tensor", 4, tensor_parallel=2, devices=four)
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    spec = jax.sharding.PartitionSpec("batch", None, "model", None)
    placed = jax.device_put(qkv, jax.sharding.NamedSharding(mesh, spec))
    program = way.lower(*placed).compile()
    for a, b in zip(jax.tree.leaves(program(*placed)), expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert name not in program.as_text()


def peak(T, function):
    """Bytes of temporary arrays, or entries of the largest tensor."""
    rng = np.random.default_rng(0)
    arrays = tensors(rng, 1, T, 2, 1, 4)
    if BACKEND == "jax":
        import jax

        way = jax.jit(jax.grad(lambda *x: function(*x).sum(), (0, 1, 2)))
        program = way.lower(*arrays[:3]).compile()
        return program.memory_analysis().temp_size_in_bytes
    if BACKEND == "torch":
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        from keras_stable.backend.torch_programs import trace

        sizes = []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                for tensor in keras.tree.flatten(result):
                    if hasattr(tensor, "numel"):
                        sizes.append(tensor.numel())
                return result

        q, k, v = (torch.tensor(x, requires_grad=True) for x in arrays[:3])
        # Through the graph that a region is traced into.
        graph = trace(function, q, k, v)
        with Sizes():
            graph(q, k, v).sum().backward()
        return max(sizes)
    import tensorflow as tf

    @tf.function
    def step(*qkv):
        with tf.GradientTape() as tape:
            tape.watch(qkv)
            y = tf.reduce_sum(function(*qkv))
        return tape.gradient(y, qkv)

    graph = step.get_concrete_function(*map(tf.constant, arrays[:3])).graph
    graphs = [graph, *(f.graph for f in graph._functions.values())]
    return max(
        t.shape.num_elements() or 0
        for g in graphs
        for operation in g.get_operations()
        for t in operation.outputs
        if t.shape.rank is not None
    )


def test_memory_is_linear_in_length():
    clip = ks.Softmax(cap=5.0, clip=ks.Clip(zeta=1.03, gamma=-0.03))

    def chunks(*qkv):
        return attend_chunked(*qkv, 0.3, 5.0, CLIP, chunk=16)[0]

    def whole(*qkv):
        return attend(*qkv, scale=0.3, softmax=clip)

    few, many = (peak(T, chunks) for T in (128, 512))
    assert many < 4.5 * few
    few, many = (peak(T, whole) for T in (128, 512))
    assert many > 10 * few
