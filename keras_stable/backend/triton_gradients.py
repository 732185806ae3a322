"""Gradients of causal attention on GPUs, by kernels in Triton.

One kernel for those of queries, one for those of keys and values. Formulas,
names and shapes are those of `triton_kernels`.
"""

import triton
import triton.language as tl

from keras_stable.backend.triton_kernels import LOWEST
from keras_stable.backend.triton_kernels import clipped
from keras_stable.backend.triton_kernels import ids
from keras_stable.backend.triton_kernels import key_blocks
from keras_stable.backend.triton_kernels import logits
from keras_stable.backend.triton_kernels import product
from keras_stable.backend.triton_kernels import query_blocks
from keras_stable.backend.triton_kernels import rows
from keras_stable.backend.triton_kernels import store_rows
from keras_stable.backend.triton_kernels import visible


@triton.jit
def queries_kernel(
    Q,
    K,
    V,
    IDS,
    Y,
    DY,
    LSE,
    DELTA,
    DQ,
    T,
    window,
    height,
    rate,
    slope,
    gamma,
    width,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Gradient of a block of queries of one head, and delta for the others.

        dp    = dy v^T, times (zeta - gamma) inside of the clip, 0 outside
        delta = sum_s p dp, which is sum_h y dy where nothing is clipped
        dz    = p (dp - delta)
        dq    = sum_s dz (dz / dqk) k

    `slope` is dz / dqk, by r (1 - r) where there is a cap.
    """
    blocks = tl.cdiv(T, BLOCK_T)
    t0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_T
    head = tl.program_id(0) // blocks
    n = head % N
    start = (head // N).to(tl.int64) * T
    Q += (start * N + n) * H
    Y += (start * N + n) * H
    DY += (start * N + n) * H
    DQ += (start * N + n) * H
    K += (start * (N // G) + n // G) * H
    V += (start * (N // G) + n // G) * H
    if IDS is not None:
        IDS += start
    MASKED: tl.constexpr = IDS is not None

    t = t0 + tl.arange(0, BLOCK_T)
    row = head.to(tl.int64) * T + t
    q = rows(Q, t, T, N * H, H, True)
    dy = rows(DY, t, T, N * H, H, True)
    lse = tl.load(LSE + row, mask=t < T, other=0.0)
    ids_t = ids(IDS, t, T)
    dq = tl.zeros([BLOCK_T, H], tl.float32)
    bounds = key_blocks(t0, T, window, BLOCK_T, BLOCK_S)

    if gamma is None:
        y = rows(Y, t, T, N * H, H, True)
        delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    else:
        delta = tl.zeros([BLOCK_T], tl.float32)
        for part in tl.static_range(3):
            for block in range(bounds[part], bounds[part + 1]):
                s = block * BLOCK_S + tl.arange(0, BLOCK_S)
                k = rows(K, s, T, N // G * H, H, part != 1)
                v = rows(V, s, T, N // G * H, H, part != 1)
                qk = product(q, tl.trans(k))
                dp = product(dy, tl.trans(v))
                z = logits(qk, height, rate, lse[:, None])[0]
                if MASKED or part != 1:
                    seen = visible(
                        t, s, ids_t, ids(IDS, s, T), window, part != 1, False
                    )
                    z = tl.where(seen, z, LOWEST)
                p = tl.exp2(z)
                inner = clipped(p, gamma, width)[1]
                delta += tl.sum(tl.where(inner, p * (width * dp), 0.0), 1)
    tl.store(DELTA + row, delta, mask=t < T)

    for part in tl.static_range(3):
        for block in range(bounds[part], bounds[part + 1]):
            s = block * BLOCK_S + tl.arange(0, BLOCK_S)
            k = rows(K, s, T, N // G * H, H, part != 1)
            v = rows(V, s, T, N // G * H, H, part != 1)
            qk = product(q, tl.trans(k))
            dp = product(dy, tl.trans(v))
            z, r = logits(qk, height, rate, lse[:, None])
            if MASKED or part != 1:
                seen = visible(
                    t, s, ids_t, ids(IDS, s, T), window, part != 1, False
                )
                z = tl.where(seen, z, LOWEST)
            p = tl.exp2(z)
            if gamma is not None:
                inner = clipped(p, gamma, width)[1]
                dp = tl.where(inner, width * dp, 0.0)
            dz = p * (dp - delta[:, None])
            if rate is not None:
                dz = dz * (r - r * r)
            dq = product(dz.to(k.dtype), k, dq)
    store_rows(DQ, slope * dq, t, T, N * H, H)


@triton.jit
def keys_kernel(
    Q,
    K,
    V,
    IDS,
    DY,
    LSE,
    DELTA,
    DK,
    DV,
    T,
    window,
    height,
    rate,
    slope,
    gamma,
    width,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Gradients of a block of keys and values of one of the K heads.

    As in `queries_kernel`, all transposed: keys are rows. The G heads of
    queries follow one another.
    """
    # The first keys are seen by the most queries.
    blocks = tl.cdiv(T, BLOCK_S)
    s0 = tl.program_id(0) % blocks * BLOCK_S
    head = tl.program_id(0) // blocks
    b, n = head // (N // G), head % (N // G)
    start = b.to(tl.int64) * T
    K += (start * (N // G) + n) * H
    V += (start * (N // G) + n) * H
    DK += (start * (N // G) + n) * H
    DV += (start * (N // G) + n) * H
    if IDS is not None:
        IDS += start
    MASKED: tl.constexpr = IDS is not None

    s = s0 + tl.arange(0, BLOCK_S)
    k = rows(K, s, T, N // G * H, H, True)
    v = rows(V, s, T, N // G * H, H, True)
    ids_s = ids(IDS, s, T)
    dk = tl.zeros([BLOCK_S, H], tl.float32)
    dv = tl.zeros([BLOCK_S, H], tl.float32)
    bounds = query_blocks(s0, T, window, BLOCK_T, BLOCK_S)

    for g in range(G):
        query = n * G + g
        q_head = Q + (start * N + query) * H
        dy_head = DY + (start * N + query) * H
        row = start * N + query.to(tl.int64) * T
        for part in tl.static_range(3):
            for block in range(bounds[part], bounds[part + 1]):
                t = block * BLOCK_T + tl.arange(0, BLOCK_T)
                q = rows(q_head, t, T, N * H, H, part != 1)
                dy = rows(dy_head, t, T, N * H, H, part != 1)
                if part != 1:
                    # Rows beyond the end see nothing.
                    lse = tl.load(LSE + row + t, t < T, float("inf"))
                    delta = tl.load(DELTA + row + t, t < T, 0.0)
                else:
                    lse = tl.load(LSE + row + t)
                    delta = tl.load(DELTA + row + t)
                qk = product(k, tl.trans(q))
                z, r = logits(qk, height, rate, lse[None, :])
                if MASKED or part != 1:
                    seen = visible(
                        t, s, ids(IDS, t, T), ids_s, window, part != 1, True
                    )
                    z = tl.where(seen, z, LOWEST)
                p = tl.exp2(z)
                if gamma is None:
                    dv = product(p.to(dy.dtype), dy, dv)
                    dp = product(v, tl.trans(dy))
                else:
                    c, inner = clipped(p, gamma, width)
                    dv = product(c.to(dy.dtype), dy, dv)
                    dp = product(v, tl.trans(dy))
                    dp = tl.where(inner, width * dp, 0.0)
                dz = p * (dp - delta[None, :])
                if rate is not None:
                    dz = dz * (r - r * r)
                dk = product(dz.to(q.dtype), q, dk)
    store_rows(DK, slope * dk, s, T, N // G * H, H)
    store_rows(DV, dv, s, T, N // G * H, H)
