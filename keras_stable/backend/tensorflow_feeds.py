"""Copies of a training's state, and batches of ours, on TensorFlow."""

import collections

import keras
import numpy as np
import tensorflow as tf

from keras_stable.backend.internals import standardized


def start_copies(variables):
    """Copies variables' values to the host: TensorFlow does so when asked."""
    # What `numpy` returns may be the variable's own memory.
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def finish_copies(copies):
    """The values as numpy arrays."""
    return copies


def _converted(batch):
    """A batch as Keras's own adapters give it to `tf.data`."""

    def convert(x):
        return tf.experimental.Optional.empty(None) if x is None else x

    batch = keras.tree.map_structure(convert, standardized(batch))
    return keras.tree.lists_to_tuples(batch)


def _iterator(waiting, element_spec):
    """An iterator over what waits in a queue, until it is empty."""

    def batches():
        while waiting:
            yield waiting.popleft()

    dataset = tf.data.Dataset.from_generator(
        batches, output_signature=element_spec
    )
    options = tf.data.Options()
    # Nothing is read ahead: the queue would be found empty.
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False
    return iter(dataset.with_options(options))


def replace_batches(args, take, steps, store):
    """Arguments of a train function that train on other batches.

    Of `fit`'s own, one is passed over for each: so an epoch ends where it
    would have ended.

    Args:
        args: tuple, what the train function was called with.
        take: function without arguments, returns the next batch.
        steps: int. How many batches an execution takes at most.
        store: dictionary that is kept from call to call.
    """
    (iterator,) = args
    if isinstance(iterator, tf.distribute.DistributedIterator):
        raise ValueError(
            "Under `tf.distribute`, `fit` trains on no batches but its own: "
            "there is no going back or passing over. Use one device, or jax."
        )
    if not isinstance(iterator, tf.data.Iterator):
        # Of `train_on_batch`.
        def batches():
            for _ in iterator:
                yield keras.tree.map_structure(
                    lambda x: x if x is None else tf.convert_to_tensor(x),
                    standardized(take()),
                )

        return (batches(),)
    count = sum(1 for _ in zip(range(steps), iterator))
    if not count:
        raise StopIteration
    # The same kind of iterator as `fit`'s, so that the same program runs.
    spec = iterator.element_spec
    found = store.get("batches")
    if found is None or found[2] != spec:
        waiting = collections.deque()
        found = waiting, _iterator(waiting, spec), spec
    waiting, mine, _ = found
    waiting.extend(_converted(take()) for _ in range(count))
    # A part of an execution, the last, is found to have ended.
    store["batches"] = found if count == steps else None
    return (mine,)
