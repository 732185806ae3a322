"""Attention from queries, keys and values: the formula, and its fast paths.

B batch, T query time, S key time, N query heads, K key and value heads,
G = N / K queries a key, H head dimension.
"""

import keras
from keras import ops

from keras_stable import backend
from keras_stable import telemetry
from keras_stable.choices import Softmax
from keras_stable.chunked_attention import attend_chunked
from keras_stable.entropy import MASKED
from keras_stable.masks import visible
from keras_stable.randomness import dropout

# Logits (B, N, T, S) and length from which on chunks take over. Measured on a
# CPU: below they are as fast as all at once, at twice the length several times
# as fast, on all backends.
LOGITS, LENGTH = 2**22, 512
# Rows of a batch where they are not known when the step is traced.
ROWS = 16


def soft_cap(x, cap):
    """`cap * tanh(x / cap)`: the identity near zero, never beyond +-cap.

    Source: Gemma 2 (arXiv 2408.00118). The kernels of TPUs compute the same.
    Not the argument `attn_logits_soft_cap` of `ops.dot_product_attention`,
    which raises off TPU and documents another formula.
    """
    return cap * ops.tanh(x / cap)


def _is_large(q_BTNH):
    """Whether chunks are faster than all logits at once, or the only way.

    Not where the length is not known while a program is traced.
    """
    B, T, N, _ = q_BTNH.shape
    if not isinstance(T, int) or T < LENGTH:
        return False
    rows = B if isinstance(B, int) else ROWS
    return rows * N * T * T > LOGITS


def _fused(
    q_BTNH, k_BSKH, v_BSKH, scale, cap, positions, segment_ids, sliding_window
):
    """`attend` by a kernel, or None where none can do it."""
    which = (positions, segment_ids, sliding_window)

    def where():
        if all(part is None for part in which):
            return {"mask": None, "is_causal": True}
        mask = visible(ops.shape(k_BSKH)[1], *which)
        return {"mask": mask[:, None], "is_causal": False}

    if positions is None:
        y_BTNH = backend.attention(
            *(q_BTNH, k_BSKH, v_BSKH),
            scale,
            cap=cap,
            segment_ids=segment_ids,
            sliding_window=sliding_window,
        )
        if y_BTNH is not None:
            if (recorder := telemetry.recorder()) is not None:
                # As it is where the kernel is Keras's.
                recorder.dot_product(
                    q_BTNH, k_BSKH, scale=scale, cap=cap, **where()
                )
            return y_BTNH
    if cap is not None:
        return None
    masked = any(part is not None for part in which)
    if positions is None and _is_large(q_BTNH):
        if not backend.fuses_attention(q_BTNH, masked):
            return None
    if k_BSKH.shape[2] == 1:
        # Keras on TensorFlow repeats two heads and more, but not one.
        k_BSKH, v_BSKH = (
            ops.repeat(x, q_BTNH.shape[2], axis=2) for x in (k_BSKH, v_BSKH)
        )
    return ops.dot_product_attention(
        *(q_BTNH, k_BSKH, v_BSKH),
        scale=scale,
        flash_attention=backend.flash_attention(),
        **where(),
    )


def _gamma(clip, length):
    if clip.gamma is not None:
        return clip.gamma
    if isinstance(length, int):
        return -clip.alpha / length
    return -clip.alpha / ops.cast(length, "float32")


def _chunked(
    q_BTNH, k_BTKH, v_BTKH, scale, cap, clip, segment_ids, sliding_window
):
    """`attend_chunked`, measured where something records."""
    recorder, where = telemetry.recorder(), (segment_ids, sliding_window)
    full = recorder is not None and recorder.full
    y_BTNH, rows = attend_chunked(
        *(q_BTNH, k_BTKH, v_BTKH, scale, cap, clip, *where), statistics=full
    )
    if full:
        recorder.rows(*rows, *where, cap)
    elif recorder is not None:
        # All rows would need another product of queries and keys.
        recorder.queries(q_BTNH, k_BTKH, scale, *where)
    return y_BTNH


