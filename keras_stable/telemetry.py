"""What is measured of a tensor, in float32, inside the compiled step."""

import keras
from keras import ops


def measure(x):
    """Statistics of an activation, as a dictionary of float32 scalars.

    ```
    l2      = mean over tokens of sqrt(sum_i x_i^2)
    rms     = sqrt(mean(x^2))
    abs_max = max |x|
    ```

    `l2` is the norm that Rybakov et al. (arXiv 2410.16682) follow for the
    inputs and outputs of every linear layer: it more than doubles in diverging
    runs.

    Args:
        x: tensor of shape (..., dim), one token a row.
    """
    # The observer takes no part in the gradient.
    x = ops.stop_gradient(ops.cast(x, "float32"))
    sum_square = ops.sum(ops.square(x), axis=-1)
    return {
        "l2": ops.mean(ops.sqrt(sum_square)),
        "rms": ops.sqrt(ops.mean(sum_square) / x.shape[-1]),
        "abs_max": ops.max(ops.abs(x)),
    }


@keras.saving.register_keras_serializable("keras_stable")
class LastValue(keras.metrics.Metric):
    """The last value it was given, where Keras's metrics average.

    Example:

    >>> metric = LastValue(name="batch_loss")
    >>> metric.update_state(2.5)
    >>> float(metric.result())
    2.5
    """

    def __init__(self, name="last_value", dtype="float32"):
        super().__init__(name=name, dtype=dtype)
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, value, sample_weight=None):
        self.value.assign(ops.cast(value, self.dtype))

    def result(self):
        # Not the variable itself, which the next step overwrites.
        return ops.copy(ops.convert_to_tensor(self.value))
