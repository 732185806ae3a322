"""Attention without a tensor of all logits: a chunk of queries at a time.

B batch, T time, N query heads, K key and value heads, G = N / K queries a key,
H head dimension; L queries of a chunk, S keys that they may see.
"""

import dataclasses
import itertools
import math

from keras import ops

from keras_stable import backend
from keras_stable.entropy import MASKED
from keras_stable.entropy import row_entropy
from keras_stable.masks import visible_between

# Queries of a chunk.
CHUNK = 128
# Loops over chunks, at most: chunks of one loop multiply as many keys as its
# last one sees. Of n loops 1 / 2 + 1 / 2n of all pairs, but n times the time
# to compile them.
LOOPS = 4


@dataclasses.dataclass(frozen=True)
class _Loop:
    """Chunks `start, start + L, ...` of queries, which see S keys at most."""

    start: int
    count: int
    L: int
    S: int

    def run(self, step, state):
        """`state = step(start of a chunk, state)` for each of them."""
        return ops.fori_loop(
            0, self.count, lambda i, x: step(self.start + i * self.L, x), state
        )

    def keys(self, start):
        """The first key of a chunk, and how many there are."""
        first = start + self.L - self.S
        if isinstance(start, int):
            # Where a loop is one of Python, each chunk has its own number.
            first = max(first, 0)
            return first, start + self.L - first
        return ops.maximum(first, 0), self.S


