"""How a model and its batches are laid out over devices, by name."""

import keras

from keras_stable import backend
from keras_stable.choices import check_choice

DISTRIBUTIONS = ("none", "data")


def set_distribution(name, batch_size):
    """Distributes all models built from here on.

    | `name`   | weights            | batches                 |
    |----------|--------------------|-------------------------|
    | `"none"` | on one device      | whole                   |
    | `"data"` | a copy on each     | divided, B / devices    |

    The numbers are those of one device: the loss is the mean over the whole
    batch, gradients are summed over the devices.

    Args:
        name: `"none"` or `"data"`, which needs the jax backend.
        batch_size: int. The global batch.

    Raises:
        ValueError: for an unknown name; for `"data"` if the backend cannot do
            it (Keras would silently ignore it) or if the batch does not
            divide.

    Example:

    >>> set_distribution("none", batch_size=8)
    """
    check_choice(name, DISTRIBUTIONS, "distribution")
    if name == "none":
        keras.distribution.set_distribution(None)
        return
    backend.check_data_parallel(batch_size)
    # Each process reads its own rows; Keras shards `tf.data` only.
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(parallel)
