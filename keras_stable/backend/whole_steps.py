"""What jax and TensorFlow need no code for: they compile whole steps."""

import contextlib

from keras import ops


def fused(function):
    """`function`, which the compiler of the step fuses by itself."""
    return function


def add_slice(total, start, part):
    """`total`, to which `part` is added at `start`, an index of each axis.

    `total` may be overwritten.
    """
    before = ops.slice(total, start, ops.shape(part))
    return ops.slice_update(total, start, before + part)


def region(owner, function, key, training):
    """`function`, which is compiled with the whole step."""
    return function


def rehearse(function, *args):
    """Nothing to run: there are no programs within a step."""


def without_gradient():
    """A context that changes nothing: what is not used is not computed."""
    return contextlib.nullcontext()


def fuses_adamw(variables):
    """Whether `update_adamw` is there and faster for these variables."""
    # The compiler of the step fuses Keras's own.
    return False


def update_adamw(optimizer, gradients, variables, learning_rate, decay):
    """Clips by the global norm, decays and updates, in one pass.

    Args:
        optimizer: a Keras `AdamW` that is built.
        gradients, variables: lists. The gradients may be overwritten.
        learning_rate: float32 scalar tensor.
        decay: list of floats, of each variable, that the rate is times.
    """
    raise NotImplementedError


def put_back(left_out, kept):
    """Assigns variables their values before, where a step is left out.

    Args:
        left_out: bool scalar tensor.
        kept: list of pairs of a variable and its value before.
    """
    for variable, value in kept:
        variable.assign(ops.where(left_out, value, variable.value))


def to_device(batch):
    """A batch of arrays, on its way to the device; waits for nothing."""
    return batch


def send_logs(logs):
    """The logs of a step, on their way to the host; waits for nothing."""
    return logs


@contextlib.contextmanager
def queueing():
    """Within it, numbers go to the device without waiting for it."""
    yield


def export_options(rank_by_input):
    """What `Model.export` needs for axes of any length, beyond a signature.

    Args:
        rank_by_input: dictionary from an input's name to its number of axes.
    """
    return {}
