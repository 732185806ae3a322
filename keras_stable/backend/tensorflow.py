"""What keras_stable needs of TensorFlow beyond Keras."""

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from keras_stable.backend.internals import FUNCTIONS
from keras_stable.backend.internals import replace
from keras_stable.backend.jax_only import Stack as Stack
from keras_stable.backend.jax_only import attention_kernel as attention_kernel
from keras_stable.backend.jax_only import compile_step as compile_step
from keras_stable.backend.jax_only import devices_of as devices_of
from keras_stable.backend.jax_only import flash_attention as flash_attention
from keras_stable.backend.jax_only import losses_of_many as losses_of_many
from keras_stable.backend.jax_only import number as number
from keras_stable.backend.jax_only import shapes_of as shapes_of
from keras_stable.backend.jax_only import without_weights as without_weights
from keras_stable.backend.parts import check_part
from keras_stable.backend.tensorflow_feeds import finish_copies as finish_copies
from keras_stable.backend.tensorflow_feeds import (
    replace_batches as replace_batches,
)
from keras_stable.backend.tensorflow_feeds import start_copies as start_copies
from keras_stable.backend.tensorflow_guard import apply_unless
from keras_stable.backend.tensorflow_guard import give_numbers as give_numbers
from keras_stable.backend.tensorflow_guard import guarded as guarded
from keras_stable.backend.tensorflow_guard import put_back as put_back
from keras_stable.backend.tensorflow_guard import put_back_everywhere
from keras_stable.backend.tensorflow_replicas import distribute as distribute
from keras_stable.backend.tensorflow_replicas import global_mean as global_mean
from keras_stable.backend.tensorflow_replicas import local_rows as local_rows
from keras_stable.backend.tensorflow_replicas import merge as merge
from keras_stable.backend.tensorflow_replicas import must_merge as must_merge
from keras_stable.backend.tensorflow_replicas import of_all as of_all
from keras_stable.backend.tensorflow_replicas import processes as processes
from keras_stable.backend.tensorflow_replicas import replicas as replicas
from keras_stable.backend.tensorflow_replicas import sees_a_part as sees_a_part
from keras_stable.backend.tensorflow_replicas import (
    undistribute as undistribute,
)
from keras_stable.backend.whole_steps import add_slice as add_slice
from keras_stable.backend.whole_steps import export_options as export_options
from keras_stable.backend.whole_steps import fused as fused
from keras_stable.backend.whole_steps import fuses_adamw as fuses_adamw
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
    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        return "cpu x 1"
    details = tf.config.experimental.get_device_details(devices[0])
    return f"{details.get('device_name', 'GPU')} x {len(devices)}"


def apart(value, function, *tensors):
    """`function(*tensors)` computed again, where nothing else can use it.

    A second reader of `value` would change how the graph is optimised, and so
    the last bits of what the model computes from it.
    """
    tensors = [tf.stop_gradient(x) for x in tensors]
    return function(*(xla.optimization_barrier(x)[0] for x in tensors))


def reachable(value, reference):
    """Whether `value` may be used where `reference` was made.

    Not so what was traced inside a nested function: cond, while.
    """
    return getattr(value, "graph", None) is getattr(reference, "graph", None)


def square_sums(tensors, minus=None):
    """Sum of squares of each, or of its difference; float32 (len,)."""
    tensors = [tf.cast(x, "float32") for x in tensors]
    if minus is not None:
        tensors = [a - tf.cast(b, "float32") for a, b in zip(tensors, minus)]
    return tf.stack([tf.reduce_sum(tf.square(x)) for x in tensors])


def mean_ratios(gradients, moments):
    """Mean of g^2 / v of each pair, float32 (len,)."""
    return tf.stack(
        [
            tf.reduce_mean(
                tf.square(tf.cast(g, "float32"))
                / tf.maximum(tf.cast(v, "float32"), 1e-30)
            )
            for g, v in zip(gradients, moments)
        ]
    )


