"""What keras_stable needs of JAX beyond Keras."""

import os

import jax
import keras
import numpy as np
from jax import numpy as jnp
from jax.experimental import mesh_utils

from keras_stable.backend.internals import FUNCTIONS
from keras_stable.backend.internals import check_shares
from keras_stable.backend.internals import replace
from keras_stable.backend.jax_feeds import finish_copies as finish_copies
from keras_stable.backend.jax_feeds import replace_batches as replace_batches
from keras_stable.backend.jax_feeds import start_copies as start_copies
from keras_stable.backend.jax_gradients import operation as operation
from keras_stable.backend.jax_gradients import with_gradient as with_gradient
from keras_stable.backend.jax_guard import give_numbers as give_numbers
from keras_stable.backend.jax_guard import guarded as guarded
from keras_stable.backend.jax_kernels import (
    attention_kernel as attention_kernel,
)
from keras_stable.backend.jax_kernels import flash_attention as flash_attention
from keras_stable.backend.jax_kernels import fuses_attention as fuses_attention
from keras_stable.backend.jax_many import Stack as Stack
from keras_stable.backend.jax_many import losses_of_many as losses_of_many
from keras_stable.backend.jax_mesh import number as number
from keras_stable.backend.jax_mesh import platform
from keras_stable.backend.jax_planning import compile_step as compile_step
from keras_stable.backend.jax_planning import devices_of as devices_of
from keras_stable.backend.jax_planning import shapes_of as shapes_of
from keras_stable.backend.jax_planning import without_weights as without_weights
from keras_stable.backend.whole_steps import add_slice as add_slice
from keras_stable.backend.whole_steps import export_options as export_options
from keras_stable.backend.whole_steps import fused as fused
from keras_stable.backend.whole_steps import fuses_adamw as fuses_adamw
from keras_stable.backend.whole_steps import put_back as put_back
from keras_stable.backend.whole_steps import queueing as queueing
from keras_stable.backend.whole_steps import region as region
from keras_stable.backend.whole_steps import rehearse as rehearse
from keras_stable.backend.whole_steps import send_logs as send_logs
from keras_stable.backend.whole_steps import to_device as to_device
from keras_stable.backend.whole_steps import update_adamw as update_adamw
from keras_stable.backend.whole_steps import (
    without_gradient as without_gradient,
)

__all__ = FUNCTIONS


def device_name():
    """Name and number of devices, e.g. `"NVIDIA H100 80GB HBM3 x 1"`."""
    devices = jax.devices()
    return f"{devices[0].device_kind} x {len(devices)}"


