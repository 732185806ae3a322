"""What a checkpoint needs of the backends: Orbax, processes, seeds.

Orbax is built on jax: jax arrays are saved shard by shard by the processes
that hold them, and restored for whatever mesh there is; arrays of torch and
TensorFlow go through numpy.
"""

import contextlib
import re

import keras
import numpy as np
from keras import ops
from keras.src.random import seed_generator

JAX = keras.backend.backend() == "jax"
# Seconds that processes wait for each other to have written.
PATIENCE = 300
SEED = re.compile(r"\bseed_generator_\d+")


def orbax():
    """The package, imported when it is needed: that takes a second."""
    try:
        if not JAX:
            import jax

            # No memory of an accelerator for it: the backend's own has that.
            if not jax.config.jax_platforms:
                jax.config.update("jax_platforms", "cpu")
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "Checkpoints are written by Orbax: pip install orbax-checkpoint"
        ) from error
    return ocp


def checkpointer(patience=PATIENCE):
    """What `save_arrays` and `load_arrays` take."""
    ocp = orbax()
    return ocp.AsyncCheckpointer(
        ocp.StandardCheckpointHandler(),
        async_options=ocp.AsyncOptions(timeout_secs=patience),
    )


def variables_of(model):
    """All variables of a model and its optimizer by a unique name.

    In step with training: on jax, `fit` keeps their values to itself. Names
    do not have the numbers that Keras gives to the second in a process.
    """
    with contextlib.suppress(AttributeError):
        model.jax_state_sync()
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    found = {}
    for kind, owner in (("model", model), ("optimizer", optimizer)):
        for variable in owner.variables:
            if 0 not in variable.shape:  # There is nothing to save.
                path = SEED.sub("seed_generator", variable.path)
                if owner is optimizer:
                    path = path.partition("/")[2]
                name = f"{kind}/{path}"
                while name in found:
                    name += "+"
                found[name] = variable
    return found


def _all_finite(values):
    return ops.stack([ops.all(ops.isfinite(value)) for value in values])


def not_finite(variables):
    """Names of those with an entry that is not finite."""
    names = [n for n, v in variables.items() if "float" in v.dtype]
    if not names:
        return []
    values = [variables[name].value for name in names]
    if JAX:
        import jax

        # One program: several at a time, whose order differs from process to
        # process, would wait for each other.
        finite = jax.jit(_all_finite)(values)
    else:
        finite = _all_finite(values)
    finite = ops.convert_to_numpy(finite)
    return [name for name, good in zip(names, finite) if not good]


def save_arrays(checkpointer, path, variables):
    """Begins to save; returns when the values are copied."""
    tree = {
        name: v.value if JAX else np.array(ops.convert_to_numpy(v))
        for name, v in variables.items()
    }
    args = orbax().args.StandardSave(tree)
    checkpointer.save(path.resolve(), args=args, force=True)


def load_arrays(checkpointer, path, variables):
    """Reads the values of the variables, as this mesh wants them."""

    def wanted(variable):
        if not JAX:
            dtype = ops.convert_to_numpy(variable).dtype
            return np.empty(variable.shape, dtype)
        import jax

        value = variable.value
        return jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=value.sharding
        )

    tree = {name: wanted(v) for name, v in variables.items()}
    args = orbax().args.StandardRestore(tree)
    return checkpointer.restore(path.resolve(), args=args)


def join_processes(address, count, index, heartbeat_seconds=100):
    """Joins the processes that train together, before anything else.

    As `keras.distribution.initialize`, but for the heartbeat: when a process
    dies, the others end with an error after that time at the latest.

    Args:
        address: `"host:port"` of the first process.
        count, index: int. How many there are, and which this one is.
        heartbeat_seconds: int. Defaults to 100.

    Raises:
        ValueError: on torch and TensorFlow, whose processes Keras does not
            join.
    """
    if not JAX:
        raise ValueError(
            "Several processes train together on jax alone. Use "
            f"KERAS_BACKEND=jax. Received: {keras.backend.backend()}"
        )
    import jax

    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=count,
        process_id=index,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )


def process_count():
    """How many processes train together."""
    if not JAX:
        return 1
    import jax

    return jax.process_count()


def agree_on(find):
    """What the writer finds: `(number, details)`, the number in all processes.

    Args:
        find: function that returns those; what it raises is raised in all.
    """
    if process_count() == 1:
        return find()
    import jax
    from jax.experimental import multihost_utils

    number, details, error = -1, {}, None
    if jax.process_index() == 0:
        try:
            number, details = find()
        except ValueError as found:
            error = found
    told = np.array([number, error is not None])
    number, failed = multihost_utils.broadcast_one_to_all(told).tolist()
    if failed:
        raise error or ValueError("The first process says what is wrong.")
    return number, details


def agreed_to_stop(step):
    """Whether a process was sent SIGTERM, and this step is the one to stop at.

    jax's own protocol: all processes get the same answer at the same step,
    without waiting for the devices.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def default_seed():
    """The variable behind `keras.random` where no seed is given."""
    return seed_generator.global_seed_generator().state


def native_seeds():
    """States of the backend's own generators, which torch's dropout uses."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return [state.numpy().tobytes().hex() for state in states]


def set_native_seeds(states):
    """Sets what `native_seeds` returned, on as many devices as there are."""
    if keras.backend.backend() != "torch" or states is None:
        return
    import torch

    states = [
        torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8)
        for state in states
    ]
    torch.set_rng_state(states[0])
    for device, state in zip(range(torch.cuda.device_count()), states[1:]):
        torch.cuda.set_rng_state(state, device)
