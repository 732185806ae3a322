"""Which keys the queries of causal attention see.

B batch, T query time, S key time.
"""

import math

from keras import ops

# Queries whose keys are counted at a time.
CHUNK = 512


def visible_between(t, s, sliding_window=None, t_ids=None, s_ids=None):
    """Which keys at positions `s` the queries at positions `t` see.

    ```
    s <= t  and  t - s < sliding_window  and  s_ids == t_ids
    ```

    Args:
        t, s: int tensors (T,) and (S,).
        sliding_window: int or None.
        t_ids, s_ids: int tensors (B, T) and (B, S), the documents; or None.

    Returns:
        Bool tensor (1 or B, T, S).
    """
    t, s = t[:, None], s[None]
    mask = s <= t
    if sliding_window is not None:
        mask = ops.logical_and(mask, t - s < sliding_window)
    mask = mask[None]
    if t_ids is not None:
        mask = ops.logical_and(mask, t_ids[:, :, None] == s_ids[:, None, :])
    return mask


def visible(length, positions=None, segment_ids=None, sliding_window=None):
    """Which of `length` keys each query sees: bool tensor (1 or B, T, S).

    A token sees itself and earlier tokens of its own document, of those the
    last `sliding_window`. Padding (segment 0) sees padding only, so that its
    rows stay finite. `positions` (T,) of the queries default to all.
    """
    s = ops.arange(length, dtype="int32")
    t = s if positions is None else positions
    return visible_between(t, s, sliding_window, segment_ids, segment_ids)


def visible_keys(length, segment_ids=None, sliding_window=None):
    """How many keys each query sees, `visible` summed over keys.

    Without documents min(t + 1, sliding_window). With them they are counted
    for some queries at a time: memory is linear in `length`.

    Args:
        length: int. T = S.
        segment_ids: int tensor (B, T) or None.
        sliding_window: int or None.

    Returns:
        Float32 tensor (1 or B, T).
    """
    if segment_ids is None:
        keys = ops.arange(1, length + 1, dtype="float32")
        return ops.minimum(keys, float(sliding_window or length))[None]
    size = min(length, CHUNK)
    count = math.ceil(length / size)
    ids = ops.cast(segment_ids, "int32")
    rows = ops.shape(ids)[0]
    queries = ops.pad(ids, [(0, 0), (0, count * size - length)])
    s = ops.arange(length, dtype="int32")

    def some(i, keys):
        start = i * size
        t = start + ops.arange(size, dtype="int32")
        t_ids = ops.slice(queries, (0, start), (rows, size))
        mask = visible_between(t, s, sliding_window, t_ids, ids)
        found = ops.sum(ops.cast(mask, "float32"), axis=-1)
        return ops.slice_update(keys, (0, start), found)

    keys = ops.zeros_like(queries, dtype="float32")
    return ops.fori_loop(0, count, some, keys)[:, :length]
