"""Several models in one program: what `train_many` needs of JAX."""

import jax
import keras
import numpy as np
from jax import numpy as jnp

from keras_stable.backend import internals
from keras_stable.backend.jax_mesh import platform


class _Table(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that looks up what another gives, step by step."""

    def __init__(self, rates):
        self.rates = rates

    def __call__(self, step):
        step = keras.ops.convert_to_tensor(step)
        return jnp.take(self.rates, step, mode="clip")


def _over(vectorised):
    """Maps a function over the first axis of its arguments.

    As one batched program, or as a loop: on a CPU, batches of small products
    are slower than those products, and one run's state stays in its cache.
    """
    if vectorised is None:
        vectorised = platform() != "cpu"
    if vectorised:
        return jax.vmap

    def loop(function):
        return lambda *args: jax.lax.map(lambda one: function(*one), args)

    return loop


def _stack(trees):
    # On the host: no program has to be compiled for it.
    return jax.tree.map(
        lambda *x: jnp.array(np.stack([np.asarray(y) for y in x])), *trees
    )


class Stack:
    """Models of one architecture, trained by one program.

    The code that is traced is the first one's. What may differ enters the
    program as numbers: state, batch, schedule's values and its peak.

    Args:
        models: list of K models, built and compiled.
        sample: a batch, by which they are built as `fit` builds them.
        steps: int. Batches that each will see, at most.
        vectorised: bool. Whether the program is batched (`vmap`) or loops
            over the models. Defaults to None: a loop on a CPU.
    """

    def __init__(self, models, sample, steps, vectorised=None):
        for model in models:
            model._symbolic_build(data_batch=sample)
            model.reset_metrics()
        self._models, self._model = models, models[0]
        self._over, self._state = _over(vectorised), None
        steps += max(internals.batches_seen(m.optimizer) for m in models)
        self._inputs = _stack([_rates(m.optimizer, steps) for m in models])
        self._rows = jax.jit(
            lambda tree, at: jax.tree.map(lambda x: x[at], tree)
        )

    def install(self):
        """Lets the first model's train function be that of all.

        Returns:
            A function that undoes it.
        """
        return internals.replace(self._model, "make_train_function", self._make)

    def _make(self, force=False):
        model = self._model
        if model.train_function is not None and not force:
            return
        step, optimizer = model.train_step, model.optimizer

        def one(state, data):
            batch, inputs = data
            schedule = None
            if "rates" in inputs:
                schedule = _Table(inputs["rates"])
            peak = inputs.get("peak")
            with internals.learning_at(optimizer, schedule, peak):
                return step(state, batch)

        many = jax.jit(self._over(one), donate_argnums=0)
        model.train_function = model._make_function(many)

    def begin(self):
        """Takes the models' states; theirs are freed until `release`."""
        self._state = _stack([_state(model) for model in self._models])
        for model in self._models:
            _state(model, purge_model_variables=True)

    def step(self, batch):
        """Trains each model on its row of a batch; does not wait for it."""
        data = (batch, self._inputs)
        function = self._model.train_function
        _, self._state = function(self._state, iter([data]))

    def release(self, row, model):
        """Gives a model the state in a row of the stack."""
        if self._state is None:
            return
        state = self._rows(self._state, row)
        for variables, values in zip(_variables(model), state):
            for variable, value in zip(variables, values):
                variable.assign(value)

    def keep(self, rows):
        """Forgets all rows but these."""
        rows = np.array(rows)
        self._state = self._rows(self._state, rows)
        self._inputs = self._rows(self._inputs, rows)


def _variables(model):
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )


def _state(model, **kwargs):
    names = (
        "trainable_variables non_trainable_variables optimizer_variables "
        "metrics_variables"
    )
    return model._get_jax_state(**dict.fromkeys(names.split(), True), **kwargs)


def _rates(optimizer, steps):
    """What a program must be given of an optimizer's learning rate.

    One that is a number is a variable of the optimizer, so in the state.
    """
    schedule, peak = internals.learning_of(optimizer)
    found = {}
    if schedule is not None:
        rates = jax.jit(jax.vmap(schedule))(jnp.arange(steps))
        found["rates"] = np.asarray(rates, "float32")
    if peak is not None:
        found["peak"] = np.float32(peak)
    return found


def losses_of_many(models, batches, vectorised=None):
    """The losses of batches, of several models in one program.

    Args:
        models: list of K.
        batches: iterable of n batches, the same for all.
        vectorised: as in `Stack`.

    Returns:
        float array (K, n).
    """
    test_step, over = models[0].test_step, _over(vectorised)

    def many(states, batch):
        def one(state):
            return test_step(state, batch)[0]["batch_loss"]

        return over(one)(states)

    many = jax.jit(many)
    states = []
    for model in models:
        weights, others, _, metrics = _state(model)
        states.append((weights, others, metrics))
    states = _stack(states)
    found = [many(states, batch) for batch in batches]
    return np.stack([np.asarray(x, "float64") for x in found], axis=1)
