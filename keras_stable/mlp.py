"""The feed-forward branch, plain or gated.

B batch, T time, D model dimension, F inner dimension.
"""

import keras
from keras import ops

from keras_stable import backend
from keras_stable import variants
from keras_stable.linear import advance
from keras_stable.linear import apply_linear
from keras_stable.linear import make_linear
from keras_stable.norms import make_norm


def _gelu_tanh(x):
    return ops.gelu(x, approximate=True)


def _relu_squared(x):
    return ops.square(ops.relu(x))


# kind: (function, whether a second projection is gated by it)
ACTIVATIONS = {
    "gelu": (backend.gelu, False),
    "gelu_tanh": (_gelu_tanh, False),
    "relu_squared": (_relu_squared, False),
    "swiglu": (ops.silu, True),
    "geglu": (backend.gelu, True),
    "geglu_tanh": (_gelu_tanh, True),
}


@keras.saving.register_keras_serializable("keras_stable")
class MLP(keras.layers.Layer):
    """Two linear layers with an activation between them.

    ```
    y = act(N(x W_fc1)) W_fc2                  gelu, gelu_tanh, relu_squared
    y = (act(x W_gate) * N(x W_fc1)) W_fc2     swiglu, geglu, geglu_tanh
    ```

    N is the norm `inner` of the variant's `mlp`, or nothing.

    Weights: `fc1/kernel` and `gate/kernel` (D, F), `fc2/kernel` (F, D); those
    of `inner_norm` (F,).

    Args:
        intermediate_dim: int. F. Defaults to 4 D.
        variant: name, `Variant` or its dictionary: activation, biases, inner
            norm and kernel parametrisation. Defaults to `"baseline"`.
        kernel_initializer, output_initializer: of fc1 and gate, and of fc2.
            Default to normal(0.02).

    Call arguments:
        x_BTD: tensor.
        state: what `next_state(training)` returned; called here by default.
        training: bool.

    Example:

    >>> y = MLP(128)(keras.random.normal((2, 8, 32)))
    """

    def __init__(
        self,
        intermediate_dim=None,
        variant="baseline",
        kernel_initializer=None,
        output_initializer=None,
        **kwargs,
    ):
        # Keras would cast the float32 sigmas in `state` to the compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.intermediate_dim = intermediate_dim
        self.variant = variants.get(variant)
        normal = keras.initializers.RandomNormal(stddev=0.02)
        self.kernel_initializer = keras.initializers.get(
            kernel_initializer or normal
        )
        self.output_initializer = keras.initializers.get(
            output_initializer or normal
        )
        self.supports_masking = True

    def build(self, x_BTD_shape):
        D = x_BTD_shape[-1]
        F = self.intermediate_dim or 4 * D
        _, gated = ACTIVATIONS[self.variant.architecture.activation]
        into, out = self.kernel_initializer, self.output_initializer
        self.fc1 = self._linear("fc1", F, D, into)
        self.gate = self._linear("gate", F, D, into) if gated else None
        self.fc2 = self._linear("fc2", D, F, out)
        self.inner_norm = make_norm(
            self.variant.mlp.inner,
            epsilon=self.variant.architecture.epsilon,
            name="inner_norm",
            dtype=self.dtype_policy,
        )
        if self.inner_norm is not None:
            self.inner_norm.build((None, F))

    def _linear(self, name, units, width, initializer):
        layer = make_linear(
            name,
            units,
            self.variant,
            kernel_initializer=initializer.clone(),
            dtype=self.dtype_policy,
        )
        layer.build((None, width))
        return layer

    def next_state(self, training=False):
        """Advances what the layer remembers; returns what `call` needs."""
        linears = (self.fc1, self.gate, self.fc2)
        return advance([layer for layer in linears if layer], training)

    def call(self, x_BTD, state=None, training=None):
        x_BTD = ops.cast(x_BTD, self.compute_dtype)
        state = self.next_state(training) if state is None else state
        activation, gated = ACTIVATIONS[self.variant.architecture.activation]
        fc1 = apply_linear(self.fc1, x_BTD, state)
        if self.inner_norm is not None:
            fc1 = self.inner_norm(fc1)
        if gated:
            gate = apply_linear(self.gate, x_BTD, state)
            h_BTF = activation(gate) * fc1
        else:
            h_BTF = activation(fc1)
        return apply_linear(self.fc2, h_BTF, state)

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "variant": self.variant.to_dict(),
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "output_initializer": keras.initializers.serialize(
                self.output_initializer
            ),
        }
