"""Attention on GPUs that caps, clips and measures in one pass: Pallas kernels.

B batch, T time, N query heads, K key and value heads, H head dimension.
"""

import functools

import jax
import numpy as np
from jax import numpy as jnp

from keras_stable.backend import jax_attention_tiles as tiles
from keras_stable.backend import jax_mesh
from keras_stable.backend.jax_attention_backward import backward
from keras_stable.backend.jax_attention_forward import forward

# Of the heads that kernels have: powers of two, as all that they load. Others
# get zeros, which change no product.
HEAD_SIZES = (16, 32, 64, 128, 256)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q_BTNH, k_BTKH, v_BTKH, ids_BT, formula, measured, blocks):
    return _attend_forward(
        q_BTNH, k_BTKH, v_BTKH, ids_BT, formula, measured, blocks
    )[0]


def _attend_forward(q_BTNH, k_BTKH, v_BTKH, ids_BT, formula, measured, blocks):
    tensors = q_BTNH, k_BTKH, v_BTKH, ids_BT
    y_BTNH, lse_BNT, *rows = forward(
        *tensors, formula=formula, measured=measured, blocks=blocks[0]
    )
    # Where there is a clip, y does not tell delta.
    kept_BTNH = y_BTNH if formula.clip is None else None
    return (y_BTNH, tuple(rows)), (*tensors, kept_BTNH, lse_BNT)


def _attend_backward(formula, measured, blocks, kept, gradients):
    dy_BTNH, _ = gradients
    _, dq, dkv = blocks
    found = backward(*kept, dy_BTNH, formula=formula, dq=dq, dkv=dkv)
    ids_BT = kept[3]
    if ids_BT is None:
        return *found, None
    return *found, np.zeros(ids_BT.shape, jax.dtypes.float0)


_attend.defvjp(_attend_forward, _attend_backward)


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
    *,
    blocks=None,
    interpret=False,
):
    """Causal attention by the formula of `attend`, without (T, T) arrays.

    ```
    raw = scale * q k^T                     float32
    z   = cap * tanh(raw / cap)             or raw
    p   = softmax(z over visible keys)      float32
    c   = clip((zeta - gamma) p + gamma, 0, 1)      or p
    y   = c v                               c of v's dtype, float32 sums
    ```

    The gradient is that of this formula, and one run's bits are another's.
    The tanh errs by at most 1e-6, logits so by 1e-6 times the cap. Products
    of float32 inputs have the precision that
    `jax.config.jax_default_matmul_precision` names, as elsewhere in JAX.

    A logit of 1e4 is rounded by up to 5e-4, as float32 has it, and so is the
    normaliser that the gradient is of: p by 1e-3 of itself, about what 16 bits
    round. With the largest logit and the total kept apart it was the same, for
    the logit's own rounding is left.

    Under a distribution each device computes its sequences (mesh axis
    `"batch"`) and heads (`"model"`), where the axis divides them.

    After FlashAttention-2 (arXiv 2307.08691), which has neither cap nor clip.

    Args:
        q_BTNH, k_BTKH, v_BTKH: arrays, K divides N; H is at most 256.
        scale: float.
        cap: float or None.
        clip: `(gamma, zeta)` of floats, gamma <= 0, or None.
        segment_ids: int array (B, T) or None: tokens see their own document.
        sliding_window: int or None: how many keys a query sees at most.
        statistics: bool. Whether to measure the logits of every row.
        blocks: `{"forward" or "dq" or "dkv": Blocks}` in place of those that
            `jax_attention_tiles.blocks_of` gives for the card.
        interpret: bool. Whether to run the kernels without a GPU, slowly.

    Returns:
        `(y_BTNH, rows)`: array of the dtype of `q_BTNH`; None, or if
        `statistics` two float32 arrays (B, N, T) without gradient: the largest
        visible raw, and the entropy of p in nats.

    Raises:
        ValueError: for a head size, a number of heads or a clip it has not.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    if H > HEAD_SIZES[-1]:
        raise ValueError(
            f"The kernels have heads up to {HEAD_SIZES[-1]}. Received: {H}"
        )
    if N % K:
        raise ValueError(
            "Key heads must divide query heads. Received: "
            f"{N} query heads, {K} key heads"
        )
    if clip is not None and clip[0] > 0:
        raise ValueError(
            "A clip's gamma must not be positive: keys that a query does not "
            f"see would be seen. Received: (gamma, zeta) = {clip}"
        )
    dtype = q_BTNH.dtype
    size = min(size for size in HEAD_SIZES if size >= H)
    q_BTNH, k_BTKH, v_BTKH = (
        jnp.pad(x.astype(dtype), [(0, 0)] * 3 + [(0, size - H)])
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    if scale < 0:
        # The kernels take the largest product for the largest logit.
        q_BTNH, scale = -q_BTNH, -scale
    formula = tiles.Formula(
        scale=float(scale),
        cap=None if cap is None else float(cap),
        clip=None if clip is None else tuple(float(x) for x in clip),
        window=None if sliding_window is None else int(sliding_window),
        interpret=interpret,
    )
    card = jax_mesh.device_kind()
    blocks = {
        name: tiles.blocks_of(name, T, size, dtype, card)
        for name in ("forward", "dq", "dkv")
    } | (blocks or {})
    blocks = blocks["forward"], blocks["dq"], blocks["dkv"]
    ids_BT = None if segment_ids is None else segment_ids.astype("int32")

    def local(q_BTNH, k_BTKH, v_BTKH, ids_BT):
        return _attend(
            q_BTNH, k_BTKH, v_BTKH, ids_BT, formula, statistics, blocks
        )

    local = jax_mesh.on_each_device(
        local,
        ("BTNH", "BTNH", "BTNH", None if ids_BT is None else "BT"),
        ("BTNH", ("BNT", "BNT") if statistics else ()),
        batch=B,
        heads=(N, K),
    )
    y_BTNH, rows = local(q_BTNH, k_BTKH, v_BTKH, ids_BT)
    return y_BTNH[..., :H], rows if statistics else None
