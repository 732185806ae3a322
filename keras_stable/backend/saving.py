"""What a checkpoint needs of the backends: Orbax, processes, seeds.

Orbax is built on jax: jax arrays are saved shard by shard by the processes
that hold them, and restored for whatever mesh there is; arrays of torch and
TensorFlow go through numpy.
"""

import contextlib
import itertools
import os
import re

import keras
import numpy as np
from keras import ops
from keras.src.random import seed_generator

from keras_stable import backend

JAX = keras.backend.backend() == "jax"
TORCH = keras.backend.backend() == "torch"
# Seconds that processes wait for each other to have written.
PATIENCE = 300
_told, _stops = itertools.count(), {}  # The same in all processes.
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


def variables_of(model, metrics=False):
    """All variables of a model and its optimizer by a unique name.

    In step with training: on jax, `fit` keeps their values to itself. Names
    do not have the numbers that Keras gives to the second in a process.

    Args:
        model: built and compiled.
        metrics: bool. Whether those of its metrics are among them.
    """
    with contextlib.suppress(AttributeError):
        model.jax_state_sync()
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    found = {}
    owned = {"model": model.variables, "optimizer": optimizer.variables}
    if metrics:
        owned["metrics"] = model.metrics_variables
    for kind, variables in owned.items():
        for variable in variables:
            if 0 not in variable.shape:  # There is nothing to save.
                path = SEED.sub("seed_generator", variable.path)
                if kind == "optimizer":
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
    """Joins processes that train together, where no launcher does.

    To be called before anything else; then `set_distribution`. As
    `keras.distribution.initialize`, but for the heartbeat, and for torch.

    Args:
        address: `"host:port"` of the first process.
        count, index: int. How many there are, and which this one is.
        heartbeat_seconds: int. On jax the others end with an error so long
            after one has died, at the latest; on torch they end when they
            next wait for it. Defaults to 100.

    Raises:
        ValueError: on TensorFlow, which does not join processes.
    """
    if JAX:
        import jax

        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=index,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    elif TORCH:
        host, _, port = address.rpartition(":")
        # As `torchrun` sets them.
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        os.environ |= {"RANK": str(index), "WORLD_SIZE": str(count)}
        os.environ.setdefault("LOCAL_RANK", str(index))
    else:
        raise ValueError(
            "Several processes train together on jax and torch. Received: "
            f"KERAS_BACKEND={keras.backend.backend()}"
        )


def _store():
    """What processes of torch tell each other goes through it."""
    import torch

    return torch.distributed.distributed_c10d._get_default_store()


def _tell(number, failed):
    """The first process's pair of integers, in all."""
    if JAX:
        from jax.experimental import multihost_utils

        told = np.array([number, failed])
        return multihost_utils.broadcast_one_to_all(told).tolist()
    key = f"keras_stable/told/{next(_told)}"
    if backend.is_writer():
        _store().set(key, f"{number} {int(failed)}")
    return [int(text) for text in _store().get(key).split()]


def agree_on(find):
    """What the writer finds: `(number, details)`, the number in all processes.

    Args:
        find: function that returns those; what it raises is raised in all.
    """
    if backend.processes() == 1:
        return find()
    number, details, error = -1, {}, None
    if backend.is_writer():
        try:
            number, details = find()
        except ValueError as found:
            error = found
    number, failed = _tell(number, error is not None)
    if failed:
        raise error or ValueError("The first process says what is wrong.")
    return number, details


def takes_sigterm():
    """Whether the backend itself handles SIGTERM: jax in several processes."""
    return JAX and backend.processes() > 1


def agreed_to_stop(step, begin, stop):
    """Whether all processes stop before this step, as one was told to.

    None waits for the others or for a device. jax has a protocol for it; on
    torch the first that is told names the third step from there: all hear of
    it before, for none can make a step without the others.

    Args:
        step, begin: int. Steps made, now and when `fit` began.
        stop: bool. Whether this process was sent a signal.
    """
    if backend.processes() == 1:
        return stop
    if JAX:
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
    key = f"keras_stable/stop/{begin}"
    if key not in _stops:
        if stop:
            _store().compare_set(key, "", str(step + 3))
        if not _store().check([key]):
            return False
        # Not asked for again: the first process, which has it, may be gone.
        _stops[key] = int(_store().get(key))
    return step >= _stops[key]


def default_seed():
    """The variable behind `keras.random` where no seed is given."""
    return seed_generator.global_seed_generator().state


def native_seeds():
    """States of the backend's own generators, which torch's dropout uses."""
    if not TORCH:
        return None
    import torch

    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return [state.numpy().tobytes().hex() for state in states]


def set_native_seeds(states):
    """Sets what `native_seeds` returned, on as many devices as there are."""
    if not TORCH or states is None:
        return
    import torch

    states = [
        torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8)
        for state in states
    ]
    torch.set_rng_state(states[0])
    for device, state in zip(range(torch.cuda.device_count()), states[1:]):
        torch.cuda.set_rng_state(state, device)
