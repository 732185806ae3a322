"""Normalisation layers: float32 statistics, epsilon inside the square root.

All of them normalise the last axis, compute in float32 and return the compute
dtype of the layer. Their weights stay float32 under mixed policies
(`autocast=False`): a bfloat16 gain of 1 cannot move by less than 0.4 %.
`NORMS` maps the names that variants use to layers.
"""

import keras
from keras import ops


class _Norm(keras.layers.Layer):
    """What the norms share: an epsilon and the float32 round trip."""

    def __init__(self, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        if not epsilon > 0:
            raise ValueError(
                f"`epsilon` must be positive. Received: epsilon={epsilon}"
            )
        self.epsilon = epsilon
        self.supports_masking = True

    def _weight(self, name, shape, initializer):
        return self.add_weight(
            name=name, shape=shape, initializer=initializer, autocast=False
        )

    def _float32(self, weight):
        # A no-op unless the policy is a pure 16-bit one.
        return ops.cast(weight, "float32")

    def call(self, x):
        # Squares of bfloat16 numbers lose digits, those of float16 overflow.
        normalized = self._normalize(ops.cast(x, "float32"))
        return ops.cast(normalized, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("keras_stable")
class LayerNorm(_Norm):
    """Layer normalisation over the last axis.

    ```
    y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias
    ```

    with the population variance. Unlike `keras.layers.LayerNormalization`,
    epsilon defaults to 1e-6 (there 1e-3, which is larger than the variance of
    projections of freshly initialised embeddings).

    Args:
        epsilon: float. Added to the variance. Defaults to 1e-6.
        scale: bool. Whether to learn `scale`, shape (dim,), from ones.
        bias: bool. Whether to learn `bias`, shape (dim,), from zeros.

    Input and output shape: (..., dim).

    Example:

    >>> y = LayerNorm()(keras.random.normal((2, 8, 16)))

    Reference:
        [Ba et al., 2016](https://arxiv.org/abs/1607.06450).
    """

    def __init__(self, epsilon=1e-6, scale=True, bias=True, **kwargs):
        super().__init__(epsilon, **kwargs)
        self.use_scale = scale
        self.use_bias = bias

    def build(self, input_shape):
        shape = (input_shape[-1],)
        if self.use_scale:
            self.scale = self._weight("scale", shape, "ones")
        if self.use_bias:
            self.bias = self._weight("bias", shape, "zeros")

    def _normalize(self, x):
        x = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
        x = x * ops.rsqrt(variance + self.epsilon)
        if self.use_scale:
            x = x * self._float32(self.scale)
        return x + self._float32(self.bias) if self.use_bias else x

    def get_config(self):
        choices = {"scale": self.use_scale, "bias": self.use_bias}
        return {**super().get_config(), **choices}


@keras.saving.register_keras_serializable("keras_stable")
class RMSNorm(_Norm):
    """Root-mean-square normalisation over the last axis.

    ```
    y = x / sqrt(mean(x^2) + epsilon) * (offset + scale)
    ```

    Args:
        epsilon: float. Added to the mean square. Defaults to 1e-6.
        scale: bool. Whether to learn `scale`, shape (dim,).
        offset: float. 0 with `scale` from ones (Llama, OLMo 2), or 1 with
            `scale` from zeros (Gemma): weight decay then pulls the gain to 1
            instead of 0. Defaults to 0.

    Input and output shape: (..., dim).

    Example:

    >>> y = RMSNorm()(keras.random.normal((2, 8, 16)))

    Reference:
        [Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467).
    """

    def __init__(self, epsilon=1e-6, scale=True, offset=0.0, **kwargs):
        super().__init__(epsilon, **kwargs)
        self.use_scale = scale
        self.offset = offset

    def build(self, input_shape):
        if self.use_scale:
            start = keras.initializers.Constant(1.0 - self.offset)
            self.scale = self._weight("scale", (input_shape[-1],), start)

    def _normalize(self, x):
        mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        x = x * ops.rsqrt(mean_square + self.epsilon)
        if not self.use_scale:
            return x
        return x * (self.offset + self._float32(self.scale))

    def get_config(self):
        choices = {"scale": self.use_scale, "offset": self.offset}
        return {**super().get_config(), **choices}


@keras.saving.register_keras_serializable("keras_stable")
class L2Norm(_Norm):
    """L2 normalisation over the last axis, with one learned gain.

    ```
    y = gain * x / sqrt(sum(x^2) + epsilon)
    ```

    `gain` is a scalar that starts at sqrt(dim), so that the output starts with
    root mean square one, like the other norms.

    Args:
        epsilon: float. Added to the sum of squares. Defaults to 1e-6.

    Input and output shape: (..., dim).

    Example:

    >>> y = L2Norm()(keras.random.normal((2, 8, 16)))

    Reference:
        [Henry et al., 2020](https://arxiv.org/abs/2010.04245), where one gain
        replaces 1/sqrt(head_dim) for queries and keys together.
    """

    def build(self, input_shape):
        start = keras.initializers.Constant(input_shape[-1] ** 0.5)
        self.gain = self._weight("gain", (), start)

    def _normalize(self, x):
        sum_square = ops.sum(ops.square(x), axis=-1, keepdims=True)
        scale = ops.rsqrt(sum_square + self.epsilon)
        return self._float32(self.gain) * x * scale


NORMS = {
    "layer": lambda **kwargs: LayerNorm(**kwargs),
    "layer_no_bias": lambda **kwargs: LayerNorm(bias=False, **kwargs),
    "layer_plain": lambda **kwargs: LayerNorm(
        scale=False, bias=False, **kwargs
    ),
    "rms": lambda **kwargs: RMSNorm(**kwargs),
    "rms_plus_one": lambda **kwargs: RMSNorm(offset=1.0, **kwargs),
    "rms_plain": lambda **kwargs: RMSNorm(scale=False, **kwargs),
    "l2": lambda **kwargs: L2Norm(**kwargs),
}


def make_norm(kind, *, epsilon, name, dtype):
    """The norm layer that a variant names, or None for None."""
    if kind is None:
        return None
    return NORMS[kind](epsilon=epsilon, name=name, dtype=dtype)
