"""What is measured of attention logits, per head.

B batch, T query time, S key time, P queries measured, N heads, K key heads,
H head dimension.
"""

import numpy as np
from keras import ops

from keras_stable import backend
from keras_stable.entropy import MASKED
from keras_stable.masks import visible_between
from keras_stable.masks import visible_keys

# Of an attention core, per head.
HEAD_STATISTICS = ("max_logit", "max_logit_capped", "entropy")
# Sequences, and queries of each, that logits are computed for where no kernel
# gives them: in the full table, and in every step.
SAMPLE, SAMPLE_EACH_STEP = (4, 64), (2, 32)
# The largest float32 whose arctanh is finite.
CLOSE = 1 - 2.0**-24


def _heads_of(z):
    """(B, heads..., T, S) as (B, N, T, S)."""
    shape = ops.shape(z)
    heads = int(np.prod(z.shape[1:-2]))
    return ops.reshape(z, (shape[0], heads, shape[-2], shape[-1]))


def _visible(z, visible):
    """Both as (B, N, T, S), logits in float32."""
    z = ops.cast(ops.stop_gradient(z), "float32")
    if visible is None:
        visible = ops.ones_like(z, dtype="bool")
    visible = ops.broadcast_to(visible, ops.shape(z))
    return _heads_of(z), _heads_of(visible)


def max_logit(z, visible, cap=None, capped=False):
    """The first of `logit_statistics` alone, (N,)."""
    z, visible = _visible(z, visible)
    largest = ops.max(ops.where(visible, z, MASKED), axis=(0, 2, 3))
    if capped and cap is not None:
        return cap * ops.arctanh(ops.clip(largest / cap, -CLOSE, CLOSE))
    return largest


def logit_statistics(z, visible, cap=None, capped=False):
    """Statistics of attention logits, per head.

    ```
    max_logit        = largest visible z
    max_logit_capped = cap * tanh(max_logit / cap), or max_logit
    entropy          = mean over queries of -sum_s p log p / log(visible keys),
                       p the softmax of the (capped) logits, before any clip
    ```

    Entropy is 1 for uniform attention and 0 for a single key. Queries that
    see fewer than two keys have none.

    Args:
        z: tensor (B, heads..., T, S): scaled logits before the mask.
        visible: bool tensor that broadcasts to z, or None for all.
        cap: float or None.
        capped: bool. Whether z is capped already; `max_logit` then inverts
            the cap, which float32 can do up to about 8 times the cap.

    Returns:
        float32 tensor (3, N), in the order of `HEAD_STATISTICS`.
    """
    raw = max_logit(z, visible, cap, capped)
    z, visible = _visible(z, visible)
    if cap is not None and not capped:
        z = cap * ops.tanh(z / cap)
    log_p = ops.log_softmax(ops.where(visible, z, MASKED), axis=-1)
    # Where p is 0, log p is -1e30: the product is 0 and not NaN.
    entropy = -ops.sum(ops.exp(log_p) * log_p, axis=-1)
    keys = ops.sum(ops.cast(visible, "float32"), axis=-1)
    return _summary(raw, entropy, keys, cap)


def _summary(raw, entropy, keys, cap):
    """`logit_statistics` from largest logits (N,), the others (B, N, T)."""
    largest = raw if cap is None else cap * ops.tanh(raw / cap)
    several = ops.cast(keys > 1.5, "float32")
    share = several * entropy / ops.log(ops.maximum(keys, 2.0))
    queries = ops.maximum(ops.sum(several, axis=(0, 2)), 1.0)
    return ops.stack([raw, largest, ops.sum(share, axis=(0, 2)) / queries])


