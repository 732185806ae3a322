"""The kernels of GPUs on CPU, against float64: run by `test_triton.py`.

In a process of its own: Triton decides when it is imported whether kernels are
compiled or interpreted.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from keras_stable.attend import attend
from keras_stable.backend import torch_attention
from keras_stable.backend import torch_programs
from keras_stable.backend.torch_attention import attend_fused
from keras_stable.choices import Softmax

# Small and unequal, so that short sequences have blocks of every kind.
BLOCKS = {
    "forward": (16, 32, 4, 1),
    "queries": (32, 16, 4, 1),
    "keys": (16, 32, 4, 1),
}
CLIP = -0.03, 1.06


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    torch.manual_seed(0)
    found = lambda kernel, x: BLOCKS[kernel]  # noqa: E731
    monkeypatch.setattr(torch_attention, "blocks_of", found)


def formula(
    q, k, v, scale, cap=None, clip=None, segment_ids=None, sliding_window=None
):
    """Outputs, largest logits and entropies, whatever the memory."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, 2) for x in (k, v))
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = s <= t
    if sliding_window is not None:
        seen = seen & (t - s < sliding_window)
    seen = seen[None, None]
    if segment_ids is not None:
        ids = segment_ids[:, None]
        seen = seen & (ids[..., :, None] == ids[..., None, :])
    raw = scale * torch.einsum("btnh,bsnh->bnts", q, k)
    z = raw if cap is None else cap * torch.tanh(raw / cap)
    log_p = torch.log_softmax(z.masked_fill(~seen, -1e30), -1)
    p = log_p.exp()
    c = p
    if clip is not None:
        gamma, zeta = clip
        c = ((zeta - gamma) * p + gamma).clamp(0, 1)
    y = torch.einsum("bnts,bsnh->btnh", c, v)
    largest = raw.masked_fill(~seen, -torch.inf).amax(-1)
    return y, largest, -(p * log_p).sum(-1)


def tensors(B, T, N, K, H, dtype=torch.float64, size=1.5):
    return [size * torch.randn(B, T, n, H, dtype=dtype) for n in (N, K, K)]


def with_gradients(function, given, weight):
    """Outputs of a function of q, k and v, and its gradients."""
    given = [x.detach().clone().requires_grad_() for x in given]
    y, *rows = function(*given)
    (y.double() * weight).sum().backward()
    return [x.detach() for x in (y, *rows, *(x.grad for x in given))]


def check(given, atol=4e-5, **how):
    """In float32, outputs, statistics and gradients are the formula's."""
    weight = torch.randn_like(given[0])
    expected = with_gradients(lambda *x: formula(*x, **how), given, weight)

    def kernels(*x):
        y, (largest, entropy) = attend_fused(*x, statistics=True, **how)
        assert not largest.requires_grad and not entropy.requires_grad
        return y, largest, entropy

    single = [x.float() for x in given]
    found = with_gradients(kernels, single, weight)
    for a, b in zip(found, expected):
        assert a.dtype == torch.float32
        limit = atol * max(1.0, b.abs().max())
        np.testing.assert_allclose(a, b, atol=limit, rtol=0)
    y, rows = attend_fused(*single, **how)
    assert rows is None
    assert torch.equal(y, found[0])


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 21])
def test_kernels_are_the_formula(cap, clip, packed, window):
    given = tensors(2, 75, 2, 1, 16)
    ids = torch.randint(0, 3, (2, 75)).sort()[0] if packed else None
    how = {"segment_ids": ids, "sliding_window": window}
    check(given, scale=0.4, cap=cap, clip=clip, **how)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
)
@given(st.data())
def test_any_shape_mask_and_block(data):
    draw = data.draw
    sizes = st.sampled_from([16, 32, 64])
    shapes = {name: (draw(sizes), draw(sizes), 4, 1) for name in BLOCKS}
    with pytest.MonkeyPatch.context() as patch:
        chosen = lambda name, x: shapes[name]  # noqa: E731
        patch.setattr(torch_attention, "blocks_of", chosen)
        check_any(draw)


