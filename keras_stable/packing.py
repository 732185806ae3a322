"""One training step's statistics as one float32 vector, and back.

The vector is what leaves the compiled step: one copy to the host, whatever
the model's size.

```
SCALARS | L x STATISTICS | A x HEAD_STATISTICS x N | V x VARIABLE_STATISTICS
```

A light step has the first part alone. L activations, A attention cores of N
heads, V trainable variables.
"""

import dataclasses
import threading
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_stable import backend
from keras_stable import telemetry
from keras_stable.logits import HEAD_STATISTICS
from keras_stable.logits import MASKED
from keras_stable.telemetry import STATISTICS
from keras_stable.updates import UPDATE_SCALARS
from keras_stable.updates import VARIABLE_STATISTICS

# Of every step. `loss` is the batch's own, not Keras's running mean;
# `max_logit` the largest of all heads, before a cap; `nonfinite` counts
# activations with bad entries, `first_nonfinite` is the first of them in the
# forward pass, -1 for none.
SCALARS = (
    "loss",
    "max_logit",
    "nonfinite",
    "first_nonfinite",
    *UPDATE_SCALARS,
)


@dataclasses.dataclass
class Layout:
    """What stands where in the vector.

    Attributes:
        tensors: names of activations, in the order of the forward pass; those
            of inputs end in "/input", the logits of a tied head in "/head".
        heads: name of an attention core: its number of heads.
        variables: paths of trainable variables, in that order too.
        labels: name of an attention core: "exact", or the sample of queries
            that was measured.
        unreachable: names of what was called inside a function from which
            nothing escapes, such as a loop, and so was not measured.
    """

    tensors: list = dataclasses.field(default_factory=list)
    heads: dict = dataclasses.field(default_factory=dict)
    variables: list = dataclasses.field(default_factory=list)
    labels: dict = dataclasses.field(default_factory=dict)
    unreachable: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Sample:
    """What one step measured.

    Attributes:
        scalars: dictionary by `SCALARS`; layers and variables by name.
        tensors: array (L, 6) by `STATISTICS`, or None in a light step.
        heads: list of A arrays (3, N) by `HEAD_STATISTICS`, or None.
        variables: array (V, 4) by `VARIABLE_STATISTICS`, or None; NaN where
            an optimizer has no second moment.
    """

    scalars: dict
    tensors: np.ndarray | None = None
    heads: list | None = None
    variables: np.ndarray | None = None


class Carried(NamedTuple):
    """Predictions, and what the forward pass measured, on their way out."""

    y_pred: Any
    forward: Any


class Traced(threading.local):
    """What a step that is being traced, or run, found until now.

    Each thread has its own: TensorFlow traces each replica in one.
    """

    def __init__(self):
        self.forward = self.found = None
        self.layout = Layout()


def _by_shape(values):
    """`(indices, values stacked)` of each shape among `values`."""
    groups = {}
    for index, value in enumerate(values):
        key = (tuple(value.shape), value.dtype)
        if None in value.shape:
            # Unknown while it is traced: alone.
            key = index
        groups.setdefault(key, []).append(index)
    for indices in groups.values():
        yield indices, ops.stack([values[i] for i in indices])


def _in_order(parts):
    """Rows computed for groups of indices, in the order of the indices.

    Few operations for many layers: launching one a layer costs more than
    what it does.
    """
    indices, rows = zip(*parts)
    order = np.argsort([i for group in indices for i in group])
    return ops.take(ops.concatenate(rows), order, axis=0)


def _tensors(full, records):
    """Statistics (C, 6) of the calls of layers, or (C,): whether one is bad."""
    if not full:
        parts = (
            (i, ops.sum(ops.cast(x, "float32"), axis=-1))
            for i, x in _by_shape([r.value for r in records])
        )
        # One infinity or NaN makes the sum one.
        return 1.0 - ops.cast(ops.isfinite(_in_order(parts)), "float32")
    parts = []
    for indices, rows in _by_shape([r.value[0] for r in records]):
        kurtosis = ops.stack([records[i].value[1] for i in indices])
        dim = np.array([records[i].note for i in indices], "float32")
        dim = ops.convert_to_tensor(dim)
        parts.append((indices, telemetry.summarize(rows, kurtosis, dim)))
    return _in_order(parts)


def _merge(table, names, columns):
    """Rows of several calls of one layer as one; a row (columns, ...) each.

    Means average, maxima are the largest, counts add up.
    """
    unique = list(dict.fromkeys(names))
    if len(unique) == len(names):
        return table, unique
    combine = {
        "rms": lambda x: ops.sqrt(ops.mean(ops.square(x), axis=0)),
        "nonfinite": lambda x: ops.sum(x, axis=0),
        **dict.fromkeys(
            ("abs_max", "max_logit", "max_logit_capped"),
            lambda x: ops.max(x, axis=0),
        ),
    }
    rows = []
    for name in unique:
        calls = ops.stack([table[i] for i, n in enumerate(names) if n == name])
        merged = [
            combine.get(column, lambda x: ops.mean(x, axis=0))(calls[:, i])
            for i, column in enumerate(columns)
        ]
        rows.append(ops.stack(merged))
    return rows, unique


