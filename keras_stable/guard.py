"""Leaving a bad batch out, inside the step that met it: `Guard`."""

import threading

from keras import ops

from keras_stable import backend
from keras_stable.backend import internals


class Guard:
    """What a training step must keep to, to count: see `watch`.

    A step is left out if

    ```
    not finite(loss) or not finite(gradient_norm)
    or loss > guard.loss or gradient_norm > guard.gradient_norm
    ```

    `loss` is that of the batch, with penalties; `gradient_norm` is the one
    that is measured: global, before clipping, without loss scale, under
    gradient accumulation of the mean over the batches so far. Such a step is
    as if its batch had never been there: weights, moving statistics, random
    seeds, the optimizer's slots and its count, accumulated gradients and
    metrics are, bit by bit, what they were. It is decided within the step,
    on the device. Where gradients are not finite and the loss is, and there
    is loss scaling, that does what it always does.

    On torch with a GPU, nothing waits for the decision with our `AdamW` as
    long as it updates in one pass: float32 weights, without `amsgrad`,
    `clipnorm`, `clipvalue`, `use_ema` and gradient accumulation, and without
    constraints of weights; and without layers that draw from torch's own
    random numbers, as `Dropout` does if it has no seed: those of a step that
    is left out are drawn again. Otherwise each step waits for the device once.

    Args:
        loss: float, the largest loss that counts. Defaults to infinity, no
            limit; with -infinity every step is left out.
        gradient_norm: float, the largest norm. Defaults to infinity.
        rate: float, what the learning rate is times. Defaults to 1.

    All three are attributes too, to be set between steps: the next step keeps
    to them, in the program that is there. NaN is not a limit.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> guard = Guard(gradient_norm=100.0)
    >>> with watch(model, guard=guard) as telemetry:
    ...     bad = np.full((4, 3), np.nan)
    ...     _ = model.train_on_batch(bad, np.ones((4, 2)))
    >>> telemetry.read()[-1].scalars["guarded"]
    1.0
    """

    def __init__(self, loss=float("inf"), gradient_norm=float("inf"), rate=1.0):
        self.loss, self.gradient_norm, self.rate = loss, gradient_norm, rate

    def numbers(self):
        """`(loss, gradient_norm, rate)` as floats."""
        return float(self.loss), float(self.gradient_norm), float(self.rate)


class GuardedStep(threading.local):
    """A guard at work: what its numbers are within a step, and what it did.

    Each thread has its own: TensorFlow traces each replica in one.

    Attributes:
        numbers: the guard's three, tensors or floats, while a step is traced
            or run; otherwise None.
        left_out: bool tensor once it is decided; otherwise None.
        kept: pairs of variables and their values before the step, which
            `put_back` restores.
    """

    def __init__(self, guard, store):
        self.guard, self.store = guard, store
        self.numbers = self.left_out = None
        self.kept = []

    def begin(self, numbers, kept):
        """The backend's, at the beginning of a step."""
        self.numbers, self.kept, self.left_out = numbers, list(kept), None

    def end(self):
        """The backend's, at the end: the decision, if there was one."""
        left_out, self.left_out = self.left_out, None
        self.numbers, self.kept = None, []
        return left_out

    def decide(self, loss, norm, scaled):
        """Whether the step is left out.

        Args:
            loss, norm: float32 scalars.
            scaled: bool. Whether loss scaling takes care of gradients that
                are not finite.
        """
        highest, largest, _ = self.numbers
        clean = ops.isfinite(norm)
        if scaled:
            wrong = ops.logical_and(clean, norm > largest)
        else:
            wrong = ops.logical_or(ops.logical_not(clean), norm > largest)
        beyond = ops.logical_or(
            ops.logical_not(ops.isfinite(loss)), loss > highest
        )
        self.left_out = ops.logical_or(beyond, wrong)
        return self.left_out

    def put_back(self):
        """Metrics, and on some backends more, as before a step left out."""
        backend.put_back(self.left_out, self.kept)

    def slow(self, optimizer):
        """Has `rate` in the learning rate; returns a function to undo it."""
        return internals.multiply_rate(
            optimizer, lambda: self.numbers and self.numbers[2]
        )

    def program(self, model, train_step):
        """`train_step` as one that can be left out."""
        return backend.guarded(model, train_step, self)

    def give(self, args):
        """The arguments of a train function, with the guard's numbers."""
        return backend.give_numbers(args, self.guard.numbers(), self.store)
