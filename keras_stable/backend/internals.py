"""What keras_stable touches of Keras's internals, in one place.

Each function says what it relies on; `tests/test_watch.py` pins it.
"""

import contextlib

import keras
from keras import ops
from keras.src import ops as source_ops

# What each backend's module defines: all of them, and nothing else is exported.
FUNCTIONS = [
    "Stack",
    "add_product",
    "add_slice",
    "apart",
    "attention_kernel",
    "carry",
    "check_observable",
    "compile_step",
    "constant",
    "device_name",
    "devices_of",
    "distribute",
    "each_step",
    "export_options",
    "finish_copies",
    "finish_read",
    "flash_attention",
    "fused",
    "fuses_adamw",
    "fuses_attention",
    "gather",
    "gelu",
    "give_numbers",
    "global_mean",
    "guarded",
    "is_writer",
    "keep_programs",
    "local_rows",
    "losses_of_many",
    "matmul_float32",
    "mean_ratios",
    "merge",
    "of_all",
    "must_merge",
    "number",
    "observe_updates",
    "operation",
    "peak_memory",
    "put_back",
    "queueing",
    "processes",
    "reachable",
    "reduce_rows",
    "region",
    "rehearse",
    "replace_batches",
    "replicas",
    "scan",
    "sees_a_part",
    "send_logs",
    "shapes_of",
    "square_sums",
    "start_copies",
    "start_read",
    "to_device",
    "undistribute",
    "update_adamw",
    "with_gradient",
    "without_gradient",
    "without_weights",
]


def standardized(batch):
    """A batch as Keras hands it on: a dictionary, or `(x, y, weights)`."""
    if isinstance(batch, (list, tuple)):
        return tuple(batch)
    return batch if isinstance(batch, dict) else (batch,)


def check_shares(batch_size, count, what="devices"):
    """Raises unless a batch divides evenly."""
    if batch_size % count:
        raise ValueError(
            f"The batch must be a multiple of the {count} {what} it is "
            f"divided among. Received: batch size {batch_size}"
        )


def check_data(name, backend):
    """Raises unless a distribution is what torch and TensorFlow have."""
    if name != "data":
        raise ValueError(
            f"On {backend} there is no distribution {name!r}, only 'data'. "
            "Use KERAS_BACKEND=jax."
        )


# Every module through which models reach the fused attention.
_ATTENTION_MODULES = (ops, ops.nn, source_ops, source_ops.nn)


def replace(owner, name, value):
    """Sets an attribute of one object; returns a function that undoes it.

    Past Keras's and torch's `__setattr__`, which would track the value.
    """
    attributes = vars(owner)
    missing = object()
    before = attributes.get(name, missing)
    attributes[name] = value

    def undo():
        if before is missing:
            attributes.pop(name, None)
        else:
            attributes[name] = before

    return undo


@contextlib.contextmanager
def intercept_attention(observe):
    """Calls `observe(query, key, **how)` wherever Keras's fused attention is.

    `how` is `scale`, `mask`, `is_causal` and `cap`, defaults resolved.
    """
    original = ops.dot_product_attention

    def dot_product_attention(query, key, value, *args, **kwargs):
        names = ("bias", "mask", "scale", "is_causal", "flash_attention")
        given = {**dict(zip(names, args)), **kwargs}
        if not keras.backend.is_keras_tensor(query):
            scale = given.get("scale")
            observe(
                query,
                key,
                scale=query.shape[-1] ** -0.5 if scale is None else scale,
                mask=given.get("mask"),
                is_causal=bool(given.get("is_causal")),
                cap=given.get("attn_logits_soft_cap"),
            )
        return original(query, key, value, *args, **kwargs)

    undo = [
        replace(module, "dot_product_attention", dot_product_attention)
        for module in _ATTENTION_MODULES
    ]
    try:
        yield
    finally:
        for function in undo:
            function()


def sublayers(layer):
    """A layer's own layers, in the order they were made."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def is_rematerialized(layer):
    """Whether the layer was made inside a `keras.RematScope`."""
    return layer._remat_mode is not None


def owns_matrix(layer):
    """Whether the layer itself has a weight of two dimensions or more."""
    own = layer._trainable_variables + layer._non_trainable_variables
    return any(len(v.shape) >= 2 for v in own)


def unwrapped(optimizer):
    """The optimizers that update variables: without loss scaling, each one."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return list(getattr(optimizer, "optimizers", None) or [optimizer])


def second_moments(optimizer):
    """`{id(variable): (v, beta_2)}` of Adam and its relatives."""
    found = {}
    for inner in unwrapped(optimizer):
        slots = getattr(inner, "_velocities", None)
        beta = getattr(inner, "beta_2", getattr(inner, "rho", None))
        if not slots or beta is None:
            continue
        for variable, slot in zip(inner._trainable_variables, slots):
            # A dictionary or None where another rule updates the variable.
            if slot is not None and hasattr(slot, "shape"):
                found[id(variable)] = (slot, beta)
    return found


def counts_gradients(optimizer, variable):
    """Whether a variable is learned by gradients (not so float8's scales)."""
    return not optimizer._overwrite_variable_with_gradient(variable)