def _loops(length, sliding_window, chunk):
    """All chunks, in loops of those that see about as many keys."""
    chunk = min(chunk, length)
    count, rest = divmod(length, chunk)
    window = length if sliding_window is None else sliding_window
    group = math.ceil(count / LOOPS)
    last = [min((i // group + 1) * group, count) * chunk for i in range(count)]
    sizes = [min(stop, chunk + window - 1) for stop in last]
    found, start = [], 0
    for size, same in itertools.groupby(sizes):
        found.append(_Loop(start, len(list(same)), chunk, size))
        start += found[-1].count * chunk
    if rest:
        found.append(_Loop(start, 1, rest, min(length, rest + window - 1)))
    return found


def _cut(x, axis, start, size):
    """`x[start : start + size]` of an axis."""
    begin, shape = [0] * len(x.shape), list(ops.shape(x))
    begin[axis], shape[axis] = start, size
    return ops.slice(x, begin, shape)


def _add(total, axis, start, part):
    """`total`, to which `part` is added from `start` of an axis on."""
    begin = [0] * len(total.shape)
    begin[axis] = start
    return backend.add_slice(total, begin, ops.cast(part, total.dtype))


def _product(a_BKGLX, b_BKXY):
    """`a b` in the dtype of `b`: (B, K, G, L, Y)."""
    _, K, G, L, X = a_BKGLX.shape
    Y = b_BKXY.shape[-1]
    a = ops.reshape(ops.cast(a_BKGLX, b_BKXY.dtype), (-1, K, G * L, X))
    return ops.reshape(ops.matmul(a, b_BKXY), (-1, K, G, L, Y))


def _product_of_queries(a_BKGLX, b_BKGLY):
    """`sum over G and L of a^T b`, in the dtype of `b`: (B, K, X, Y)."""
    _, K, G, L, X = a_BKGLX.shape
    a, b = (
        ops.reshape(x, (-1, K, G * L, x.shape[-1]))
        for x in (ops.cast(a_BKGLX, b_BKGLY.dtype), b_BKGLY)
    )
    return ops.matmul(_transpose(a), b)


def _transpose(x):
    return ops.swapaxes(x, -1, -2)


def _chunk(tensors, start, loop, sliding_window):
    """Queries, keys, values and mask of the chunk at `start`."""
    q_BKGTH, k_BKTH, v_BKTH, *ids_BT = tensors
    first, size = loop.keys(start)
    q_BKGLH = ops.cast(_cut(q_BKGTH, 3, start, loop.L), "float32")
    k_BKSH = ops.cast(_cut(k_BKTH, 2, first, size), "float32")
    t = start + ops.arange(loop.L, dtype="int32")
    s = first + ops.arange(size, dtype="int32")
    ids = [(_cut(x, 1, start, loop.L), _cut(x, 1, first, size)) for x in ids_BT]
    mask = visible_between(t, s, sliding_window, *(ids[0] if ids else ()))
    return q_BKGLH, k_BKSH, _cut(v_BKTH, 2, first, size), mask[:, None, None]


def _softmax(z, mask):
    if z.shape[-1] == 1:
        # Of itself; Keras would warn.
        return ops.ones_like(z)
    return ops.softmax(ops.where(mask, z, MASKED), axis=-1)


def _stretched(p, clip):
    gamma, zeta = clip
    return (zeta - gamma) * p + gamma


def _logits(q_BKGLH, k_BKSH, scale, cap):
    """Logits, those with the cap, and the slope of the cap, or None."""
    raw = _product(scale * q_BKGLH, _transpose(k_BKSH))
    if cap is None:
        return raw, raw, None
    bounded = ops.tanh(raw / cap)
    return raw, cap * bounded, 1.0 - ops.square(bounded)


def _forward(tensors, scale, cap, clip, sliding_window, chunk):
    """`[y_BKGTH]`."""
    q_BKGTH = tensors[0]
    y_BKGTH = ops.zeros_like(q_BKGTH)
    for loop in _loops(q_BKGTH.shape[3], sliding_window, chunk):

        def step(start, y_BKGTH):
            q, k, v, mask = _chunk(tensors, start, loop, sliding_window)
            c = _softmax(_logits(q, k, scale, cap)[1], mask)
            if clip is not None:
                c = ops.clip(_stretched(c, clip), 0.0, 1.0)
            return _add(y_BKGTH, 3, start, _product(c, v))

        y_BKGTH = loop.run(step, y_BKGTH)
    return [y_BKGTH]


def _measure(tensors, scale, cap, sliding_window, chunk):
    """`[max_BKGT, entropy_BKGT]`.

    In loops of their own: beside `_forward` they would change how it is
    compiled, and so the last bits of what it computes.
    """
    q_BKGTH = tensors[0]
    found = [ops.zeros_like(q_BKGTH[..., 0], dtype="float32") for _ in range(2)]
    for loop in _loops(q_BKGTH.shape[3], sliding_window, chunk):

        def step(start, found):
            q, k, _, mask = _chunk(tensors, start, loop, sliding_window)
            raw, z, _ = _logits(q, k, scale, cap)
            largest = ops.max(ops.where(mask, raw, MASKED), axis=-1)
            parts = (largest, row_entropy(z, mask))
            return [_add(x, 3, start, part) for x, part in zip(found, parts)]

        found = loop.run(step, found)
    return found


def _pull(q, k, v, mask, dy, scale, cap, clip):
    """Gradients by the queries, keys and values of a chunk."""
    _, z, slope = _logits(q, k, scale, cap)
    c = p = _softmax(z, mask)
    dp = ops.cast(_product(dy, _transpose(v)), "float32")
    if clip is not None:
        a = _stretched(p, clip)
        c = ops.clip(a, 0.0, 1.0)
        inside = ops.logical_and(a > 0.0, a < 1.0)
        dp = ops.where(inside, (clip[1] - clip[0]) * dp, 0.0)
    dz = p * (dp - ops.sum(p * dp, axis=-1, keepdims=True))
    if slope is not None:
        dz = dz * slope
    dk = _product_of_queries(dz, scale * q)
    return scale * _product(dz, k), dk, _product_of_queries(c, dy)


def _backward(tensors, dy, scale, cap, clip, sliding_window, chunk):
    """Gradients by queries, keys and values; logits are computed anew."""
    inputs = tensors[:3]
    found = [ops.zeros_like(x, dtype="float32") for x in inputs]
    for loop in _loops(dy.shape[3], sliding_window, chunk):

        def step(start, found):
            given = _chunk(tensors, start, loop, sliding_window)
            dy_BKGLH = _cut(dy, 3, start, loop.L)
            parts = _pull(*given, dy_BKGLH, scale, cap, clip)
            first, _ = loop.keys(start)
            places = ((3, start), (2, first), (2, first))
            return [
                _add(x, *place, part)
                for x, place, part in zip(found, places, parts)
            ]

        found = loop.run(step, found)
    return [ops.cast(x, given.dtype) for x, given in zip(found, inputs)]


_operation = backend.operation("attend_chunked", _forward, _backward)


def attend_chunked(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    scale,
    cap=None,
    clip=None,
    segment_ids=None,
    sliding_window=None,
    statistics=False,
    chunk=CHUNK,
):
    """Causal attention by the formula of `attend`, in memory linear in T.

    ```
    raw = scale * q k^T                             float32
    z   = cap * tanh(raw / cap)                     if there is a cap
    p   = softmax(where(visible, z, -1e30))         float32
    p   = clip((zeta - gamma) p + gamma, 0, 1)      if there is a clip
    y   = p v                                       in the dtype of v
    ```

    In training too: the gradient computes the logits of each chunk anew, and
    keeps nothing but q, k and v. It is of the first order. Keys after a chunk
    and before its window are not multiplied, but for those that other chunks
    of the same loop see: 5 / 8 of all pairs, half of them on torch.

    Args:
        q_BTNH, k_BTKH, v_BTKH: tensors, K divides N. T is known.
        scale: float.
        cap: float or None.
        clip: `(gamma, zeta)`, floats, or None.
        segment_ids: int tensor (B, T) or None.
        sliding_window: int or None.
        statistics: bool. Whether rows are measured, from logits computed anew.
        chunk: int. Queries of a chunk.

    Returns:
        `(y_BTNH, rows)`: `rows` is None, or a tuple of float32 tensors
        (B, N, T) without gradient: the largest visible raw logit, and the
        entropy of the softmax before any clip, in nats.

    Reference:
        [Rabe & Staats, 2021](https://arxiv.org/abs/2112.05682), with all keys
        of a chunk at once.

    Example:

    >>> q, k, v = (keras.random.normal((1, 300, 2, 8)) for _ in range(3))
    >>> y, _ = attend_chunked(q, k, v, 8**-0.5, cap=50.0)
    """
    _, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = ops.reshape(q_BTNH, (-1, T, K, N // K, H))
    tensors = [ops.transpose(q_BTKGH, (0, 2, 3, 1, 4))]
    tensors += [ops.transpose(x, (0, 2, 1, 3)) for x in (k_BTKH, v_BTKH)]
    if segment_ids is not None:
        tensors.append(ops.cast(segment_ids, "int32"))
    where = (sliding_window, chunk)
    (y_BKGTH,) = _operation(tensors, (scale, cap, clip, *where))
    y_BTKGH = ops.transpose(y_BKGTH, (0, 3, 1, 2, 4))
    y_BTNH = ops.reshape(y_BTKGH, (-1, T, N, H))
    if not statistics:
        return y_BTNH, None
    seen = [ops.stop_gradient(x) for x in tensors]
    rows = _measure(seen, scale, cap, *where)
    return y_BTNH, tuple(ops.reshape(x, (-1, N, T)) for x in rows)
