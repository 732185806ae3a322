"""What is measured of gradients and updates, around a stock optimizer."""

import numpy as np
from keras import ops

from keras_stable import backend
from keras_stable.backend import internals

# `gradient_norm` is the global L2 norm before clipping, without loss scale
# and, under gradient accumulation, of the mean over the batches so far;
# `update_norm` that of the change of all weights, 0 where none was made;
# `nonfinite_gradients` counts variables; `clean_gradient` is the shallowest of
# the others, -1 if all are bad or none is; `clipped` is the share clipped: of
# steps, of variables or of entries, as the optimizer clips; `skipped` is 1
# where loss scaling skipped the update, `guarded` where a guard left the whole
# step out: nothing was updated then, and it is not called skipped.
UPDATE_SCALARS = (
    "gradient_norm",
    "update_norm",
    "nonfinite_gradients",
    "clean_gradient",
    "clipped",
    "skipped",
    "updated",
    "loss_scale",
    "guarded",
)
# Of a trainable variable; `staleness` is StableAdamW's RMS_t (Wortsman et al.,
# arXiv 2304.13013), sqrt(mean(g^2 / max(v, epsilon^2))) with the gradient
# after clipping and v after the update, without its bias.
VARIABLE_STATISTICS = (
    "gradient_rms",
    "update_rms",
    "weight_rms",
    "staleness",
)


def forward_order(variables, tensors):
    """Indices of variables in the order in which the forward pass uses them.

    By the first activation of the variable's layer; others, such as norms',
    stay behind their predecessor.
    """
    places = {}
    for place, name in enumerate(tensors):
        places.setdefault(name.removesuffix("/input"), place)
    ranks, last = [], -1
    for variable in variables:
        layer, _, name = variable.path.rpartition("/")
        if name.startswith("reverse"):
            layer = f"{layer}/head"
        last = places.get(layer, last)
        ranks.append(last)
    return sorted(range(len(variables)), key=ranks.__getitem__)


def before(optimizer, full, gradients, variables, read):
    """What must be computed before the update; see `after`."""
    scale = internals.loss_scale(optimizer, read)
    gradients, updated = internals.accumulated(
        optimizer, gradients, variables, read
    )
    kept = [
        (i, g)
        for i, (g, v) in enumerate(zip(gradients, variables))
        if g is not None and internals.counts_gradients(optimizer, v)
    ]
    indices, gradients = zip(*kept)
    squares = backend.square_sums(gradients)
    scaled = not isinstance(scale, float) or scale != 1.0
    if scaled:
        squares = squares / ops.square(ops.cast(scale, "float32"))
    found = {
        "indices": indices,
        "variables": [variables[i] for i in indices],
        "squares": squares,
        "updated": updated,
        # A copy: torch updates the variable in place.
        "scale": scale * 1.0,
    }
    kind, limit = internals.clipping(optimizer)
    if full or kind == "clipvalue":
        if scaled:
            gradients = [g / ops.cast(scale, g.dtype) for g in gradients]
        found["gradients"] = gradients
    return found


def gradient_norm(found, tensors):
    """The norm of what `before` found; `tensors` are names of activations."""
    order = forward_order(found["variables"], tensors)
    squares = ops.take(found["squares"], np.array(order, "int32"))
    return ops.sqrt(ops.sum(squares))