def check_any(draw):
    """Of a shape, mask, cap and clip that `draw` chooses."""
    torch.manual_seed(draw(st.integers(0, 99)))
    K, G = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    T = draw(st.integers(1, 70))
    B, H = draw(st.sampled_from([(1, 16), (2, 16), (1, 32)]))
    ids = None
    if draw(st.booleans()):
        # Documents in any order: a row may see nothing of a whole block.
        ids = torch.randint(0, 3, (B, T))
    check(
        tensors(B, T, K * G, K, H),
        scale=draw(st.floats(0.01, 1.0)),
        cap=draw(st.sampled_from([None, 0.5, 50.0])),
        clip=draw(st.sampled_from([None, CLIP, (0.0, 1.0), (-0.2, 1.5)])),
        segment_ids=ids,
        sliding_window=draw(st.none() | st.integers(1, 80)),
    )


@pytest.mark.parametrize("clip", [(0.0, 1.0), (-0.03, 1.0), (-0.03, 0.9)])
def test_clip_without_an_upper_bound(clip):
    """Where a row has one key p is 1, but for its rounding."""
    given = tensors(1, 60, 2, 1, 16)
    ids = torch.randint(0, 12, (1, 60))
    check(given, 2e-4, scale=0.9, clip=clip, segment_ids=ids)


@pytest.mark.parametrize("H", [*torch_attention.HEAD_SIZES, 3, 24, 80])
def test_head_sizes(H):
    check(tensors(1, 33, 1, 1, H), scale=H**-0.5, cap=3.0)


@pytest.mark.parametrize("cap", [None, 50.0])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_one_token(cap, clip):
    check(tensors(2, 1, 2, 1, 16), scale=0.25, cap=cap, clip=clip)


@pytest.mark.parametrize("cap", [None, 50.0, 2e4])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_logits_of_ten_thousand(cap, clip):
    given = tensors(1, 40, 2, 1, 16, size=4)
    largest = formula(*given, 1.0)[1].max()
    # Each logit is rounded to a thousandth.
    check(given, 4e-3, scale=1e4 / float(largest), cap=cap, clip=clip)


def test_rising_logits():
    """Each key outweighs all before it, and the running maximum moves."""
    q, k, v = tensors(1, 70, 1, 1, 16)
    q, k = (torch.zeros_like(x) for x in (q, k))
    q[..., 0], k[..., 0] = 1.0, torch.arange(70)[None, :, None] * 40.0
    # Where dp is delta, a rounding of it is times keys of up to 2760.
    check([q, k, v], 5e-3, scale=1.0)
    check([q, -k, v], 5e-3, scale=1.0)


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_nan_is_not_hidden(cap, clip):
    given = [x.float().requires_grad_() for x in tensors(1, 40, 1, 1, 16)]
    with torch.no_grad():
        given[0][0, 20, 0, 3] = torch.nan
    how = {"scale": 0.3, "cap": cap, "clip": clip, "statistics": True}
    y, rows = attend_fused(*given, **how)
    for x in (y[0, :, 0, 0], *(row[0, 0] for row in rows)):
        assert x[20].isnan() and x[:20].isfinite().all()
    for x in torch.autograd.grad(y[0, 20].sum(), given):
        assert x[0, :21].isnan().any()


def poisoned(x):
    """`x` in the middle of NaN: what is read beyond its ends shows."""
    around = torch.full((3, *x.shape), torch.nan, dtype=x.dtype)
    around[1] = x
    return around[1]


@pytest.mark.parametrize("clip", [None, CLIP])
def test_nothing_beyond_the_ends_is_read(clip):
    weight = torch.randn(1, 39, 2, 16)
    given = [x.float() for x in tensors(1, 39, 2, 1, 16)]
    how = {"scale": 0.3, "cap": 2.0, "clip": clip, "statistics": True}
    given = [poisoned(x).requires_grad_() for x in given]
    y, rows = attend_fused(*given, **how)
    found = torch.autograd.grad(y, given, poisoned(weight))
    assert all(x.isfinite().all() for x in (y, *rows, *found))