def reduce_rows(x):
    """Sums of squares, largest magnitudes, sums and counts of bad entries.

    Args:
        x: floating point tensor (rows, dim).

    Returns:
        float32 tensor (4, rows), of finite entries but for the last.
    """
    finite = tf.math.is_finite(x)
    y = tf.where(finite, tf.cast(x, "float32"), 0.0)
    bad = 1.0 - tf.cast(finite, "float32")
    return tf.stack(
        [
            tf.reduce_sum(tf.square(y), axis=1),
            tf.reduce_max(tf.abs(y), axis=1),
            tf.reduce_sum(y, axis=1),
            tf.reduce_sum(bad, axis=1),
        ]
    )


def add_product(total, a, b):
    """`total + a @ b`; float32. `total` may be overwritten."""
    return total + matmul_float32(a, b)


def matmul_float32(a, b):
    """`a @ b` of matrices, summed and returned in float32.

    Products of 16-bit numbers are exact in float32.
    """
    return tf.matmul(tf.cast(a, "float32"), tf.cast(b, "float32"))


def fuses_attention(query, masked):
    """Whether Keras's attention has no tensor of all logits.

    Args:
        query: tensor.
        masked: bool. Whether it is given a mask.
    """
    return False


def gelu(x):
    """`x * Phi(x)`, Phi the normal distribution function: the exact GELU."""
    # In 16 bits it would add up rounding errors.
    return tf.cast(tf.nn.gelu(tf.cast(x, "float32")), x.dtype)


def constant(array):
    """A numpy array as a tensor. Torch keeps one of it: give it few arrays."""
    return tf.constant(array)


def scan(step, carry, inputs):
    """Calls `carry, output = step(carry, [x[i] for x in inputs])` for each i.

    One after the other, so that no two steps hold memory at a time.

    Returns:
        Tuple of the last carry and the stacked outputs.
    """
    outputs = []
    for parts in zip(*(tf.unstack(x) for x in inputs)):
        with tf.control_dependencies(tf.nest.flatten(carry)):
            parts = [tf.identity(x) for x in parts]
            carry, output = step(carry, parts)
        outputs.append(output)
    return carry, tf.stack(outputs)


def with_gradient(function, x, w, *constants):
    """The first output of `function`, with the gradient that it computes.

    Args:
        function: of the tensors and of `gradient`, a bool. It returns a float32
            vector; with `gradient` a tuple of it and of the gradients of its
            first entry by `x` and `w`.
        x, w: tensors.
        *constants: tensors without gradients.
    """

    @tf.custom_gradient
    def value(x, w):
        result, gradients = function(x, w, *constants, gradient=True)

        def backward(upstream):
            return [
                tf.cast(g * upstream[0], t.dtype)
                for g, t in zip(gradients, (x, w))
            ]

        return result, backward

    return value(x, w)


def operation(name, forward, backward):
    """One operation, whose gradient is computed anew from its inputs.

    Args:
        name: string, unique.
        forward: `forward(tensors, *settings)` returns a list of tensors, of
            which only the first has a gradient.
        backward: `backward(tensors, upstream, *settings)` returns the
            gradients of the first tensors, for all that have one.

    Returns:
        Function of `tensors`, a list, and `settings`, a tuple of numbers,
        bools, None and tuples of them. It returns what `forward` does.
    """

    def run(tensors, settings):
        @tf.custom_gradient
        def call(*tensors):
            def pull(*upstream):
                found = backward(tensors, upstream[0], *settings)
                return [*found, *[None] * (len(tensors) - len(found))]

            return forward(tensors, *settings), pull

        return call(*tensors)

    return run


