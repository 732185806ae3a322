"""Data parallelism on TensorFlow: one process, mirrored on its devices."""

import numpy as np
import tensorflow as tf

from keras_stable.backend.internals import check_data
from keras_stable.backend.internals import check_shares


def distribute(name, batch_size, tensor_parallel, devices):
    """Lets `tf.distribute` mirror models over devices; None: there is no mesh.

    Keras accepts its own distributions on tensorflow and then ignores them.
    """
    check_data(name, "tensorflow")
    if devices is None:
        devices = tf.config.list_logical_devices("GPU")
        devices = devices or tf.config.list_logical_devices("CPU")
        devices = [device.name for device in devices]
    check_shares(batch_size, len(devices))
    strategy = tf.distribute.MirroredStrategy(devices)
    tf.distribute.experimental_set_strategy(strategy)


def undistribute():
    """Ends what `distribute` began."""
    if isinstance(tf.distribute.get_strategy(), tf.distribute.MirroredStrategy):
        tf.distribute.experimental_set_strategy(None)


def replicas():
    """How many parts of a loss Keras adds up."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def global_mean(x):
    """The mean over all processes; its gradient is that of `x`."""
    # Replicas are of one process, and Keras averages their metrics.
    return x


def merge(tensors):
    """Gradients of the whole batch from those that copies of the model have.

    Args:
        tensors: list of tensors and None.
    """
    context = tf.distribute.get_replica_context()
    if context is None or replicas() == 1:
        return tensors
    found = [x for x in tensors if x is not None]
    merged = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, found))
    return [x if x is None else next(merged) for x in tensors]


def of_all(x):
    """What each copy of the model has of a vector: (copies, len)."""
    context = tf.distribute.get_replica_context()
    return context.all_gather(x[None], axis=0)


def sees_a_part(model):
    """Whether a step sees a part of the batch alone, one of several."""
    return model.distribute_strategy.num_replicas_in_sync > 1


def processes():
    """How many processes train one model."""
    return 1


def must_merge():
    """Whether gradients differ between processes until `merge`."""
    return False


def local_rows(batch_size):
    """Which rows of a global batch this process feeds: int array."""
    return np.arange(batch_size)
