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
    # The program writes to pinned memory itself: nothing more of the device's
    # is taken, and it is done after a fraction of a step. Copies of its arrays
    # would take as much, and their reading holds up what a monitor reads.
    host = jax.memory.Space.Host
    return [jax.device_put(jnp.copy(value), host) for value in values]


def start_copies(variables):
    """Begins to copy variables' values to the host, and returns at once.

    What the values become afterwards, in place or not, is not seen.
    """
    groups = {}
    for i, variable in enumerate(variables):
        value = variable.value
        # What each device has whole takes up the host's memory once.
        if value.is_fully_replicated:
            value = value.addressable_data(0)
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
        # In memory of its own: what is pinned waits for the next copies.
        arrays.append(np.array(copy))
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
