"""Training steps compiled for devices that are not here."""

import contextlib
import os
import re

import jax
import keras
from jax.experimental import topologies
from keras.src.backend import StatelessScope
from keras.src.backend.common import global_state

from keras_stable.backend.internals import replace


def devices_of(topology):
    """The devices of a topology, which need not exist.

    Args:
        topology: `"v5p:8x8x8"`, TPU chips and how they are connected, or
            `"cpu:8"`.

    Raises:
        ValueError: if there is none of this name.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu":
        found = jax.devices("cpu")
        if not shape.isdigit() or not 0 < int(shape) <= len(found):
            raise ValueError(
                f"There are {len(found)} devices in {topology!r}: set "
                "XLA_FLAGS=--xla_force_host_platform_device_count=N before "
                "jax starts."
            )
        return found[: int(shape)]
    # There is no machine to ask, and others here may be compiling too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # What it would look for, and complain of; not what is compiled for.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    try:
        found = topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:
        raise ValueError(
            f"No topology {topology!r}: a TPU's is written as v5e:2x4 or "
            "v5p:8x8x8, and needs `pip install 'keras-stable[tpu]'`; "
            f"cpu:N is N devices of this machine. ({error})"
        ) from error
    return found


@contextlib.contextmanager
def _without_values():
    """Within it, variables have shapes and layouts and no values."""
    original = keras.Variable.__init__

    def init(self, initializer, shape=None, dtype=None, **kwargs):
        if not (callable(initializer) or isinstance(initializer, str)):
            # Keras defers initializers, not numbers.
            number = keras.ops.convert_to_tensor(initializer, dtype)
            shape, dtype = number.shape, dtype or number.dtype
            initializer = _always(number)
        original(self, initializer, shape=shape, dtype=dtype, **kwargs)

    waiting = global_state.get_global_attribute("uninitialized_variables")
    before = list(waiting or [])
    keras.Variable.__init__ = init
    try:
        with StatelessScope(initialize_variables=False):
            yield
    finally:
        keras.Variable.__init__ = original
        # Or the next scope's end would initialize them all.
        global_state.set_global_attribute("uninitialized_variables", before)


def _always(number):
    return lambda shape, dtype=None: number


def _abstract(variable):
    """Gives a variable its layout, and a shape for a value."""
    variable._initialize_layout()
    sharding = variable._layout and variable._layout.backend_layout
    variable._value = jax.ShapeDtypeStruct(
        variable.shape, variable.dtype, sharding=sharding
    )


def without_weights(build, batch):
    """A compiled model as `build` makes it, whose variables have no values.

    It is made inside a stateless scope, in which Keras defers what variables
    are initialized with, for ever: a model of any size takes no memory.

    Args:
        build: function without arguments that returns a compiled model.
        batch: what `shapes_of` returned.

    Returns:
        The model. `compile_step` is all that it is good for.
    """
    with _without_values():
        model = build()
        # Slots of the optimizer take theirs from their weights.
        for variable in model.variables:
            variable._initialize_layout()
        model._symbolic_build(data_batch=batch)
    variables = model.variables + model.optimizer.variables
    for variable in variables + model.metrics_variables:
        _abstract(variable)
    return model


def shapes_of(batch):
    """A batch of numpy arrays as shapes, laid out as `fit` would.

    Args:
        batch: pytree of objects with `shape` and `dtype`.
    """
    distribution = keras.distribution.distribution()

    def one(x):
        layout = distribution and distribution.get_data_layout(x.shape)
        sharding = layout and layout.backend_layout
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return keras.tree.map_structure(one, batch)


def _bytes(x):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    size = jax.numpy.dtype(x.dtype).itemsize
    for n in shape:
        size *= n
    return size


def compile_step(model, batch, effort=None):
    """Compiles the step that `fit` would run, for the model's devices.

    Args:
        model: of `without_weights`; may be watched.
        batch: of `shapes_of`.
        effort: float from -1 to 1, how hard the compiler tries, or None for
            what it does in `fit`.

    Returns:
        Dictionary: `text`, the program; `state`, bytes on one device by what
        they are; `memory`, bytes on one device as the compiler counts them:
        arguments, outputs, those of them that overwrite arguments, temporary
        ones, and the program's own.

    Raises:
        MemoryError: if it does not fit; its `args` are a message and, if the
            compiler tells, the bytes needed and those there are.
    """
    lowered = []
    original = model._make_function

    def make_function(step, *args, **kwargs):
        def lower(state, data):
            lowered.append(step.lower(state, data))
            logs, state = lowered[-1].out_info
            return logs, state

        return original(lower, *args, **kwargs)

    undo = replace(model, "_make_function", make_function)
    try:
        model.train_function = None
        model.make_train_function()
        state = model._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=True,
            metrics_variables=True,
        )
        model.train_function(state, iter([batch]))
    finally:
        undo()
        model.train_function = None
    try:
        options = {"exec_time_optimization_effort": effort}
        compiled = lowered[-1].compile(None if effort is None else options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(*_shortage(str(error))) from error
    trainable, others, slots, metrics = state
    found = compiled.memory_analysis()
    names = "argument output alias temp generated_code"
    return {
        "text": compiled.as_text(),
        "state": {
            "weights": sum(map(_bytes, trainable)),
            "optimizer": sum(map(_bytes, slots)),
            "other state": sum(map(_bytes, others + metrics)),
            "batch": sum(map(_bytes, keras.tree.flatten(batch))),
        },
        "memory": {
            name: getattr(found, f"{name}_size_in_bytes")
            for name in names.split()
        },
    }


# Two ways in which the compilers of TPUs say it.
_SHORTAGES = (
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)",
    r"\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)",
)


def _shortage(message):
    """The compiler's first sentence, bytes needed, and bytes there are."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    first = message.splitlines()[0][:300]
    for pattern in _SHORTAGES:
        found = re.search(pattern, message)
        if found:
            needed, capacity = (
                int(float(found[i]) * units[found[i + 1]]) for i in (1, 3)
            )
            return first, needed, capacity
    return (first,)
