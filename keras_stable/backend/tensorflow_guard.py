"""Steps that are left out, on TensorFlow: what they change is put back."""

import tensorflow as tf

from keras_stable.backend import internals
from keras_stable.backend import whole_steps


def give_numbers(args, numbers, store):
    """The arguments of a train function, with numbers for its next step.

    In a variable that the program reads: it is not traced anew when they
    change.
    """
    if "variable" not in store:
        store["variable"] = tf.Variable(numbers, False, dtype="float32")
    elif store["numbers"] != numbers:
        store["variable"].assign(numbers)
    store["numbers"] = numbers
    return args


def guarded(model, train_step, guard):
    """A `train_step` that changes nothing if the guard leaves it out."""

    def step(data):
        metrics = model._compile_metrics
        if metrics is not None and not metrics.built:
            # Their variables would else be made within this very step.
            with tf.init_scope():
                model._symbolic_build(data_batch=_shapes(data))
        variables = internals.moving_variables(model)
        variables = [*variables, *model.metrics_variables]
        kept = [(v, tf.identity(v.value)) for v in variables]
        guard.begin(tf.unstack(guard.store["variable"].read_value()), kept)
        logs = train_step(data)
        guard.end()
        return logs

    return step


def put_back(left_out, kept):
    """Assigns variables their values before, where a step is left out.

    Args:
        left_out: bool scalar tensor.
        kept: list of pairs of a variable and its value before.
    """
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        put_back_everywhere(left_out, kept)
    else:
        whole_steps.put_back(left_out, kept)


def put_back_everywhere(left_out, kept):
    """The same within a replica: each puts back what it has itself.

    To assign would average, or add up, what all of them have.
    """

    def assign(variable, before, left_out):
        variable.assign(tf.where(left_out, before, variable))

    def put_back(strategy, left_out, befores):
        for variable, before in zip(variables, befores):
            arguments = before, left_out
            strategy.extended.update(variable, assign, arguments, group=False)

    variables = [v.value for v, _ in kept]
    context = tf.distribute.get_replica_context()
    context.merge_call(put_back, (left_out, [x for _, x in kept]))


def _shapes(data):
    return tf.nest.map_structure(
        lambda x: x if x is None else tf.TensorSpec(x.shape, x.dtype), data
    )


def apply_unless(left_out, apply):
    """Calls `apply` within the step unless `left_out`, a tensor or None."""
    if left_out is None:
        apply()
        return

    def update():
        apply()
        return tf.constant(True)

    tf.cond(left_out, lambda: tf.constant(False), update)