def observe_updates(optimizer, before, after):
    """Calls `before` and `after` around each update of a compiled optimizer.

    `before(gradients, variables, read)` returns what `after(found, old, new,
    read)` is given as `found`; `read(v)` is the value of an optimizer's
    variable at that time, `old` and `new` are those of the trainable ones.

    Returns:
        A function that undoes it.
    """
    original = optimizer.apply

    def read(variable):
        return tf.identity(variable.value)

    def apply(grads, trainable_variables=None):
        variables = trainable_variables or optimizer._trainable_variables
        if not optimizer.built:
            optimizer.build(variables)
        if replicas() > 1:
            update_all(grads, trainable_variables, variables)
            return
        dense = [g if g is None else tf.convert_to_tensor(g) for g in grads]
        found = before(dense, variables, read)
        old = [read(v) for v in variables]
        left_out = (found or {}).get("left_out")
        apply_unless(left_out, lambda: original(grads, trainable_variables))
        after(found, old, [read(v) for v in variables], read)

    def update_all(grads, trainable_variables, variables):
        grads = optimizer._merge(grads, variables)
        found = before(grads, variables, read)
        old = [read(v) for v in variables]
        slots = [(v, read(v)) for v in optimizer.variables]
        optimizer._apply_merged(grads, trainable_variables)
        left_out = (found or {}).get("left_out")
        if left_out is not None:
            # A condition cannot hold an update that replicas make together.
            put_back_everywhere(left_out, [*zip(variables, old), *slots])
        after(found, old, [read(v) for v in variables], read)

    return replace(optimizer, "apply", apply)


def carry(model, take):
    """Nothing to carry: the gradient is taken in the same trace."""
    return lambda: None


def each_step(model, collect):
    """Nothing to do: `gather` keeps the steps of one execution."""
    return lambda: None


def gather(packed, steps, store):
    """The vector of one step, or those of the last `steps` with a count.

    Several steps in one execution return the logs of the last alone: the
    others' wait in a variable, made while the first is traced.

    Args:
        packed: tensor (n,).
        steps: int. Steps in an execution.
        store: dictionary that keeps the variable.

    Returns:
        `packed`, or a tensor (steps + 1, n): the last row begins with the
        number of steps so far; step i, from 0, is in row i % steps.
    """
    if steps == 1:
        return packed
    size = packed.shape[0]
    if size not in store:
        with tf.init_scope():
            store[size] = tf.Variable(tf.zeros((steps + 1, size)))
    ring = store[size].read_value()
    count = ring[steps, 0]
    here = tf.one_hot(tf.cast(count, "int32") % steps, steps + 1)[:, None]
    ring = tf.where(here > 0, packed[None], ring)
    counter = tf.one_hot(steps, steps + 1)[:, None]
    counter = counter * tf.one_hot(0, size)[None]
    ring = tf.where(counter > 0, count + 1, ring)
    store[size].assign(ring)
    return ring


def start_read(array):
    """Nothing to begin: TensorFlow copies when asked."""
    return array


def finish_read(array):
    """The array as numpy, waiting for the device if need be."""
    return array.numpy()


def check_observable(model, tables):
    """Raises where a model cannot be observed on this backend.

    Args:
        model: compiled.
        tables: bool. Whether full tables are measured.
    """
    if not sees_a_part(model):
        return
    where = "Under `tf.distribute`, each replica"
    check_part(model.optimizer, tables, where)
    if model.steps_per_execution > 1:
        raise ValueError(
            "Under `tf.distribute`, steps are observed one by one: compile "
            "the model with `steps_per_execution=1`. Received: "
            f"{model.steps_per_execution}"
        )


def is_writer():
    """Whether this process writes files: one of several does."""
    resolver = tf.distribute.get_strategy().cluster_resolver
    return resolver is None or resolver.task_id in (0, None)


def keep_programs(directory):
    """Keeps compiled programs for the next process, where a compiler can.

    Args:
        directory: path of a folder, made if need be; None: nothing is kept.
    """
    # TensorFlow's reads its directory before it is imported.


def peak_memory():
    """Largest number of bytes in use on the device so far, None on a CPU."""
    if not tf.config.list_physical_devices("GPU"):
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]
