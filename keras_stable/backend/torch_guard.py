"""Steps that are left out, on PyTorch: nothing waits where it need not."""

import torch

from keras_stable.backend import internals
from keras_stable.backend import saving
from keras_stable.backend.torch_transfers import finish_read
from keras_stable.backend.torch_transfers import start_read


def give_numbers(args, numbers, store):
    """The arguments of a train function, with numbers for its next step."""
    store["numbers"] = numbers
    return args


def guarded(model, train_step, guard):
    """A `train_step` that changes nothing if the guard leaves it out."""
    # Once, for it walks through all layers.
    moving = internals.moving_variables(model)

    def step(data):
        # Those of metrics may be made in the first step.
        variables = [*moving, *model.metrics_variables]
        guard.begin(guard.store["numbers"], _copies(variables))
        seeds = saving.native_seeds()
        logs = train_step(data)
        left_out = guard.end()
        # Keras's dropout without a seed draws from torch's own numbers. The
        # host counts them, for a GPU too, and must know then whether to go
        # back: such models wait for the decision in every step.
        if left_out is not None and saving.native_seeds() != seeds and left_out:
            saving.set_native_seeds(seeds)
        return logs

    return step


def _groups(items, value):
    """Items whose values have one dtype, which few kernels can copy."""
    groups = {}
    for item in items:
        groups.setdefault(value(item).dtype, []).append(item)
    return groups.values()


def _flat(variables):
    return torch.cat([v.value.detach().reshape(-1) for v in variables])


def _copies(variables):
    """Lists of variables and their values in one tensor, one a dtype."""
    for group in _groups(variables, lambda v: v.value):
        yield group, _flat(group)


def waits(left_out):
    """Whether to ask the decision for its value costs nothing."""
    return not left_out.is_cuda


@torch.no_grad()
def put_back(left_out, kept):
    """Assigns variables their values before, where a step is left out.

    Args:
        left_out: bool scalar tensor.
        kept: list of pairs as of `_copies`.
    """
    if waits(left_out) and not left_out:
        return
    for variables, before in kept:
        if not waits(left_out):
            before = torch.where(left_out, before, _flat(variables))
        values = [v.value for v in variables]
        parts = before.split([x.numel() for x in values])
        parts = [part.view_as(x) for part, x in zip(parts, values)]
        torch._foreach_copy_(values, parts)


def _queues(optimizer):
    """Whether an update can be queued that the device may leave out.

    Only our AdamW in one pass, and where nothing but it and the count of
    batches changes: see `optimizers.AdamW._fused`.
    """
    fused = getattr(optimizer, "_fused", None)
    if fused is None:
        return False
    variables = optimizer._trainable_variables
    return (
        fused(variables)
        and not optimizer.gradient_accumulation_steps
        and not optimizer.use_ema
        and all(v.constraint is None for v in variables)
        and all(internals.counts_gradients(optimizer, v) for v in variables)
    )


def apply_unless(left_out, optimizer, apply):
    """Calls `apply` unless `left_out`, a tensor or None."""
    if left_out is None:
        apply()
    elif waits(left_out) or not _queues(optimizer):
        if not left_out:
            apply()
    else:
        count = optimizer._iterations.value
        before = count.detach().clone()
        flag = left_out.float()
        undo = internals.replace(optimizer, "_left_out", flag)
        try:
            apply()
        finally:
            undo()
        with torch.no_grad():
            count.copy_(torch.where(left_out, before, count))
        # The host counts updates as well: see `_updates_made`. It learns of
        # this when it next counts, and the flag has long arrived.
        known, _, made = vars(optimizer)["_counted"]
        vars(optimizer)["_counted"] = known, count._version - 1, made
        vars(optimizer)["_taken_back"] = start_read(flag)


def taken_back(optimizer):
    """1 if the update that was counted last was left out, otherwise 0."""
    handle = vars(optimizer).pop("_taken_back", None)
    return 0 if handle is None else int(finish_read(handle))
