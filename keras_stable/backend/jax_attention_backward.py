"""The backward kernels of `jax_attention`: no atomics, the same bits always.

B batch, T time, N query heads, K key heads, G = N / K queries a key, H head
dimension; Q queries of a block, S keys of a block.

```
c  = clip(p), p = 2^(z - lse)       recomputed
dc = dy v^T
dp = (zeta - gamma) dc where 0 < (zeta - gamma) p + gamma < 1, or dc
dz = p (dp - delta), delta = sum_s p dp     without a clip: sum_h dy y
dq = scale sum_s dz (1 - tanh^2) k
dk = scale sum_t dz (1 - tanh^2) q
dv = sum_t c dy
```
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_stable.backend import jax_attention_tiles as tiles


def _dq_kernel(
    q_ref,
    k_ref,
    v_ref,
    ids_ref,
    y_ref,
    lse_ref,
    dy_ref,
    dq_ref,
    delta_ref,
    *,
    formula,
    blocks,
    length,
):
    """Gradient by a block of queries, and their delta for the other kernel."""
    Q, S = blocks.queries, blocks.keys
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    rows = (i * Q, Q, length if length % Q else None)
    keys_length = length if length % S else None
    q, dy = (tiles.load(ref, *rows) for ref in (q_ref, dy_ref))
    lse = tiles.load(lse_ref, *rows)[:, None]
    t = tiles.positions(i, Q)[:, None]
    ids_t = None if ids_ref is None else tiles.load(ids_ref, *rows)[:, None]
    bounds = tiles.key_phases(i, blocks, length, formula.window)
    visit = functools.partial(
        tiles.visit, bounds, everywhere=ids_ref is not None
    )

    def keys(ref, j, masked):
        return tiles.load(ref, j * S, S, keys_length if masked else None)

    def block(j, masked):
        """Keys of a block; probabilities, their gradient, the cap's half."""
        k = keys(k_ref, j, masked)
        z, half = formula.z(tiles.product(q, k.T), lse)
        if masked:
            s = tiles.positions(j, S)[None]
            ids_s = None
            if ids_ref is not None:
                ids_s = keys(ids_ref, j, True)[None]
            z = jnp.where(formula.visible(t, s, ids_t, ids_s), z, tiles.LOW)
        p = formula.exp2(z)
        dc = tiles.product(dy, keys(v_ref, j, masked).T)
        return k, p, formula.unclipped(p, dc), half

    if formula.clip is None:
        y = tiles.load(y_ref, *rows)
        delta = (y.astype("float32") * dy.astype("float32")).sum(axis=1)
    else:

        def summed(j, delta, masked):
            _, p, dp, _ = block(j, masked)
            return delta + (p * dp).sum(axis=1)

        delta = visit(summed, jnp.zeros(Q, "float32"))
    tiles.store(delta_ref, i * Q, Q, length, delta)

    def gradient(j, dq, masked):
        k, p, dp, half = block(j, masked)
        d = formula.scores_gradient(p, dp, delta[:, None], half)
        return dq + tiles.product(d.astype(k.dtype), k)

    dq = visit(gradient, jnp.zeros((Q, q_ref.shape[-1]), "float32"))
    tiles.store(dq_ref, i * Q, Q, length, dq * formula.gradient_scale)


