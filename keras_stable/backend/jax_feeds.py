"""Copies of a training's state, and batches of ours, on JAX."""

import jax
import keras
import numpy as np
from jax import numpy as jnp
from keras.src.backend.jax.trainer import _distribute_data
from keras.src.trainers.data_adapters import data_adapter_utils

from keras_stable.backend.internals import standardized


@jax.jit
def _copies(values):
    return [jnp.copy(value) for value in values]


def start_copies(variables):
    """Begins to copy variables' values to the host, and returns at once.

    What the values become afterwards, in place or not, is not seen.
    """
    groups = {}
    for i, variable in enumerate(variables):
        value = variable.value
        # A program is of one set of devices.
        devices = frozenset(value.sharding.device_set)
        groups.setdefault(devices, []).append((i, value))
    copies = [None] * len(variables)
    for group in groups.values():
        places, values = zip(*group)
        # The step that comes next is given these buffers to write to.
        for i, copy in zip(places, _copies(list(values))):
            copies[i] = copy
    return copies


def finish_copies(copies):
    """The values as numpy arrays, waiting for the device if need be.

    To be called once; may be called by another thread.
    """
    arrays = []
    for i, copy in enumerate(copies):
        # One after the other, in the stream of such copies: what a monitor
        # reads comes through the same, and would wait for all of them. (By
        # `device_put` to pinned memory they would be in that of the steps.)
        arrays.append(np.asarray(copy))
        # Each device array goes as soon as it is here.
        copies[i] = copy = None
    return arrays


def replace_batches(args, take, steps, store):
    """Arguments of a train function that train on other batches.

    Of `fit`'s own, one is passed over for each: so an epoch ends where it
    would have ended.

    Args:
        args: tuple, what the train function was called with.
        take: function without arguments, returns the next batch.
        steps: int. How many batches an execution takes at most.
        store: dictionary that is kept from call to call.
    """
    state, iterator = args

    def batches():
        for _ in iterator:
            batch = standardized(take())
            (batch,) = data_adapter_utils.get_jax_iterator([batch])
            distributed = keras.distribution.distribution() is not None
            if distributed or jax.default_backend() != "cpu":
                batch = _distribute_data(batch)
            yield batch

    return state, batches()
