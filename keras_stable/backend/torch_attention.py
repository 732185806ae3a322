"""Attention on GPUs, by kernels of our own, as operators of PyTorch.

`attend_fused` is what is called. `keras_stable::attend` and its gradient are
one opaque operator each, in traced graphs and under `torch.compile` too.

B batch, T time, N query heads, K key and value heads, H head dimension.
"""

import math
from typing import Optional

import torch

# Powers of two, as the kernels divide them among threads. Heads of others get
# zeros: flex_attention, which has all sizes, has neither clip nor entropy, and
# takes 2.3 times as long at 64.
HEAD_SIZES = (16, 32, 64, 128, 256)
# Queries and keys of a block, warps, stages of the pipeline, by head size:
# for 16-bit numbers on GPUs with the matrix units and memory of an H100.
BLOCKS = {
    "forward": {
        64: (64, 64, 4, 3),
        128: (64, 64, 4, 2),
        256: (128, 32, 8, 3),
    },
    "queries": {
        64: (64, 64, 4, 3),
        128: (64, 32, 4, 2),
        256: (128, 32, 8, 3),
    },
    "keys": {
        64: (64, 64, 4, 2),
        128: (32, 128, 8, 2),
        256: (32, 64, 8, 2),
    },
}
# For all else, within the 99 KiB of shared memory of the smaller Amperes, by
# bytes of a number and head size.
SAFE = {
    2: {128: (64, 32, 4, 2), 256: (32, 16, 4, 2)},
    4: {128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
}


def size_of(H):
    """The head size that kernels compute in place of H."""
    return min(size for size in HEAD_SIZES if size >= H)


def safe_blocks(H, itemsize):
    """As `blocks_of`, on any GPU."""
    return SAFE[itemsize].get(H, (64, 32, 4, 2))


def blocks_of(kernel, x):
    """Queries and keys of a block, warps and stages, for tensors like `x`.

    Args:
        kernel: key of `BLOCKS`.
        x: tensor (..., H).
    """
    H = x.shape[-1]
    if x.is_cuda and x.itemsize == 2 and H in BLOCKS[kernel]:
        if torch.cuda.get_device_capability(x.device)[0] >= 9:
            return BLOCKS[kernel][H]
    return safe_blocks(H, x.itemsize)


def _numbers(scale, cap, gamma, zeta):
    """What the kernels are given of them, logits in base 2."""
    log2e = math.log2(math.e)
    return {
        "height": (scale if cap is None else cap) * log2e,
        "rate": None if cap is None else 2 * log2e * scale / cap,
        "gamma": gamma,
        "width": None if gamma is None else zeta - gamma,
    }


def _launch(name, kernel, arrays, window, numbers):
    """Runs a kernel on `arrays`, of which the first are queries and keys."""
    q, k = arrays[:2]
    B, T, N, H = q.shape
    K = k.shape[2]
    block_t, block_s, warps, stages = blocks_of(name, q)
    # A program for each block of each head.
    heads, block = (B * K, block_s) if name == "keys" else (B * N, block_t)
    # Of the device of the arrays, which need not be the current one.
    with torch.cuda.device_of(q):
        kernel[(heads * -(-T // block),)](
            *arrays,
            T,
            window,
            **numbers,
            N=N,
            G=N // K,
            H=H,
            BLOCK_T=block_t,
            BLOCK_S=block_s,
            num_warps=warps,
            num_stages=stages,
        )


@torch.library.custom_op("keras_stable::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment_ids: Optional[torch.Tensor],
    scale: float,
    cap: Optional[float],
    gamma: Optional[float],
    zeta: Optional[float],
    window: Optional[int],
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs, and of each row the normaliser, largest logit and entropy."""
    from keras_stable.backend.triton_kernels import forward_kernel

    q, k, v = (x.contiguous() for x in (q, k, v))
    y, *rows = results(q, statistics)
    some = rows if statistics else (rows[0], None, None)
    numbers = {"scale": scale, **_numbers(scale, cap, gamma, zeta)}
    arrays = q, k, v, segment_ids, y, *some
    _launch("forward", forward_kernel, arrays, window, numbers)
    return y, *rows


def results(q, statistics):
    """Arrays for what `attend` returns."""
    B, T, N, _ = q.shape

    def rows(measured):
        shape = (B, N, T) if measured else (0,)
        return q.new_empty(shape, dtype=torch.float32)

    y = q.new_empty(q.shape)
    return y, rows(True), rows(statistics), rows(statistics)


@attend.register_fake
def _(q, k, v, segment_ids, scale, cap, gamma, zeta, window, statistics):
    return results(q, statistics)


@torch.library.custom_op("keras_stable::attend_gradient", mutates_args=())
def attend_gradient(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    segment_ids: Optional[torch.Tensor],
    scale: float,
    cap: Optional[float],
    gamma: Optional[float],
    zeta: Optional[float],
    window: Optional[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by queries, keys and values."""
    from keras_stable.backend import triton_gradients as kernels

    dy, q, k, v, y, lse = (x.contiguous() for x in (dy, q, k, v, y, lse))
    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    # The derivative of the tanh is 4 r (1 - r).
    slope = scale if cap is None else 4 * scale
    numbers = {"slope": slope, **_numbers(scale, cap, gamma, zeta)}
    # The first writes delta, and the second reads it.
    arrays = q, k, v, segment_ids, y, dy, lse, delta, dq
    _launch("queries", kernels.queries_kernel, arrays, window, numbers)
    arrays = q, k, v, segment_ids, dy, lse, delta, dk, dv
    _launch("keys", kernels.keys_kernel, arrays, window, numbers)
    return dq, dk, dv


@attend_gradient.register_fake
def _(dy, q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    *tensors, scale, cap, gamma, zeta, window, _ = inputs
    y, lse, *_ = output
    # No zeros for rows, which nothing is learned from.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, y, lse)
    ctx.numbers = scale, cap, gamma, zeta, window


def _backward(ctx, dy, *others):
    q, k, v, segment_ids, y, lse = ctx.saved_tensors
    found = attend_gradient(dy, q, k, v, y, lse, segment_ids, *ctx.numbers)
    return *found, *(None for _ in range(7))


attend.register_autograd(_backward, setup_context=_setup)


def attend_fused(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    scale,
    cap=None,
    clip=None,
    segment_ids=None,
    sliding_window=None,
    statistics=False,
):
    """Causal attention by the formula of `attend.attend`, in one kernel.

    ```
    raw = scale * q k^T                         float32
    z   = cap * tanh(raw / cap), or raw
    p   = softmax(z over visible keys)          float32
    c   = clip((zeta - gamma) p + gamma, 0, 1), or p
    y   = c v                                   c as v, sums in float32
    ```

    No array of (T, T) is in memory, nor in the gradient; clipping reads the
    keys twice. The tanh is within a few 1e-7 of the cap. Runs on the GPU that
    the tensors are on, or on CPU where `TRITON_INTERPRET=1` was set before
    Triton was imported.

    Args:
        q_BTNH, k_BTKH, v_BTKH: tensors of one device, K divides N, H at most
            256; keys and values are cast to the dtype of queries.
        scale: float, positive.
        cap: float or None.
        clip: (gamma, zeta), floats with gamma <= 0, or None.
        segment_ids: int tensor (B, T) or None: tokens see their own document.
        sliding_window: int or None: how many keys a query sees at most.
        statistics: bool. Whether `rows` are wanted.

    Returns:
        `(y_BTNH, rows)`: y of the dtype of `q_BTNH`; rows None, or
        `(max_BNT, entropy_BNT)` in float32, without gradient: the largest
        visible raw logit, and the entropy of p in nats.

    Raises:
        ValueError: for shapes, a scale or a gamma that the kernels do not
            compute.
    """
    _check(q_BTNH, k_BTKH, v_BTKH, scale, clip)
    k_BTKH, v_BTKH = (x.to(q_BTNH.dtype) for x in (k_BTKH, v_BTKH))
    H = q_BTNH.shape[-1]
    zeros = size_of(H) - H
    if zeros:
        q_BTNH, k_BTKH, v_BTKH = (
            torch.nn.functional.pad(x, (0, zeros))
            for x in (q_BTNH, k_BTKH, v_BTKH)
        )
    if segment_ids is not None:
        segment_ids = segment_ids.to(torch.int32).contiguous()
    gamma, zeta = (None, None) if clip is None else map(float, clip)
    y_BTNH, _, largest, entropy = attend(
        *(q_BTNH, k_BTKH, v_BTKH, segment_ids),
        float(scale),
        None if cap is None else float(cap),
        gamma,
        zeta,
        sliding_window,
        statistics,
    )
    rows = (largest.detach(), entropy.detach()) if statistics else None
    return y_BTNH[..., :H] if zeros else y_BTNH, rows


def _check(q, k, v, scale, clip):
    B, T, N, H = q.shape
    K = k.shape[2]
    if k.shape != v.shape or k.shape != (B, T, K, H) or N % K:
        raise ValueError(
            "Keys and values must be (B, T, K, H) with queries (B, T, N, H), "
            f"K a divisor of N. Received: queries {tuple(q.shape)}, keys "
            f"{tuple(k.shape)}, values {tuple(v.shape)}"
        )
    if H > HEAD_SIZES[-1]:
        raise ValueError(
            f"The kernels have heads up to {HEAD_SIZES[-1]}. Received: {H}"
        )
    if T * N * size_of(H) >= 2**31:
        raise ValueError(
            "The kernels count the numbers of a sequence in 32 bits. "
            f"Received: queries {tuple(q.shape)}"
        )
    if scale <= 0 or (clip is not None and clip[0] > 0):
        raise ValueError(
            "The kernels take a positive scale and a clip with gamma <= 0. "
            f"Received: scale {scale}, clip {clip}"
        )
