"""The forward kernel of `jax_attention`.

B batch, T time, N query heads, K key heads, H head dimension; Q queries of a
block, S keys of a block.
"""

import functools
import math

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_stable.backend import jax_attention_tiles as tiles


def _kernel(
    q_ref, k_ref, v_ref, ids_ref, *outputs, formula, blocks, length, measured
):
    """Outputs of a block of queries, in one pass over the keys they see.

    Sums are kept relative to the largest logit so far:

    ```
    total   = sum_s 2^(z - max)
    entropy = sum_s 2^(z - max) (z - max)      nats: ln 2 (log2 total
    mean    = sum_s 2^(z - max) v                          - entropy / total)
    ```

    A clip needs the normaliser first: then a second pass sums `clip(p) v`.
    """
    y_ref, lse_ref, *measured_refs = outputs
    Q, S = blocks.queries, blocks.keys
    # The longest rows first: they would be waited for at the end.
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    rows = (i * Q, Q, length if length % Q else None)
    keys_length = length if length % S else None
    q = tiles.load(q_ref, *rows)
    t = tiles.positions(i, Q)[:, None]
    ids_t = None if ids_ref is None else tiles.load(ids_ref, *rows)[:, None]
    bounds = tiles.key_phases(i, blocks, length, formula.window)
    visit = functools.partial(
        tiles.visit, bounds, everywhere=ids_ref is not None
    )

    def keys(ref, j, masked):
        return tiles.load(ref, j * S, S, keys_length if masked else None)

    def scores(j, masked):
        """Scores of a block of keys, and which are visible or None."""
        found = tiles.product(q, keys(k_ref, j, masked).T)
        if not masked:
            return found, None
        s = tiles.positions(j, S)[None]
        ids_s = None
        if ids_ref is not None:
            ids_s = keys(ids_ref, j, True)[None]
        return found, formula.visible(t, s, ids_t, ids_s)

    def only(visible, x):
        return x if visible is None else jnp.where(visible, x, tiles.LOW)

    def online(j, carry, masked):
        before, total, *more = carry
        found, visible = scores(j, masked)
        # The cap increases: the largest score is of the largest logit.
        largest = only(visible, found).max(axis=1)
        # Nothing but `maximum` may be subtracted from `before`: a product
        # would not be rounded, and what does not change would shrink.
        now = jnp.maximum(before, formula.z(largest, 0.0)[0])
        z = only(visible, formula.z(found, now[:, None])[0])
        e = formula.exp2(z)
        shrink = formula.exp2(before - now)
        carry = [now, total * shrink + e.sum(axis=1)]
        if measured:
            carry.append(jnp.maximum(more.pop(0), largest))
            entropy = more.pop(0) + (before - now) * total
            carry.append(entropy * shrink + (e * z).sum(axis=1))
        if formula.clip is None:
            v = keys(v_ref, j, masked)
            mean = more.pop(0) * shrink[:, None]
            carry.append(mean + tiles.product(e.astype(v.dtype), v))
        return tuple(carry)

    H = q_ref.shape[-1]
    zeros = jnp.zeros(Q, "float32")
    carry = [zeros + tiles.LOW, zeros]
    if measured:
        carry += [zeros + tiles.LOW, zeros]
    if formula.clip is None:
        carry.append(jnp.zeros((Q, H), "float32"))
    shift, total, *more = visit(online, tuple(carry))
    lse = shift + jnp.log2(total)
    tiles.store(lse_ref, i * Q, Q, length, lse)
    if measured:
        largest, entropy = more.pop(0), more.pop(0)
        entropy = math.log(2) * (jnp.log2(total) - entropy / total)
        # The maximum passes over NaN; sums do not.
        largest = jnp.where(total == total, largest * formula.scale, total)
        for ref, value in zip(measured_refs, (largest, entropy)):
            tiles.store(ref, i * Q, Q, length, value)

    def clipped(j, y, masked):
        found, visible = scores(j, masked)
        z = only(visible, formula.z(found, lse[:, None])[0])
        v = keys(v_ref, j, masked)
        c = formula.clipped(formula.exp2(z))
        return y + tiles.product(c.astype(v.dtype), v)

    if formula.clip is None:
        y = more.pop(0) * (1 / total)[:, None]
    else:
        y = visit(clipped, jnp.zeros((Q, H), "float32"))
    tiles.store(y_ref, i * Q, Q, length, y)


@functools.partial(jax.jit, static_argnames=("formula", "measured", "blocks"))
def forward(q_BTNH, k_BTKH, v_BTKH, ids_BT, *, formula, measured, blocks):
    """Outputs, base-2 normalisers (B, N, T), and two statistics or none.

    Args:
        formula: `Formula`.
        measured: bool. Whether to compute statistics of the rows.
        blocks: `Blocks`.

    Returns:
        List of arrays: y_BTNH, lse_BNT, and if measured max_BNT, entropy_BNT.
    """
    B, T, N, H = q_BTNH.shape
    G = N // k_BTKH.shape[2]
    one = pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n, 0))
    key = pl.BlockSpec(
        (None, T, None, H), lambda i, n, b: (b, 0, lax.div(n, G), 0)
    )
    ids = pl.BlockSpec((None, T), lambda i, n, b: (b, 0))
    row = pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))
    count = 3 if measured else 1
    rows = jax.ShapeDtypeStruct((B, N, T), "float32")
    return pl.pallas_call(
        functools.partial(
            _kernel,
            formula=formula,
            blocks=blocks,
            length=T,
            measured=measured,
        ),
        grid=(pl.cdiv(T, blocks.queries), N, B),
        in_specs=[one, key, key, None if ids_BT is None else ids],
        out_specs=[one, *[row] * count],
        out_shape=[
            jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
            *[rows] * count,
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=blocks.warps, num_stages=blocks.stages
        ),
        interpret=formula.interpret,
        name="attention_forward",
    )(q_BTNH, k_BTKH, v_BTKH, ids_BT)
