"""What is measured of gradients and updates, on PyTorch."""

import torch

from keras_stable.backend.internals import replace
from keras_stable.backend.torch_guard import apply_unless
from keras_stable.backend.torch_processes import must_merge


def square_sums(tensors, minus=None):
    """Sum of squares of each, or of its difference; float32 (len,)."""
    tensors = [x.detach().float() for x in tensors]
    if minus is not None:
        tensors = torch._foreach_sub(tensors, [x.float() for x in minus])
    norms = torch.stack(torch._foreach_norm(tensors))
    squares = norms.square()
    squares.norms = norms  # Whose root is not always them, bit by bit.
    return squares


def mean_ratios(gradients, moments):
    """Mean of g^2 / v of each pair, float32 (len,)."""
    sizes = [float(g.numel()) for g in gradients]
    gradients = [g.detach().float() for g in gradients]
    roots = torch._foreach_sqrt([v.detach().float() for v in moments])
    torch._foreach_clamp_min_(roots, 1e-15)
    norms = torch._foreach_norm(torch._foreach_div(gradients, roots))
    # Each size is a number of its kernel: a tensor of them would be waited for.
    squares = torch._foreach_mul(norms, norms)
    return torch.stack(torch._foreach_div(squares, sizes))


def observe_updates(optimizer, before, after):
    """Calls `before` and `after` around each update of a compiled optimizer.

    `before(gradients, variables, read)` returns what `after(found, old, new,
    read)` is given as `found`; `read(v)` is the value of an optimizer's
    variable at that time, `old` and `new` are those of the trainable ones.

    Returns:
        A function that undoes it.
    """
    original = optimizer.apply

    def apply(grads, trainable_variables=None):
        variables = trainable_variables or optimizer._trainable_variables
        if not optimizer.built:
            optimizer.build(variables)
        update = original
        if must_merge():
            grads = optimizer._merge(grads, variables)
            update = optimizer._apply_merged
        found = before(grads, variables, lambda v: v.value)
        # Updated in place: the old values must be kept.
        old = torch._foreach_add([v.value.detach() for v in variables], 0)
        # What `update_adamw` need not measure again, and clips in place.
        known = {"gradients": (), "clipped": ()}
        if hasattr((found or {}).get("squares"), "norms"):
            known["gradients"] = [grads[i] for i in found["indices"]]
            known["norms"] = found["squares"].norms
        undo = replace(optimizer, "_measured", known)
        left_out = (found or {}).get("left_out")
        try:
            apply_unless(
                left_out, optimizer, lambda: update(grads, trainable_variables)
            )
        finally:
            undo()
        if found is not None:
            kept = {id(g) for g in found.get("gradients", ())}
            found["rewritten"] = bool(kept & {id(g) for g in known["clipped"]})
        after(found, old, [v.value for v in variables], lambda v: v.value)

    return replace(optimizer, "apply", apply)
