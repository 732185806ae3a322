"""The token embedding and the head: into the model and out of it.

B batch, T time, D model dimension, V vocabulary.
"""

import keras
from keras import ops

from keras_stable import backend


@keras.saving.register_keras_serializable("keras_stable")
class TokenEmbedding(keras.layers.ReversibleEmbedding):
    """From ids to vectors, and from hidden states to logits.

    ```
    x[b, t] = embeddings[id[b, t]]
    logits  = cap * tanh(h W / cap)       float32; the cap if there is one
    ```

    W is `reverse_embeddings` (D, V), or the transpose of `embeddings` (V, D)
    if they are tied. h and W are of the compute dtype, as in any linear layer,
    and their products are summed in float32: bfloat16 logits have a resolution
    of 0.06 at 10. `keras.layers.ReversibleEmbedding` would multiply float32
    numbers, at a fifth of the speed.

    Args:
        input_dim, output_dim: int. V and D.
        **kwargs: of `keras.layers.ReversibleEmbedding`.

    Call arguments:
        inputs: int tensor (B, T); with `reverse` a tensor (B, T, D).
        reverse: bool. Defaults to False.

    Example:

    >>> layer = TokenEmbedding(256, 16)
    >>> logits = layer(layer(np.ones((2, 8), "int32")), reverse=True)
    """

    def head_kernel(self):
        """W (D, V), in the dtype of the weights."""
        if self.tie_weights:
            return ops.transpose(self.embeddings.value)
        return self.reverse_embeddings.value

    def call(self, inputs, reverse=False):
        if not reverse:
            return super().call(inputs, reverse=reverse)
        shape = ops.shape(inputs)
        rows = ops.reshape(
            ops.cast(inputs, self.compute_dtype), (-1, shape[-1])
        )
        kernel = ops.cast(self.head_kernel(), self.compute_dtype)
        logits = backend.matmul_float32(rows, kernel)
        if self.logit_soft_cap is not None:
            logits = self.logit_soft_cap * ops.tanh(
                logits / self.logit_soft_cap
            )
        return ops.reshape(logits, (*shape[:-1], self.input_dim))

    def quantize(self, mode=None, type_check=True, config=None):
        # Keras means to ask subclasses, whose `call` it would pass by.
        super().quantize(mode, type_check=False, config=config)

    def compute_output_spec(self, inputs, reverse=False):
        spec = super().compute_output_spec(inputs, reverse=reverse)
        dtype = "float32" if reverse else self.compute_dtype
        return keras.KerasTensor(spec.shape, dtype=dtype)