def _dkv_kernel(
    q_ref,
    k_ref,
    v_ref,
    ids_ref,
    lse_ref,
    delta_ref,
    dy_ref,
    dk_ref,
    dv_ref,
    *,
    formula,
    blocks,
    length,
):
    """Gradients by a block of keys and values, over the heads they serve.

    All of it transposed: keys are rows, so that both sums are plain products.
    """
    Q, S = blocks.queries, blocks.keys
    G, H = q_ref.shape[1:]
    # The first keys have the most queries, and are the first programs.
    j = pl.program_id(0)
    rows = (j * S, S, length if length % S else None)
    ragged = length if length % Q else None
    k, v = (tiles.load(ref, *rows) for ref in (k_ref, v_ref))
    s = tiles.positions(j, S)[:, None]
    ids_s = None if ids_ref is None else tiles.load(ids_ref, *rows)[:, None]
    bounds = tiles.query_phases(j, blocks, length, formula.window)

    def step(i, carry, g, masked):
        dk, dv = carry
        within = (i * Q, Q, ragged if masked else None)
        q, dy = (
            tiles.load(ref, *within, (..., g, slice(None)))
            for ref in (q_ref, dy_ref)
        )
        lse, delta = (
            tiles.load(ref, *within, (g, ...))[None]
            for ref in (lse_ref, delta_ref)
        )
        z, half = formula.z(tiles.product(k, q.T), lse)
        if masked:
            t = tiles.positions(i, Q)[None]
            ids_t = None
            if ids_ref is not None:
                ids_t = tiles.load(ids_ref, *within)[None]
            z = jnp.where(formula.visible(t, s, ids_t, ids_s), z, tiles.LOW)
        p = formula.exp2(z)
        dv = dv + tiles.product(formula.clipped(p).astype(dy.dtype), dy)
        dp = formula.unclipped(p, tiles.product(v, dy.T))
        d = formula.scores_gradient(p, dp, delta, half)
        return dk + tiles.product(d.astype(q.dtype), q), dv

    def head(g, carry):
        return tiles.visit(
            bounds,
            lambda i, carry, masked: step(i, carry, g, masked),
            carry,
            everywhere=ids_ref is not None,
        )

    carry = jnp.zeros((S, H), "float32"), jnp.zeros((S, H), "float32")
    dk, dv = lax.fori_loop(0, G, head, carry)
    tiles.store(dk_ref, j * S, S, length, dk * formula.gradient_scale)
    tiles.store(dv_ref, j * S, S, length, dv)


@functools.partial(jax.jit, static_argnames=("formula", "dq", "dkv"))
def backward(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    ids_BT,
    y_BTNH,
    lse_BNT,
    dy_BTNH,
    *,
    formula,
    dq,
    dkv,
):
    """Gradients by queries, keys and values.

    Args:
        y_BTNH: what `forward` gave, or None where there is a clip.
        lse_BNT: what `forward` gave.
        formula: `Formula`.
        dq, dkv: `Blocks` of the two kernels.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    G = N // K
    one = pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n, 0))
    key = pl.BlockSpec(
        (None, T, None, H), lambda i, n, b: (b, 0, lax.div(n, G), 0)
    )
    ids = pl.BlockSpec((None, T), lambda i, n, b: (b, 0))
    ids = None if ids_BT is None else ids
    row = pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))
    how = {"formula": formula, "length": T}

    def run(kernel, name, blocks, **where):
        return pl.pallas_call(
            functools.partial(kernel, blocks=blocks, **how),
            compiler_params=plgpu.CompilerParams(
                num_warps=blocks.warps, num_stages=blocks.stages
            ),
            interpret=formula.interpret,
            name=name,
            **where,
        )

    dq_BTNH, delta_BNT = run(
        _dq_kernel,
        "attention_dq",
        dq,
        grid=(pl.cdiv(T, dq.queries), N, B),
        in_specs=[
            *(one, key, key, ids),
            *(None if y_BTNH is None else one, row, one),
        ],
        out_specs=[one, row],
        out_shape=[
            jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
            jax.ShapeDtypeStruct(lse_BNT.shape, "float32"),
        ],
    )(q_BTNH, k_BTKH, v_BTKH, ids_BT, y_BTNH, lse_BNT, dy_BTNH)
    # From here all query heads of a key head at once.
    one = pl.BlockSpec((None, T, G, H), lambda j, n, b: (b, 0, n, 0))
    key = pl.BlockSpec((None, T, None, H), lambda j, n, b: (b, 0, n, 0))
    row = pl.BlockSpec((None, G, T), lambda j, n, b: (b, n, 0))
    like_keys = jax.ShapeDtypeStruct(k_BTKH.shape, k_BTKH.dtype)
    dk_BTKH, dv_BTKH = run(
        _dkv_kernel,
        "attention_dkv",
        dkv,
        grid=(pl.cdiv(T, dkv.keys), K, B),
        in_specs=[one, key, key, ids, row, row, one],
        out_specs=[key, key],
        out_shape=[like_keys, like_keys],
    )(q_BTNH, k_BTKH, v_BTKH, ids_BT, lse_BNT, delta_BNT, dy_BTNH)
    return dq_BTNH, dk_BTKH, dv_BTKH