def after(optimizer, full, found, old, new, read, guarded=False):
    """Adds what is known after the update to what `before` found."""
    indices = found["indices"]
    old, new = ([x[i] for i in indices] for x in (old, new))

    found["changes"] = backend.square_sums(new, old)
    if full and guarded:
        found["kept"] = backend.square_sums(old)
    norm = ops.sqrt(ops.sum(found["squares"]))
    kind, limit = internals.clipping(optimizer)
    factors, found["clipped"] = _clip(kind, limit, norm, found)
    if not full:
        return found
    found["weights"] = backend.square_sums(new)
    moments = internals.second_moments(optimizer)
    time = ops.maximum(internals.iterations(optimizer, read), 1.0)
    known = [
        (i, g, moments[id(v)])
        for i, (v, g) in enumerate(zip(found["variables"], found["gradients"]))
        if id(v) in moments
    ]
    # Not `ops.full`, for which torch waits.
    stale = ops.zeros((1,)) + float("nan")
    # Variables without a second moment point to the NaN at the end.
    rows = np.full(len(old), len(known), "int32")
    if known:
        places, gradients, slots = zip(*known)
        if kind == "clipvalue":
            gradients = [ops.clip(g, -limit, limit) for g in gradients]
        ratios = backend.mean_ratios(gradients, [read(v) for v, _ in slots])
        betas = [beta for _, beta in slots]
        betas = ops.convert_to_tensor(np.array(betas, "float32"))
        ratios = ratios * (1.0 - ops.power(betas, time))
        stale = ops.concatenate([ratios, stale])
        rows[list(places)] = np.arange(len(known))
    stale = ops.take(stale, rows)
    # Torch's one pass of clipping and update has left clipped gradients.
    clipped = found.get("rewritten", False)
    found["staleness"] = ops.sqrt(stale) * (1.0 if clipped else factors)
    return found


def _clip(kind, limit, norm, found):
    """What each gradient is multiplied by, and the share that is clipped."""
    ones = ops.ones_like(found["squares"])
    if kind == "global_clipnorm":
        factor = limit / ops.maximum(norm, limit)
        return ones * factor, ops.cast(norm > limit, "float32")
    if kind == "clipnorm":
        norms = ops.sqrt(found["squares"])
        clipped = ops.mean(ops.cast(norms > limit, "float32"))
        return limit / ops.maximum(norms, limit), clipped
    if kind == "clipvalue":
        beyond = [
            ops.sum(ops.cast(ops.abs(g) > limit, "float32"))
            for g in found["gradients"]
        ]
        size = sum(_size(v) for v in found["variables"])
        return ones, ops.sum(ops.stack(beyond)) / size
    return ones, ops.zeros(())


def _size(variable):
    size = 1
    for dim in variable.shape:
        size *= dim
    return float(size)


def _left_out(found, left_out):
    """`found`, of a step that changed nothing if `left_out`."""
    changes, stale = found["changes"], found.get("staleness")
    found = {**found, "changes": ops.where(left_out, 0.0, changes)}
    if stale is not None:
        found["weights"] = ops.where(left_out, found["kept"], found["weights"])
        found["staleness"] = ops.where(left_out, float("nan"), stale)
    return found


def summarize(optimizer, full, found, tensors, left_out=None):
    """Scalars by `UPDATE_SCALARS`, the table, and its variables' paths."""
    if left_out is not None:
        found = _left_out(found, left_out)
    variables = found["variables"]
    order = np.array(forward_order(variables, tensors), "int32")
    squares = ops.take(found["squares"], order)
    finite = ops.isfinite(squares)
    bad = ops.sum(1.0 - ops.cast(finite, "float32"))
    clean = ops.cast(ops.argmax(finite), "float32")
    some = ops.logical_and(bad > 0, bad < len(variables))
    scaled = hasattr(optimizer, "dynamic_scale")
    scalars = [
        ops.sqrt(ops.sum(squares)),
        ops.sqrt(ops.sum(found["changes"])),
        bad,
        ops.where(some, clean, -1.0),
        found["clipped"],
        bad > 0 if scaled else ops.zeros(()),
        ops.cast(found["updated"], "float32"),
        ops.cast(found["scale"], "float32"),
        ops.zeros(()),
    ]
    if left_out is not None:
        for name in ("skipped", "updated"):
            place = UPDATE_SCALARS.index(name)
            value = ops.cast(scalars[place], "float32")
            scalars[place] = ops.where(left_out, 0.0, value)
        scalars[-1] = ops.cast(left_out, "float32")
    paths = [variables[i].path for i in order]
    if not full:
        return scalars, None, paths
    sizes = np.array([_size(variables[i]) for i in order], "float32")
    sizes = ops.convert_to_tensor(sizes)
    table = [
        ops.sqrt(ops.take(found[key], order) / sizes)
        for key in ("squares", "changes", "weights")
    ]
    table.append(ops.take(found["staleness"], order))
    return scalars, ops.stack(table, axis=1), paths