def loss_scale(optimizer, read):
    """The factor of the loss that gradients still carry.

    Args:
        read: function from an optimizer's variable to its value.
    """
    if hasattr(optimizer, "dynamic_scale"):
        return read(optimizer.dynamic_scale)
    return getattr(optimizer, "loss_scale_factor", None) or 1.0


def accumulated(optimizer, gradients, variables, read):
    """Gradients as the optimizer is about to use them, and whether it will.

    Under gradient accumulation, the mean over the batches so far.

    Returns:
        `(gradients, updated)`; `updated` is True or a bool tensor.
    """
    (inner, *others) = unwrapped(optimizer)
    steps = inner.gradient_accumulation_steps
    if others or not steps:
        return gradients, True
    batch = ops.cast(read(inner._iterations), "int32") % steps
    count = ops.cast(batch + 1, "float32")
    means = []
    for gradient, variable in zip(gradients, variables):
        if gradient is not None:
            slot = inner._accumulated_gradients[
                inner._get_variable_index(variable)
            ]
            gradient = (ops.cast(gradient, "float32") + read(slot)) / count
        means.append(gradient)
    return means, ops.equal(batch, steps - 1)


def iterations(optimizer, read):
    """Updates made, a float32 tensor."""
    inner = unwrapped(optimizer)[0]
    count = ops.cast(read(inner._iterations), "float32")
    return count / float(inner.gradient_accumulation_steps or 1)


def batches_seen(optimizer):
    """How many batches an optimizer has had: 0 before it is built."""
    count = getattr(unwrapped(optimizer)[0], "_iterations", None)
    return 0 if count is None else int(ops.convert_to_numpy(count))


def forget_counts(optimizer):
    """Lets counts that are kept beside an optimizer's variables be made anew.

    For a time when these were assigned.
    """
    for inner in unwrapped(optimizer):
        vars(inner).pop("_counted", None)


def warmup_steps(optimizer):
    """Steps of warm-up of the learning rate's schedule, 0 if it tells none."""
    rate = getattr(unwrapped(optimizer)[0], "_learning_rate", None)
    return int(getattr(rate, "warmup_steps", None) or 0)


def learning_of(optimizer):
    """An optimizer's schedule and the peak of independent decay, or None.

    Raises:
        ValueError: for a learning rate that is a function without arguments.
    """
    (inner,) = unwrapped(optimizer)
    rate, peak = inner._learning_rate, getattr(inner, "peak_learning_rate", 0)
    schedules = keras.optimizers.schedules.LearningRateSchedule
    if isinstance(rate, schedules):
        return rate, peak or None
    if not isinstance(rate, keras.Variable):
        raise ValueError(
            "The learning rate must be a number or a schedule, whose values "
            f"are known before training. Received: {rate!r}"
        )
    return None, peak or None


@contextlib.contextmanager
def learning_at(optimizer, schedule, peak):
    """Within it, an optimizer has another schedule and peak, unless None."""
    (inner,) = unwrapped(optimizer)
    undo = []
    if schedule is not None:
        undo.append(replace(inner, "_learning_rate", schedule))
    if peak is not None:
        undo.append(replace(inner, "peak_learning_rate", peak))
    try:
        yield
    finally:
        for function in undo:
            function()


def multiply_rate(optimizer, factor):
    """Has `factor()` in an optimizer's learning rate, unless it is None.

    Returns:
        A function that undoes it.
    """
    undo = []
    for inner in unwrapped(optimizer):

        def current(original=inner._get_current_learning_rate):
            rate, times = original(), factor()
            if times is None or isinstance(times, float) and times == 1.0:
                return rate
            rate = ops.convert_to_tensor(rate)
            if not isinstance(times, float):
                times = ops.cast(times, rate.dtype)
            return rate * times

        undo.append(replace(inner, "_get_current_learning_rate", current))

    def undo_all():
        for function in undo:
            function()

    return undo_all


def moving_variables(model):
    """What a step may change besides weights that are learned, and metrics.

    Moving statistics, seeds of random numbers, vectors of power iterations;
    not weights that were frozen.
    """
    frozen = {
        id(v)
        for layer in model._flatten_layers()
        for v in layer._trainable_variables
    }
    found = model.non_trainable_variables
    return [v for v in found if id(v) not in frozen]


def clipping(optimizer):
    """`(kind, value)` of gradient clipping, or (None, None)."""
    inner = unwrapped(optimizer)[0]
    for kind in ("global_clipnorm", "clipnorm", "clipvalue"):
        if getattr(inner, kind, None):
            return kind, float(getattr(inner, kind))
    return None, None


def escaping_remat(layer, escaping):
    """Lets measured values out of a layer made inside a `RematScope`.

    Args:
        escaping: function from the layer's call to `(inner, record)`, or to
            None where nothing is measured.

    Returns:
        A function that undoes it.
    """
    original = layer.rematerialized_call

    def rematerialized_call(call, *args, **kwargs):
        found = escaping(call)
        if found is None:
            return original(call, *args, **kwargs)
        inner, record = found
        # `larger_than` asks for the layer's output spec, not for `inner`'s.
        run = original(inner, *args, **kwargs)

        def outer(*args, **kwargs):
            result, values = run(*args, **kwargs)
            record(values)
            return result

        return outer

    return replace(layer, "rematerialized_call", rematerialized_call)
