"""Curves and tables made small enough to be shown: pure numpy.

A report of a hundred runs holds some million numbers; a screen is a thousand
pixels wide. `decimate` and `thin` choose what is kept, `pack` writes it down.
"""

import base64

import numpy as np


def numbers(values):
    """A list of whatever as float64, NaN for what is no number.

    >>> numbers([1, "inf", None, "tall", [2]]).tolist()
    [1.0, inf, nan, nan, nan]
    """
    return np.array([_number(value) for value in values], "float64")


def _number(value):
    try:
        return float(value)
    # An integer of a thousand digits overflows.
    except (TypeError, ValueError, OverflowError):
        return np.nan


def decimate(steps, values, points=1000):
    """At most `points` of a curve, which draw the same picture.

    The curve is cut into `(points - 2) // 3` pieces of equal length. Of each
    the least and the greatest finite value stay, and the first that is not
    finite; besides, the first and the last of the curve. Nothing is averaged:
    what is shown was measured, no spike is lost, and a gap stays a gap.

    Args:
        steps, values: arrays of the same length.
        points: int, at least 8. A shorter curve is left as it is.

    Returns:
        `(steps, values)`.

    >>> steps, values = decimate(range(1000), [0.0] * 999 + [9.0], points=8)
    >>> len(steps) <= 8, values.max()
    (True, np.float64(9.0))
    """
    steps, values = np.asarray(steps), np.asarray(values, "float64")
    if len(values) <= points:
        return steps, values
    kept = {0, len(values) - 1}
    edges = np.linspace(0, len(values), (points - 2) // 3 + 1).astype(int)
    for begin, end in zip(edges[:-1], edges[1:]):
        finite = np.isfinite(values[begin:end])
        if not finite.all():
            kept.add(begin + int(np.argmin(finite)))
        if finite.any():
            piece = values[begin:end]
            kept.add(begin + int(np.where(finite, piece, np.inf).argmin()))
            kept.add(begin + int(np.where(finite, piece, -np.inf).argmax()))
    kept = sorted(kept)
    return steps[kept], values[kept]


def trailing_median(values, window):
    """Median of the last `window` values at each place, fewer at the start.

    Values that are not finite are left out; where all are, it is NaN.
    """
    values = np.asarray(values, "float64")
    values = np.where(np.isfinite(values), values, np.nan)
    padded = np.concatenate([np.full(window - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    # Sorted, NaN come last: the middle of those that are not.
    found = np.empty(len(values))
    for begin in range(0, len(values), 4096):
        piece = np.sort(windows[begin : begin + 4096], axis=-1)
        count = np.sum(np.isfinite(piece), axis=-1)
        low = np.maximum(count - 1, 0) // 2
        rows = np.arange(len(piece))
        middle = piece[rows, low] + piece[rows, np.maximum(count // 2, 0)]
        found[begin : begin + 4096] = np.where(count > 0, middle / 2, np.nan)
    return found


def thin(steps, rows, cells):
    """Places of the steps to keep, so that a table has at most `cells`.

    Evenly spread, the first and the last among them, two at least.

    >>> thin([1, 10, 20, 30, 40], rows=4, cells=12)
    [0, 2, 4]
    """
    most = max(2, cells // max(rows, 1))
    if len(steps) <= most:
        return list(range(len(steps)))
    return (
        np.unique(np.linspace(0, len(steps) - 1, most).round())
        .astype(int)
        .tolist()
    )


def pack(values, kind="f4"):
    """An array as text for the page: `{"shape", "kind", "data"}`.

    Args:
        values: array. What is not finite becomes NaN.
        kind: `"f4"`, float32; or `"i2"`, half as long: multiples of the
            largest magnitude / 32767, which is `"scale"`, and -32768 for NaN.
    """
    values = np.asarray(values, "float64")
    finite = np.isfinite(values) & (np.abs(values) < 3e38)
    packed = {"shape": list(values.shape), "kind": kind}
    if kind == "i2":
        largest = np.max(np.abs(values), where=finite, initial=0.0)
        packed["scale"] = float(largest / 32767) or 1.0
        whole = np.round(np.where(finite, values, 0) / packed["scale"])
        array = np.where(finite, whole, -32768).astype("<i2")
    else:
        array = np.where(finite, values, np.nan).astype("<f4")
    packed["data"] = base64.b64encode(array.tobytes()).decode()
    return packed


def unpack(packed):
    """What `pack` was given, as the page reads it."""
    array = np.frombuffer(
        base64.b64decode(packed["data"]), f"<{packed['kind']}"
    ).astype("float64")
    if packed["kind"] == "i2":
        array = np.where(array == -32768, np.nan, array * packed["scale"])
    return array.reshape(packed["shape"])
