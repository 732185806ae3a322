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

import numpy as np
from keras import ops

from keras_stable.telemetry import HEAD_STATISTICS
from keras_stable.telemetry import MASKED
from keras_stable.telemetry import STATISTICS
from keras_stable.updates import UPDATE_SCALARS
from keras_stable.updates import VARIABLE_STATISTICS

# Of every step. `loss` is the batch's own, not Keras's running mean;
# `nonfinite` counts entries of activations, `first_nonfinite` is the first
# activation of the forward pass that has any, -1 for none; `max_logit` is the
# largest of all heads, before a cap.
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


def merge(values, full):
    """One activation's statistics from those of several calls of its layer.

    Means average, the maximum is the largest, counts add up.
    """
    if len(values) == 1:
        return values[0]
    x = ops.stack(values)
    if not full:
        return ops.sum(x, axis=0)
    combine = {
        "rms": lambda x: ops.sqrt(ops.mean(ops.square(x))),
        "abs_max": ops.max,
        "nonfinite": ops.sum,
    }
    return ops.stack(
        [
            combine.get(name, ops.mean)(x[:, i])
            for i, name in enumerate(STATISTICS)
        ]
    )


def merge_heads(values, full):
    """The same for an attention core: maxima, and the mean of entropies."""
    if len(values) == 1:
        return values[0]
    x = ops.stack(values)
    largest = ops.max(x, axis=0)
    if not full:
        return largest
    return ops.concatenate([largest[:2], ops.mean(x, axis=0)[2:]])


def pack(full, forward, updates, table):
    """The vector.

    Args:
        full: bool.
        forward: dictionary: `"loss"`, a scalar; `"tensors"`, a list of (6,)
            or (); `"heads"`, a list of (3, N) or (N,).
        updates: list of scalars, by `UPDATE_SCALARS`.
        table: tensor (V, 4), or None in a light step.

    Returns:
        `(vector, max_logit)`.
    """
    tensors, heads = forward["tensors"], forward["heads"]
    bad, first = ops.zeros(()), -ops.ones(())
    if tensors:
        counts = ops.stack([t[-1] if full else t for t in tensors])
        bad = ops.sum(counts)
        index = ops.cast(ops.argmax(counts > 0), "float32")
        first = ops.where(bad > 0, index, -1.0)
    largest = ops.full((), MASKED)
    if heads:
        rows = [h[0] if full else h for h in heads]
        largest = ops.max(ops.concatenate(rows))
    scalars = [forward["loss"], largest, bad, first, *updates]
    parts = [ops.stack([ops.cast(x, "float32") for x in scalars])]
    if full:
        parts += [ops.reshape(x, (-1,)) for x in (*tensors, *heads, table)]
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
        index = int(scalars[key])
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