def forward(full, tensors, heads, loss):
    """What the forward pass measured, few operations for many layers.

    Args:
        full: bool.
        tensors, heads: lists of `Record`s.
        loss: scalar.

    Returns:
        `(values, layout)`: `"loss"`, `"tensors"`, (L, 6) or (L,), and
        `"heads"`, a list of (3, N) or (N,), the latter two if there are any.
    """
    layout = Layout(labels={r.name: r.note for r in heads})
    values = {"loss": ops.stop_gradient(ops.cast(loss, "float32"))}
    if tensors:
        table = _tensors(full, tensors)
        table, layout.tensors = _merge(
            table if full else table[:, None],
            [r.name for r in tensors],
            STATISTICS if full else STATISTICS[-1:],
        )
        merged = isinstance(table, list)
        values["tensors"] = ops.stack(table) if merged else table
    if heads:
        table, names = _merge(
            [r.value if full else r.value[None] for r in heads],
            [r.name for r in heads],
            HEAD_STATISTICS if full else HEAD_STATISTICS[:1],
        )
        layout.heads = {n: x.shape[-1] for n, x in zip(names, table)}
        values["heads"] = table
    return values, layout


def of_all(values, squares):
    """What was measured of a part of the batch, as it is of the whole.

    Every number comes out of one exchange, so that all copies of the model
    have the same bits, and decide the same.

    Args:
        values: of `forward`, of a light step.
        squares: of the whole batch's gradients, (V,).

    Returns:
        `(values, squares)`: the loss is the mean, and what is counted of an
        activation, or largest, is so in any part.
    """
    parts = [values["loss"], squares]
    parts += [values[k] for k in ("tensors",) if k in values]
    parts += values.get("heads", [])
    flat = ops.concatenate([ops.reshape(x, (-1,)) for x in parts])
    rows = backend.of_all(flat)
    mean, largest = ops.mean(rows, axis=0), ops.max(rows, axis=0)
    places = np.cumsum([1, *[int(np.prod(x.shape)) for x in parts[1:]]])
    rest = [
        ops.reshape(largest[begin:end], x.shape)
        for begin, end, x in zip(places[1:], places[2:], parts[2:])
    ]
    # On TensorFlow each has its share of the loss.
    found = {"loss": mean[0] * float(backend.replicas())}
    if "tensors" in values:
        found["tensors"] = rest.pop(0)
    if "heads" in values:
        found["heads"] = rest
    return found, mean[1 : places[1]]


def pack(full, values, updates, table):
    """The vector.

    Args:
        full: bool.
        values: of `forward`.
        updates: list of scalars, by `UPDATE_SCALARS`.
        table: tensor (V, 4), or None in a light step.

    Returns:
        `(vector, max_logit)`.
    """
    tensors, heads = values.get("tensors"), values.get("heads", [])
    bad, first = ops.zeros(()), -ops.ones(())
    if tensors is not None:
        is_bad = tensors[:, -1] > 0
        bad = ops.sum(ops.cast(is_bad, "float32"))
        index = ops.cast(ops.argmax(is_bad), "float32")
        first = ops.where(bad > 0, index, -1.0)
    # Not `ops.full`: on torch it asks the device for the number, and waits.
    largest = ops.convert_to_tensor(MASKED, "float32")
    if heads:
        largest = ops.max(ops.concatenate([h[0] for h in heads]))
    scalars = [values["loss"], largest, bad, first, *updates]
    parts = [ops.stack([ops.cast(x, "float32") for x in scalars])]
    if full:
        tables = [*([] if tensors is None else [tensors]), *heads, table]
        parts += [ops.reshape(x, (-1,)) for x in tables]
    return ops.concatenate(parts), largest


def unpack(vector, layout, full):
    """The `Sample` of a vector, an array."""
    scalars = dict(zip(SCALARS, vector.tolist()))
    if scalars["max_logit"] < MASKED / 2:
        scalars["max_logit"] = float("nan")
    for key, names in (
        ("first_nonfinite", layout.tensors),
        ("clean_gradient", layout.variables),
    ):
        # Not quite a whole number where replicas' numbers were averaged.
        index = round(scalars[key])
        scalars[key] = names[index] if index >= 0 else None
    if not full:
        return Sample(scalars)
    at = len(SCALARS)

    def part(*shape):
        nonlocal at
        begin, at = at, at + shape[0] * shape[1]
        return vector[begin:at].reshape(shape)

    return Sample(
        scalars,
        tensors=part(len(layout.tensors), len(STATISTICS)),
        heads=[part(len(HEAD_STATISTICS), n) for n in layout.heads.values()],
        variables=part(len(layout.variables), len(VARIABLE_STATISTICS)),
    )