def test_nothing_beyond_the_ends_is_written(monkeypatch):
    """Results lie in arrays of 7 before and after them."""
    arrays = []

    def within(x):
        array = torch.full((3, *x.shape), 7.0, dtype=x.dtype)
        arrays.append(array)
        return array[1]

    def results(q, statistics):
        return tuple(map(within, original(q, statistics)))

    original = torch_attention.results
    monkeypatch.setattr(torch_attention, "results", results)
    monkeypatch.setattr(
        torch_attention.torch, "empty_like", lambda x: within(x)
    )
    given = [x.float() for x in tensors(1, 39, 2, 1, 16)]
    how = 0.3, 2.0, -0.03, 1.06, None
    y, lse, *_ = torch_attention.attend._init_fn(*given, None, *how, True)
    torch_attention.attend_gradient._init_fn(y, *given, y, lse, None, *how)
    assert len(arrays) == 8
    for array in arrays:
        assert (array[[0, 2]] == 7).all() and (array[1] != 7).all()


def test_strides_do_not_matter():
    q, k, v = (x.float() for x in tensors(2, 20, 2, 2, 16))
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    y, _ = attend_fused(*apart, 0.3)
    assert torch.equal(y, attend_fused(q, k, v, 0.3)[0])
    assert y.is_contiguous()


def convert(x, dtype, to, mode, original=interpreter._convert_float):
    """The interpreter cuts digits off; GPUs round to the nearest bfloat16."""
    if to != tl.bfloat16:
        return original(x, dtype, to, mode)
    return torch.tensor(x).bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize("cap", [None, 5.0])
def test_kernels_round_no_more_than_the_explicit_path(cap, monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    given = tensors(1, 64, 2, 2, 64, torch.float64, 1.0)
    given = [x.bfloat16() for x in given]
    weight = torch.randn(given[0].shape).bfloat16().double()
    exact = with_gradients(
        lambda *x: formula(*x, 0.125, cap)[:1],
        [x.double() for x in given],
        weight,
    )
    explicit = with_gradients(
        # A function of the logits keeps it from other kernels.
        lambda *x: attend(
            *x,
            scale=0.125,
            softmax=Softmax(cap=cap),
            penalize=lambda z, mask: 0.0,
        )[:1],
        given,
        weight,
    )
    found = with_gradients(
        lambda *x: attend_fused(*x, 0.125, cap)[:1], given, weight
    )
    for a, b, c in zip(found, explicit, exact):
        assert a.dtype == torch.bfloat16
        limit = 2 * (b.double() - c).abs().max()
        assert (a.double() - c).abs().max() <= limit


def region(q, k, v):
    y, (largest, _) = attend_fused(
        torch.sin(q), k, v, 0.3, 2.0, sliding_window=9, statistics=True
    )
    return 2 * y, largest.amax((0, 2))


@pytest.mark.parametrize("how", ["traced", "fake", "compiled", "checkpoint"])
def test_one_operator_in_every_graph(how):
    given = [x.float() for x in tensors(1, 20, 2, 1, 16)]
    weight = torch.randn(given[0].shape).double()
    expected = with_gradients(region, given, weight)
    mode = "fake" if how == "fake" else "real"
    program = torch_programs.trace(region, *given, mode=mode)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("keras_stable.attend.default") == 1
    if how == "compiled":
        program = torch.compile(program, backend="aot_eager", dynamic=False)
    if how == "checkpoint":
        program = lambda *x: torch.utils.checkpoint.checkpoint(  # noqa: E731
            region, *x, use_reentrant=False
        )
    found = with_gradients(program, given, weight)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("packed", [False, True])
def test_operator_is_registered_soundly(packed):
    given = [x.float().requires_grad_() for x in tensors(1, 9, 2, 1, 16)]
    ids = torch.ones(1, 9, dtype=torch.int32) if packed else None
    how = 0.3, 2.0, *CLIP, None, packed
    torch.library.opcheck(torch_attention.attend, (*given, ids, *how))


@pytest.mark.parametrize(
    "shapes, how, message",
    [
        ((4, 3, 16), {}, "divisor"),
        ((4, 2, 257), {}, "heads up to"),
        ((2, 2, 16), {"scale": -1.0}, "positive scale"),
        ((2, 2, 16), {"clip": (0.1, 1.1)}, "gamma <= 0"),
    ],
)
def test_errors(shapes, how, message):
    N, K, H = shapes
    given = [x.float() for x in tensors(1, 4, N, K, H)]
    with pytest.raises(ValueError, match=message):
        attend_fused(*given, **{"scale": 0.3, **how})