def distribute(name, batch_size, tensor_parallel, devices):
    """The devices as a mesh (batch, model), or None where there is none.

    Raises:
        ValueError: if this backend cannot distribute so, or if there are not
            as many devices or sequences as it takes.
    """
    devices = list(jax.devices() if devices is None else devices)
    model = 1
    if "tensor" in name:
        local = min(jax.local_device_count(), len(devices))
        model = local if name == "tensor" else min(2, len(devices))
        model = tensor_parallel or model
        if len(devices) % model:
            raise ValueError(
                f"`tensor_parallel` must divide the {len(devices)} devices. "
                f"Received: {model}"
            )
    shape = (len(devices) // model, model)
    check_shares(batch_size, shape[0])
    if all(getattr(device, "platform", None) == "tpu" for device in devices):
        # Neighbours next to each other, where the links are.
        return mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    return np.array(devices).reshape(shape)


def undistribute():
    """Ends what `distribute` began."""


def replicas():
    """How many parts of a loss Keras adds up."""
    return 1


def global_mean(x):
    """The mean over all processes; its gradient is that of `x`."""
    return x


def merge(tensors):
    """Gradients of the whole batch from those that copies of the model have.

    Args:
        tensors: list of tensors and None.
    """
    return tensors


def of_all(x):
    """What each copy of the model has of a vector: (copies, len)."""
    return x[None]


def sees_a_part(model):
    """Whether a step sees a part of the batch alone, one of several."""
    return False


def processes():
    """How many processes train one model."""
    return jax.process_count()


def must_merge():
    """Whether gradients differ between processes until `merge`."""
    return False


def local_rows(batch_size):
    """Which rows of a global batch this process feeds: int array."""
    distribution = keras.distribution.distribution()
    if distribution is None or jax.process_count() == 1:
        return np.arange(batch_size)
    layout = distribution.get_data_layout((batch_size,)).backend_layout
    places = layout.addressable_devices_indices_map((batch_size,)).values()
    return np.unique([np.arange(batch_size)[place] for place in places])


def apart(value, function, *tensors):
    """`value`, which is `function(*tensors)`, to be looked at.

    The model's own computation must not change by a bit, and does not here.
    """
    return value


def reachable(value, reference):
    """Whether `value` may be used where `reference` was made.

    Not so what was traced inside a nested function: remat, cond, scan.
    """
    trace = getattr(reference, "_trace", None)
    found = getattr(value, "_trace", None)
    while trace is not None:
        if trace is found:
            return True
        trace = getattr(trace, "parent_trace", None)
    return found is None


def square_sums(tensors, minus=None):
    """Sum of squares of each, or of its difference; float32 (len,).

    Written as in Keras's `global_norm`, so that XLA computes them once.
    """
    tensors = [x.astype("float32") for x in tensors]
    if minus is not None:
        tensors = [a - b.astype("float32") for a, b in zip(tensors, minus)]
    return jnp.stack([jnp.sum(jnp.square(x)) for x in tensors])


def mean_ratios(gradients, moments):
    """Mean of g^2 / v of each pair, float32 (len,)."""
    return jnp.stack(
        [
            jnp.mean(
                jnp.square(g.astype("float32"))
                / jnp.maximum(v.astype("float32"), 1e-30)
            )
            for g, v in zip(gradients, moments)
        ]
    )


def reduce_rows(x):
    """Sums of squares, largest magnitudes, sums and counts of bad entries.

    Args:
        x: floating point array (rows, dim).

    Returns:
        float32 array (4, rows), of finite entries but for the last.
    """
    finite = jnp.isfinite(x)
    y = jnp.where(finite, x.astype("float32"), 0.0)
    bad = 1.0 - finite.astype("float32")
    parts = (jnp.square(y), jnp.abs(y), y, bad)
    if platform() != "gpu":
        reductions = (jnp.sum, jnp.max, jnp.sum, jnp.sum)
        return jnp.stack([f(p, axis=1) for f, p in zip(reductions, parts)])

    def combine(a, b):
        return (a[0] + b[0], jnp.maximum(a[1], b[1]), a[2] + b[2], a[3] + b[3])

    # As one reduction, XLA reads the activation once and not four times.
    zeros = (np.float32(0),) * 4
    return jnp.stack(jax.lax.reduce(parts, zeros, combine, (1,)))


def add_product(total, a, b):
    """`total + a @ b`; float32. `total` may be overwritten."""
    return total + matmul_float32(a, b)


def matmul_float32(a, b):
    """`a @ b` of matrices, summed and returned in float32.

    Products of 16-bit numbers are exact in float32.
    """
    if platform() == "cpu":
        # It has no float16 products with float32 sums.
        a, b = a.astype("float32"), b.astype("float32")
    return jnp.matmul(a, b, preferred_element_type="float32")


def _normal(x):
    """Phi(x) within 1e-7, and exp(-x^2 / 2), which its gradient needs too.

    Formula 7.1.26 of Abramowitz and Stegun. XLA's `erf` takes four times as
    many instructions: with them, not memory, an MLP of a GPU was busy.
    """
    t = 1.0 / (1.0 + 0.3275911 * 0.5**0.5 * jnp.abs(x))
    bell = jnp.exp(-0.5 * jnp.square(x))
    series = 1.061405429
    for a in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + a
    tail = 0.5 * bell * t * series
    return jnp.where(x >= 0, 1.0 - tail, tail), bell


@jax.custom_vjp
def _gelu_16_bits(x):
    y = x.astype("float32")
    return (y * _normal(y)[0]).astype(x.dtype)


def _gelu_backward(x, upstream):
    y = x.astype("float32")
    phi, bell = _normal(y)
    slope = phi + y * bell * (2.0 * np.pi) ** -0.5
    return ((upstream.astype("float32") * slope).astype(x.dtype),)


_gelu_16_bits.defvjp(lambda x: (_gelu_16_bits(x), x), _gelu_backward)


def gelu(x):
    """`x * Phi(x)`, Phi the normal distribution function: the exact GELU."""
    if x.dtype in ("bfloat16", "float16"):
        return _gelu_16_bits(x)
    return jax.nn.gelu(x, approximate=False)


def constant(array):
    """A numpy array as a tensor. Torch keeps one of it: give it few arrays."""
    return jnp.asarray(array)


def scan(step, carry, inputs):
    """Calls `carry, output = step(carry, [x[i] for x in inputs])` for each i.

    One after the other, so that no two steps hold memory at a time.

    Returns:
        Tuple of the last carry and the stacked outputs.
    """
    return jax.lax.scan(step, carry, inputs)


def observe_updates(optimizer, before, after):
    """Calls `before` and `after` around each update of a compiled optimizer.

    `before(gradients, variables, read)` returns what `after(found, old, new,
    read)` is given as `found`; `read(v)` is the value of an optimizer's
    variable at that time, `old` and `new` are those of the trainable ones.

    Returns:
        A function that undoes it.
    """
    original = optimizer.stateless_apply

    def stateless_apply(optimizer_variables, grads, trainable_variables):
        def reader(values):
            known = {id(v): x for v, x in zip(optimizer.variables, values)}
            return lambda variable: known[id(variable)]

        variables = optimizer._trainable_variables
        found = before(grads, variables, reader(optimizer_variables))
        new, slots = original(optimizer_variables, grads, trainable_variables)
        after(found, trainable_variables, new, reader(slots))
        return new, slots

    return replace(optimizer, "stateless_apply", stateless_apply)


def carry(model, take):
    """Carries what the forward pass measured out of the gradient's trace.

    `compute_metrics` then gets `take(y_pred)`, a pytree, for its `y_pred`.

    Returns:
        A function that undoes it.
    """
    original = model.compute_loss_and_updates

    def compute_loss_and_updates(*args, **kwargs):
        loss, aux = original(*args, **kwargs)
        unscaled, y_pred, *states = aux
        return loss, (unscaled, take(y_pred), *states)

    return replace(model, "compute_loss_and_updates", compute_loss_and_updates)


def each_step(model, collect):
    """Calls `collect(logs)` after each compiled step, also of several in one
    execution.

    Returns:
        A function that undoes it.
    """
    original = model._make_function

    def make_function(step_function, *args, **kwargs):
        def step(state, data):
            logs, state = step_function(state, data)
            collect(logs)
            return logs, state

        return original(step, *args, **kwargs)

    return replace(model, "_make_function", make_function)


def gather(packed, steps, store):
    """The vector of one step: replicated, so that each process can read it."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return packed
    mesh = distribution.device_mesh
    layout = keras.distribution.TensorLayout([None] * packed.ndim, mesh)
    return keras.distribution.distribute_tensor(packed, layout)


def start_read(array):
    """Begins to copy an array to the host, and returns at once."""
    if hasattr(array, "copy_to_host_async"):
        array.copy_to_host_async()
    return array


def finish_read(array):
    """The array as numpy, waiting for the device if need be."""
    return np.asarray(array)


def check_observable(model, tables):
    """Raises where a model cannot be observed on this backend.

    Args:
        model: compiled.
        tables: bool. Whether full tables are measured.
    """


def is_writer():
    """Whether this process writes files: one of several does."""
    return jax.process_index() == 0


def keep_programs(directory):
    """Keeps compiled programs for the next process, where a compiler can.

    Args:
        directory: path of a folder, made if need be; None: nothing is kept.
    """
    if directory is None or jax.default_backend() == "cpu":
        # Quickly compiled, and for one processor's instructions alone.
        return
    path = os.path.join(os.fspath(directory), "jax")
    jax.config.update("jax_compilation_cache_dir", path)


def peak_memory():
    """Largest number of bytes in use on the device so far, None on a CPU."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")
