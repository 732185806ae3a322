"""Attention from queries, keys and values: the formula, and its fast paths.

B batch, T query time, S key time, N query heads, K key and value heads,
G = N / K queries a key, H head dimension.
"""

import dataclasses
from collections.abc import Callable

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


def _is_large(query):
    """Whether chunks are faster than all logits at once, or the only way.

    Not where the length is not known while a program is traced.
    """
    B, T, N, _ = query.shape
    if not isinstance(T, int) or T < LENGTH:
        return False
    rows = B if isinstance(B, int) else ROWS
    return rows * N * T * T > LOGITS


@dataclasses.dataclass(frozen=True)
class Path:
    """How attention is computed; the formula is the same.

    Attributes:
        name: `"kernel"`, one of ours; `"keras"`, by
            `ops.dot_product_attention` and what it chooses; `"chunked"`, see
            `attend_chunked`; `"formula"`, with all logits in memory.
        why: str.
        kernel: function, of `"kernel"`.
    """

    name: str
    why: str
    kernel: Callable | None = dataclasses.field(default=None, repr=False)


def choose(
    query,
    softmax,
    cached=False,
    masked=False,
    penalized=False,
    dropout=False,
):
    """The `Path` of `attend`.

    Args:
        query: anything with the shape (B, T, N, H) and dtype of queries.
        softmax: `Softmax`.
        cached: whether keys are of other positions than queries.
        masked: whether a mask has more than the past.
        penalized: whether all logits are wanted.
        dropout: whether probabilities are dropped.
    """
    for needed, why in (
        (penalized, "the penalty on entropy needs all logits"),
        (dropout, "dropout is of probabilities"),
        (softmax.logits_dtype != "float32", "logits are rounded to 16 bits"),
    ):
        if needed:
            return Path("formula", why)
    cap, clip = softmax.cap, softmax.clip
    if not cached:
        found = backend.attention_kernel(query, cap, clip)
        if found is not None:
            return Path("kernel", f"{found[0]}, which has all of it", found[1])
    large = not cached and _is_large(query)
    # JAX's path has no float16 products with float32 sums on CPU, and GPUs
    # that want float16 (T4) have no fused kernel in it.
    float16 = keras.backend.standardize_dtype(query.dtype) == "float16"
    if cap is None and clip is None and not float16:
        if not large or backend.fuses_attention(query, masked):
            return Path("keras", "nothing bounds the logits")
    if large:
        return Path("chunked", "no kernel, and many logits")
    return Path("formula", "no kernel, and few logits")


def _gamma(clip, length):
    if clip.gamma is not None:
        return clip.gamma
    if isinstance(length, int):
        return -clip.alpha / length
    return -clip.alpha / ops.cast(length, "float32")


def _by_keras(q_BTNH, k_BSKH, v_BSKH, scale, where):
    if k_BSKH.shape[2] == 1:
        # Keras on TensorFlow repeats two heads and more, but not one.
        k_BSKH, v_BSKH = (
            ops.repeat(x, q_BTNH.shape[2], axis=2) for x in (k_BSKH, v_BSKH)
        )
    return ops.dot_product_attention(
        *(q_BTNH, k_BSKH, v_BSKH),
        scale=scale,
        flash_attention=backend.flash_attention(),
        **where,
    )


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
    scale, cap = scale * softmax.temperature, softmax.cap
    length = ops.shape(k_BSKH)[1]
    which = (positions, segment_ids, sliding_window)
    path = choose(
        q_BTNH,
        softmax,
        cached=positions is not None,
        masked=any(part is not None for part in which),
        penalized=penalize is not None,
        dropout=seed is not None,
    )

    def where():
        if all(part is None for part in which):
            return {"mask": None, "is_causal": True}
        return {"mask": visible(length, *which)[:, None], "is_causal": False}

    if path.name == "keras":
        return _by_keras(q_BTNH, k_BSKH, v_BSKH, scale, where())
    clip = None
    if softmax.clip is not None:
        clip = (_gamma(softmax.clip, length), softmax.clip.zeta)
    recorder = telemetry.recorder()
    if path.name in ("kernel", "chunked"):
        full = recorder is not None and recorder.full
        # In a light step chunks would need another product for them.
        measured = full or (recorder is not None and path.name == "kernel")
        y_BTNH, rows = (path.kernel or attend_chunked)(
            *(q_BTNH, k_BSKH, v_BSKH, scale),
            cap=cap,
            clip=clip,
            segment_ids=segment_ids,
            sliding_window=sliding_window,
            statistics=measured,
        )
        if rows is not None:
            recorder.rows(*rows, segment_ids, sliding_window, cap)
        elif full:
            # As it is where the kernel is Keras's.
            recorder.dot_product(
                q_BTNH, k_BSKH, scale=scale, cap=cap, **where()
            )
        elif recorder is not None:
            recorder.queries(q_BTNH, k_BSKH, scale, segment_ids, sliding_window)
        return y_BTNH

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
    if recorder is not None:
        seen = backend.apart(raw_BKGTS, product, q_BTKGH, k_BSKH)
        recorder.logits(seen, mask, cap)
    z = ops.cast(ops.cast(raw_BKGTS, softmax.logits_dtype), "float32")
    if cap is not None:
        z = soft_cap(z, cap)
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
