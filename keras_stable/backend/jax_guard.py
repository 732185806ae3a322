"""Steps that are left out, on JAX: the state is chosen at their end."""

import jax
import keras
import numpy as np
from jax import numpy as jnp

from keras_stable.backend.jax_mesh import platform


def give_numbers(args, numbers, store):
    """The arguments of a train function, with numbers for its next step.

    They travel with the batch: a program that is given them is not compiled
    anew when they change.
    """
    state, iterator = args
    if store.get("numbers") != numbers:
        array = np.array(numbers, "float32")
        if keras.distribution.distribution() is None:
            # There once, and not once a step.
            array = jax.device_put(array)
        store.update(numbers=numbers, array=array)
    array = store["array"]
    return state, map(lambda batch: (batch, array), iterator)


def guarded(model, train_step, guard):
    """A `train_step` whose state is the old one if the guard leaves it out."""

    def step(state, data):
        data, numbers = data
        # Metrics are put back where their results are computed.
        kept = zip(model.metrics_variables, state[3])
        guard.begin((numbers[0], numbers[1], numbers[2]), kept)
        logs, new = train_step(state, data)
        left_out = guard.end()
        if left_out is None:
            return logs, new
        return logs, (*_choose(left_out, state[:3], new[:3]), new[3])

    return step


def _choose(left_out, before, after):
    """The state before the step or that after it."""
    if platform() == "cpu":
        # A choice that is fused with the update would change its last bits.
        return jax.lax.cond(
            left_out, lambda a, b: a, lambda a, b: b, before, after
        )
    # Fused with the update: no memory for a second state.
    return jax.tree.map(lambda a, b: jnp.where(left_out, a, b), before, after)
