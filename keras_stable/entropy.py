"""The penalty on the entropy of attention, from its logits.

B batch, T query time, S key time, N query heads, K key and value heads,
G = N / K queries a key.
"""

import keras
from keras import ops

# What theta starts at in every head. The published value is unknown: neither
# paper nor code has it. This is the middle of its range, a choice of ours;
# Figure 6 of arXiv 2501.03489 shows 0.2 to 0.52 after training.
THETA_INIT = 0.5
# Not -inf, whose difference from itself is NaN in a row that sees no key.
MASKED = -1e30


def row_entropy(z_BKGTS, mask):
    """Entropy of the softmax over visible keys, in nats: (B, K, G, T).

    ```
    H = logsumexp(z) - sum_s p_s z_s
    ```

    of z less its largest visible value. That leaves H as it is, and neither
    term negative or large: no digits cancel. 0 for a query that sees no key.
    """
    z = ops.where(mask, z_BKGTS, MASKED)
    z = z - ops.stop_gradient(ops.max(z, axis=-1, keepdims=True))
    visible = ops.cast(mask, "float32")
    weight = visible * ops.exp(z)
    # A sum of 0 becomes 1. Not by `maximum`: it halves the gradient where its
    # arguments are equal, as for a row with all its weight on one key.
    total = ops.sum(weight, axis=-1) + 1.0 - ops.max(visible, axis=-1)
    return ops.log(total) - ops.sum(weight * z, axis=-1) / total


def entropy_penalty(z_BKGTS, mask, entropy, theta=None, segment_ids=None):
    """How far attention is from the entropy wanted; a mean, without `weight`.

    ```
    H   = -sum_s p_s log p_s,  p = softmax over the n visible keys
    d   = H - theta log n
    row = relu(floor * log n - H)^2                    given `floor`
          d^2 where |d| > tolerance * log n, else 0    given `tolerance`
    penalty = mean of row over heads and queries that see n > 1 keys
    ```

    Uniform attention has H = log n, attention to a single key H = 0. A query
    that sees one key has no choice and does not count; nor does padding. The
    penalty is 0 if no query counts.

    The gradient with respect to z is `-p (log p + H)` times that of the row:
    it vanishes, about as p does, as a row collapses. Once all other weights
    round to 0 in float32 (logits about 104 below the largest) it is exactly
    0: the penalty keeps attention from collapsing, but does not undo it.

    The form with `tolerance` is published, with these differences:

    | | here | published code |
    |---|---|---|
    | over sequences and queries | mean | sum |
    | largest entropy | log n, of visible keys | log T, for all queries |
    | queries with one key, padding | left out | included |
    | H | as above | -sum p log(p + 1e-9) |

    Its default weight of 1e-5 is therefore about 1e-5 * B * T here. Its
    `tolerance` is 0.2 (0.1 in the listing of the paper's appendix). The
    paper's Algorithm 1 takes the mean of H over queries before d; its code,
    like this, does not. Theta is there, as here, one number for every head of
    every layer (the code's example for another model has one layer's for all).

    Args:
        z_BKGTS: float32 tensor. Scaled and capped logits, not yet masked.
        mask: bool tensor that broadcasts to z: the visible keys.
        entropy: `Entropy`. Its `weight` is not used.
        theta: tensor (N,), N = K G, in the order of heads: head k G + g is
            at (k, g). Needed with `tolerance`; starts at `THETA_INIT`.
        segment_ids: int tensor (B, T) or None. Queries of segment 0 are
            padding.

    Returns:
        float32 scalar.

    Raises:
        ValueError: if z is not float32; if theta is missing, not of shape
            (N,), or given with `floor`, which has none.

    Example:

    >>> z = keras.random.normal((2, 4, 1, 8, 8))
    >>> causal = np.tril(np.ones((8, 8), "bool"))
    >>> entropy_penalty(z, causal, Entropy(weight=1e-2, floor=0.5))

    Reference:
        [Jha & Reagen, 2025](https://arxiv.org/abs/2501.03489), code:
        github.com/Nandan91/entropy-guided-attention-llm.
    """
    _check(z_BKGTS, entropy, theta)
    keys = ops.sum(ops.cast(mask, "float32"), axis=-1)
    log_n = ops.log(ops.maximum(keys, 1.0))
    H = row_entropy(z_BKGTS, mask)
    if entropy.floor is not None:
        row = ops.square(ops.relu(entropy.floor * log_n - H))
    else:
        theta = ops.reshape(ops.cast(theta, "float32"), (*H.shape[1:3], 1))
        d = H - theta * log_n
        outside = ops.abs(d) > entropy.tolerance * log_n
        row = ops.square(ops.where(outside, d, 0.0))
    counts = keys > 1.5
    if segment_ids is not None:
        real = ops.not_equal(segment_ids, 0)[:, None, None]
        counts = ops.logical_and(counts, real)
    counts = ops.cast(ops.broadcast_to(counts, ops.shape(H)), "float32")
    return ops.sum(counts * row) / ops.maximum(ops.sum(counts), 1.0)


def _check(z_BKGTS, entropy, theta):
    dtype = keras.backend.standardize_dtype(z_BKGTS.dtype)
    if dtype != "float32":
        # In bfloat16 a logit near 300 is off by one nat.
        raise ValueError(
            "The entropy penalty takes float32 logits: compute q.k in float32."
            f" Received: dtype {dtype}"
        )
    if entropy.floor is not None:
        if theta is not None:
            raise ValueError(
                "`theta` belongs to Entropy(tolerance=...); Entropy(floor=...)"
                f" does not use it. Received: theta={theta!r}, {entropy}"
            )
        return
    heads = z_BKGTS.shape[1] * z_BKGTS.shape[2]
    shape = None if theta is None else tuple(theta.shape)
    if shape != (heads,):
        raise ValueError(
            "Entropy(tolerance=...) needs `theta` with one number per head, "
            f"shape ({heads},): a weight that starts at {THETA_INIT}. "
            f"Received: {'None' if shape is None else f'shape {shape}'}"
        )