def sample(full, batch, length):
    """Which queries are measured: all, if they are few.

    Returns:
        `(rows, positions, note)`: a slice of sequences, one of queries, evenly
        spaced up to the last, and "exact" or what it is.
    """
    rows, each = SAMPLE if full else SAMPLE_EACH_STEP
    known = batch is not None and isinstance(length, int)
    if known and batch * length <= rows * each:
        return slice(None), slice(None), "exact"
    # Unknown while it is traced (TensorFlow): the last ones.
    stride = max(length // each, 1) if isinstance(length, int) else 1
    note = f"{each} queries of {rows} sequences"
    # From the last backwards, so that the longest rows are among them.
    positions = slice(-1 - stride * (each - 1), None, stride)
    if isinstance(length, int) and length <= each:
        positions = slice(None)
    return slice(0, rows), positions, note


def _logits_of(q_BTNH, k_BSKH, rows, positions, scale):
    """Logits (B, N, P, S) of sampled queries."""
    q, k = (ops.stop_gradient(x) for x in (q_BTNH, k_BSKH))
    q, k = q[rows, positions], k[rows]
    q, k = (ops.cast(x, "float32") for x in (q, k))
    if k.shape[2] != q.shape[2]:
        k = ops.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return scale * ops.einsum("bpnh,bsnh->bnps", q, k)


@backend.fused
def _of_kernel(full, q_BTNH, k_BSKH, mask, scale, is_causal, cap):
    length = ops.shape(q_BTNH)[1]
    rows, positions, _ = sample(full, q_BTNH.shape[0], length)
    at = ops.arange(length, dtype="int32")[positions]
    z = _logits_of(q_BTNH, k_BSKH, rows, positions, scale)
    visible = None
    if mask is not None:
        visible = ops.cast(mask[rows][:, :, positions], "bool")
    if is_causal:
        keys = ops.arange(ops.shape(k_BSKH)[1], dtype="int32")
        earlier = (keys[None] <= at[:, None])[None, None]
        visible = earlier if visible is None else earlier & visible
    return (logit_statistics if full else max_logit)(z, visible, cap)


def of_kernel(full, q_BTNH, k_BSKH, mask, scale, is_causal, cap):
    """Statistics of logits that a fused kernel keeps to itself, of a sample.

    Args:
        full: bool. Whether all statistics are wanted, or the largest logit.
        q_BTNH, k_BSKH: tensors; K divides N.
        mask: bool tensor (B or 1, N or 1, T, S) or None.
        scale: float.
        is_causal: bool. Whether later keys are invisible.
        cap: float or None.

    Returns:
        `(value, note)`: float32 tensor (3, N) or (N,); "exact" or the sample.
    """
    q_BTNH, k_BSKH = (ops.convert_to_tensor(x) for x in (q_BTNH, k_BSKH))
    note = sample(full, q_BTNH.shape[0], ops.shape(q_BTNH)[1])[-1]
    value = _of_kernel(full, q_BTNH, k_BSKH, mask, scale, is_causal, cap)
    return value, note


def of_formula(full, z, visible, cap, capped):
    """Statistics of logits that a formula has computed: exact, if `full`.

    Args:
        z: tensor (B, heads..., T, S); see `logit_statistics`, as for `cap`
            and `capped`.
        visible: bool tensor that broadcasts to z, or None.

    Returns:
        `(value, note)`, as of `of_kernel`.
    """
    if full:
        return logit_statistics(z, visible, cap, capped), "exact"
    rows, positions, note = sample(False, z.shape[0], ops.shape(z)[-2])
    z = z[rows][..., positions, :]
    if visible is not None:
        visible = visible[rows]
        if visible.shape[-2] != 1:
            visible = visible[..., positions, :]
    return max_logit(z, visible, cap, capped), note


def of_rows(
    full, max_BNT, entropy_BNT, segment_ids=None, sliding_window=None, cap=None
):
    """Statistics of logits of which rows were measured: exact.

    Args:
        full: bool. Whether all statistics are wanted, or the largest logit.
        max_BNT: float32 tensor. The largest visible logit, before any cap.
        entropy_BNT: float32 tensor, in nats; see `entropy.row_entropy`.
        segment_ids, sliding_window: as of `attend`, which tell how many keys
            each query saw.
        cap: float or None.

    Returns:
        `(value, note)`, as of `of_kernel`.
    """
    max_BNT, entropy_BNT = (
        ops.stop_gradient(x) for x in (max_BNT, entropy_BNT)
    )
    raw = ops.max(max_BNT, axis=(0, 2))
    if not full:
        return raw, "exact"
    keys = visible_keys(max_BNT.shape[-1], segment_ids, sliding_window)
    keys = ops.broadcast_to(keys[:, None], ops.shape(entropy_BNT))
    return _summary(raw, entropy_BNT, keys, cap), "exact"


def of_queries(
    q_BTNH, k_BTKH, scale, segment_ids=None, sliding_window=None
):
    """The largest logit of the queries that are looked at in every step.

    As `of_kernel`, without a mask of all pairs.

    Args:
        q_BTNH, k_BTKH: tensors; K divides N. T is known.
        scale: float.
        segment_ids, sliding_window: as of `attend`.

    Returns:
        `(value, note)`: float32 tensor (N,); "exact" or the sample.
    """
    length = q_BTNH.shape[1]
    rows, positions, note = sample(False, q_BTNH.shape[0], length)
    q_BTNH, k_BTKH = (ops.convert_to_tensor(x) for x in (q_BTNH, k_BTKH))
    s, ids = ops.arange(length, dtype="int32"), ()
    if segment_ids is not None:
        some = ops.convert_to_tensor(segment_ids)[rows]
        ids = some[:, positions], some
    mask = visible_between(s[positions], s, sliding_window, *ids)
    z = _logits_of(q_BTNH, k_BTKH, rows, positions, scale)
    return max_logit(z, mask[:, None]), note
