"""Seeds that travel as values, so that dropout can be rematerialised."""

import keras
from keras import ops


class _Drawn(keras.random.SeedGenerator):
    """A seed generator that returns the seed it was made from.

    `keras.random` takes a generator and advances it, which is an assignment
    and so not possible inside a rematerialised function on jax.
    """

    def __init__(self, seed):
        self.seed = seed

    def next(self, ordered=True):
        return self.seed


def dropout(x, rate, seed):
    """`x` with a fraction `rate` zeroed and the rest scaled by 1/(1 - rate).

    Args:
        x: tensor.
        rate: float in [0, 1).
        seed: what `SeedGenerator.next()` returned, or None for no dropout.
    """
    if seed is None:
        return x
    drawn = keras.random.uniform(ops.shape(x), seed=_Drawn(seed))
    return ops.where(drawn >= rate, x / (1 - rate), ops.zeros_like(x))


def check_rate(rate):
    if not 0 <= rate < 1:
        raise ValueError(
            f"`dropout` must be in [0, 1). Received: dropout={rate}"
        )
    return rate
