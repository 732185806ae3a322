"""Attention on TPUs, by JAX's Splash kernels.

B batch, T time, N query heads, K key and value heads, H head dimension.
"""

import math

import jax
from jax import numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from keras_stable.backend.jax_mesh import on_each_device

# Lanes of a TPU's registers, of which lengths must be multiples; and the most
# queries and keys of a block, as in MaxText.
LANES, BLOCK = 128, 512


def _kernel(heads, length, cap, sliding_window, interpret):
    """The kernel of all heads of one sequence, with its gradient."""
    shape = (length, length)
    mask = masks.CausalMask(shape)
    if sliding_window is not None:
        # A query sees itself and the keys before it.
        mask = masks.LocalMask(shape, (sliding_window - 1, 0), 0)
    block = math.gcd(length, BLOCK)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv "
    names += "block_kv_dkv_compute block_q_dq block_kv_dq"
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(names.split(), block)),
        attn_logits_soft_cap=cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _pad(x, axis, multiple):
    """`x` with zeros at the end of an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def splash(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    scale,
    cap=None,
    segment_ids=None,
    sliding_window=None,
    interpret=False,
):
    """Causal attention by the formula of `attend`, in one kernel.

    ```
    z = scale * q k^T                       float32
    z = cap * tanh(z / cap)                 if there is a cap
    y = softmax(where(visible, z, -1e38)) v
    ```

    Lengths are padded to a multiple of 128: no query sees the keys after it.
    Under a distribution each device computes its sequences (mesh axis
    `"batch"`) and heads (`"model"`), where the axis divides them.

    The kernel has no scale: queries are multiplied by it, and rounded to
    their dtype, which is exact where the scale is a power of two.

    It has no statistics either. Of what it computes, JAX (0.10 and 0.11) gives
    away the log-sum-exp alone, of capped logits, and raises where that is to be
    differentiated through. It bounds the largest logit by log(S), no more; that
    one (the limit of lse(b z) / b) or the entropy (by keys for values) would
    each take another forward pass. So they are of some of the queries, and
    labelled so.

    Args:
        q_BTNH, k_BTKH, v_BTKH: arrays, K divides N.
        scale: float.
        cap: float or None.
        segment_ids: int array (B, T) or None.
        sliding_window: int or None.
        interpret: bool. Whether to run the kernel without a TPU, slowly.

    Returns:
        Array (B, T, N, H), of the dtype of `q_BTNH`.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    dtype = q_BTNH.dtype
    q_BTNH = (q_BTNH.astype("float32") * scale).astype(dtype)
    tensors = [q_BTNH, k_BTKH.astype(dtype), v_BTKH.astype(dtype)]
    tensors = [_pad(x, 1, LANES).swapaxes(1, 2) for x in tensors]
    ids = None
    if segment_ids is not None:
        ids = _pad(segment_ids.astype("int32"), 1, LANES)

    def local(q_BNTH, k_BKTH, v_BKTH, ids_BT):
        _, heads, length, _ = q_BNTH.shape
        run = _kernel(heads, length, cap, sliding_window, interpret)
        if ids_BT is None:
            return jax.vmap(run)(q_BNTH, k_BKTH, v_BKTH)
        ids = kernels.SegmentIds(q=ids_BT, kv=ids_BT)
        return jax.vmap(run)(q_BNTH, k_BKTH, v_BKTH, ids)

    local = on_each_device(
        local,
        ("BNTH", "BNTH", "BNTH", None if ids is None else "BT"),
        "BNTH",
        batch=B,
        heads=(N, K),
    )
    y_BNTH = local(*tensors, ids)
    return y_BNTH.swapaxes(1, 2)[:, :T]
