"""What keras_stable needs of PyTorch beyond Keras."""

import functools

import torch

from keras_stable.backend.internals import replace

__all__ = [
    "carry",
    "check_data_parallel",
    "check_observable",
    "device_name",
    "each_step",
    "finish_read",
    "fused",
    "gather",
    "is_writer",
    "observe_updates",
    "reachable",
    "square_sums",
    "start_read",
]


def device_name():
    """Name and number of devices, e.g. `"NVIDIA H100 80GB HBM3 x 1"`."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    return "cpu x 1"


def check_data_parallel(batch_size):
    raise ValueError(
        "Keras accepts a distribution on torch and then ignores it: training "
        "would run on one device. Use KERAS_BACKEND=jax for data parallelism."
    )


def fused(function):
    """`function`, compiled into few kernels where there is a GPU.

    Eager, each of its operations would read the whole activation.
    """
    compiled = None

    @functools.wraps(function)
    def call(*args):
        nonlocal compiled
        tensor = next(x for x in args if isinstance(x, torch.Tensor))
        if not tensor.is_cuda or torch.compiler.is_compiling():
            return function(*args)
        if compiled is None:
            compiled = torch.compile(function, dynamic=False)
        with torch.no_grad():
            return compiled(*args)

    return call


def reachable(value, reference):
    """Whether `value` may be used where `reference` was made: always."""
    return True


def square_sums(tensors):
    """Sum of squares of each, float32 (len,)."""
    tensors = [x.detach().float() for x in tensors]
    return torch.stack(torch._foreach_norm(tensors)).square()


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
        found = before(grads, variables, lambda v: v.value)
        # Updated in place: the old values must be kept.
        old = [v.value.detach().clone() for v in variables]
        original(grads, trainable_variables)
        after(found, old, [v.value for v in variables], lambda v: v.value)

    return replace(optimizer, "apply", apply)


def carry(model, take):
    """Nothing to carry: there is no trace to leave."""
    return lambda: None


def each_step(model, collect):
    """Nothing to do: an execution is one step."""
    return lambda: None


def gather(packed, steps, store):
    """The vector of one step."""
    return packed


def start_read(array):
    """Begins to copy an array to the host, and returns at once."""
    if not array.is_cuda:
        return array.clone(), None
    host = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
    host.copy_(array, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def finish_read(handle):
    """The array as numpy, waiting for the device if need be."""
    host, event = handle
    if event is not None:
        event.synchronize()
    return host.numpy()


def check_observable(model):
    """Raises where a model cannot be observed on this backend."""
    if model.jit_compile is True:
        raise ValueError(
            "On torch, a step compiled as a whole (`jit_compile=True`) cannot "
            "be observed: compile the model without it, or monitor with "
            "`every=None`."
        )


def is_writer():
    """Whether this process writes files: one of several does."""
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return not ready or distributed.get_rank() == 0