def attend(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    *,
    scale,
    softmax=Softmax(),
    positions=None,
    segment_ids=None,
    sliding_window=None,
    penalize=None,
    dropout_rate=0.0,
    seed=None,
):
    """Attention from queries, keys and values, by the formula.

    ```
    z = temperature * scale * q k^T       float32
    z = cap * tanh(z / cap)               if capped; before the mask
    p = softmax(where(visible, z, -inf))  float32
    p = clip((zeta - gamma) p + gamma, 0, 1)   if clipped
    y = dropout(p) v
    ```

    Without `positions`, `penalize` and `seed` many logits are never in memory
    at a time: where no kernel does that, `attend_chunked` does.

    Args:
        q_BTNH, k_BSKH, v_BSKH: tensors, K divides N.
        scale: float.
        softmax: `Softmax`: temperature, cap, clip.
        positions: int tensor (T,), which of the S keys' positions the queries
            have. Defaults to all: T = S.
        segment_ids: int tensor (B, T) or None: tokens see their own document.
        sliding_window: int or None: how many keys a query sees at most.
        penalize: function of the logits z (B, K, G, T, S) and of the bool mask
            (1 or B, 1, 1, T, S), or None.
        dropout_rate, seed: dropout on probabilities, where `seed` is given.

    Returns:
        Tensor of the shape and dtype of `q_BTNH`. With `penalize` a tuple of
        it and of what `penalize` returned.
    """
    scale = scale * softmax.temperature
    length = ops.shape(k_BSKH)[1]
    which = (positions, segment_ids, sliding_window)
    exact = softmax.logits_dtype == "float32" and penalize is None
    exact = exact and seed is None
    # JAX's path has no float16 products with float32 sums on CPU, and GPUs
    # that want float16 (T4) have no fused kernel in it.
    fused = keras.backend.standardize_dtype(q_BTNH.dtype) != "float16"
    if exact and fused and softmax.clip is None:
        # Nothing but a cap changes logits or probabilities.
        y_BTNH = _fused(q_BTNH, k_BSKH, v_BSKH, scale, softmax.cap, *which)
        if y_BTNH is not None:
            return y_BTNH
    clip = None
    if softmax.clip is not None:
        clip = (_gamma(softmax.clip, length), softmax.clip.zeta)
    if exact and positions is None and _is_large(q_BTNH):
        return _chunked(
            *(q_BTNH, k_BSKH, v_BSKH, scale, softmax.cap, clip),
            segment_ids,
            sliding_window,
        )

    B, T, N, H = ops.shape(q_BTNH)
    K = k_BSKH.shape[2]
    mask = visible(length, *which)[:, None, None]
    # Products of bfloat16 numbers are exact in float32; a bfloat16 logit near
    # 300 would be off by one nat.
    q_BTKGH = ops.reshape(q_BTNH, (B, T, K, N // K, H))
    q_BTKGH, k_BSKH = (ops.cast(x, "float32") for x in (q_BTKGH, k_BSKH))

    def product(q_BTKGH, k_BSKH):
        return scale * ops.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH)

    raw_BKGTS = product(q_BTKGH, k_BSKH)
    if (recorder := telemetry.recorder()) is not None:
        seen = backend.apart(raw_BKGTS, product, q_BTKGH, k_BSKH)
        recorder.logits(seen, mask, softmax.cap)
    z = ops.cast(ops.cast(raw_BKGTS, softmax.logits_dtype), "float32")
    if softmax.cap is not None:
        z = soft_cap(z, softmax.cap)
    penalty = None if penalize is None else penalize(z, mask)
    # Not -inf: its gradient through a fully masked row would be NaN.
    p = ops.softmax(ops.where(mask, z, MASKED), axis=-1)
    if clip is not None:
        gamma, zeta = clip
        p = ops.clip((zeta - gamma) * p + gamma, 0.0, 1.0)
    p = ops.cast(dropout(p, dropout_rate, seed), v_BSKH.dtype)
    y_BTKGH = ops.einsum("bkgts,bskh->btkgh", p, v_BSKH)
    y_BTNH = ops.reshape(y_BTKGH, (B, T, N, H))
    return y_BTNH if penalize is None else (y_BTNH, penalty)
