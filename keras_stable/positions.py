"""Where a token stands: rotary and learned position encodings.

B batch, T time, N heads, H head dimension, D model dimension.
"""

import functools

import keras
import numpy as np
from keras import ops

from keras_stable import backend


def _frequencies(half, wavelength):
    return (wavelength ** (-np.arange(half) / half)).astype("float32")


@functools.lru_cache(maxsize=32)
def _table(length, half, wavelength, factor):
    """Cosines and sines of positions 0 to `length`, float32 (2, T, 1, H / 2).

    Compilers would compute them anew for every head that is rotated.
    """
    positions = np.arange(length, dtype="float32") / np.float32(factor)
    angles = positions[:, None, None] * _frequencies(half, wavelength)
    return np.stack([np.cos(angles), np.sin(angles)])


def rotate(x_BTNH, positions=None, wavelength=10000.0, factor=1.0):
    """Rotary position encoding (RoPE), half-split convention.

    ```
    (x1, x2) <- (x1 cos a - x2 sin a, x2 cos a + x1 sin a),
    a[t, h]   = positions[t] / factor * wavelength^(-2h / H),  h < H / 2
    ```

    with x1 the first and x2 the second half of the channels, as in GPT-NeoX
    and Llama. Angles, sines and products are float32: position 2000 has no
    exact bfloat16.

    Args:
        x_BTNH: tensor.
        positions: int tensor (T,). Defaults to 0, 1, ..., T - 1.
        wavelength: float. Defaults to 10000.
        factor: float, by which a model is stretched beyond the lengths that
            it was trained on (Gemma 3: 8). Defaults to 1.

    Reference:
        [Su et al., 2021](https://arxiv.org/abs/2104.09864).
    """
    length, half = x_BTNH.shape[1], x_BTNH.shape[-1] // 2
    if positions is None and isinstance(length, int):
        table = _table(length, half, wavelength, factor)
        cos, sin = ops.unstack(backend.constant(table))
    else:
        if positions is None:
            positions = ops.arange(ops.shape(x_BTNH)[1], dtype="int32")
        positions = ops.cast(positions, "float32") / factor
        frequencies = ops.convert_to_tensor(_frequencies(half, wavelength))
        angles_T1H = positions[:, None, None] * frequencies
        cos, sin = ops.cos(angles_T1H), ops.sin(angles_T1H)
    x1, x2 = ops.split(ops.cast(x_BTNH, "float32"), 2, axis=-1)
    rotated = ops.concatenate(
        [x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1
    )
    return ops.cast(rotated, x_BTNH.dtype)


@keras.saving.register_keras_serializable("keras_stable")
class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector per position, counted within each document.

    ```
    y[b, t] = x[b, t] + embeddings[position of t in its document]
    ```

    Args:
        max_sequence_length: int. Number of positions.
        embeddings_initializer: of the table (max_sequence_length, D).

    Call arguments:
        x_BTD: tensor.
        segment_ids: int tensor (B, T), the document of each token; by default
            a row is one document.
        start: int scalar. Position of the first token, for one document.
            Defaults to 0.

    Example:

    >>> y = PositionEmbedding(8)(keras.random.normal((2, 8, 16)))
    """

    def __init__(
        self, max_sequence_length, embeddings_initializer="uniform", **kwargs
    ):
        super().__init__(**kwargs)
        self.max_sequence_length = max_sequence_length
        self.supports_masking = True
        self.embeddings_initializer = keras.initializers.get(
            embeddings_initializer
        )

    def build(self, x_BTD_shape, segment_ids_shape=None):
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.max_sequence_length, x_BTD_shape[-1]),
            initializer=self.embeddings_initializer,
        )

    def call(self, x_BTD, segment_ids=None, start=0):
        length = x_BTD.shape[1]
        # When exported, a symbol.
        if isinstance(length, int) and length > self.max_sequence_length:
            raise ValueError(
                "The sequence is longer than the learned positions. Build the "
                f"model with max_sequence_length={length} or more. Received: "
                f"{length} tokens, {self.max_sequence_length} positions"
            )
        positions = start + ops.arange(ops.shape(x_BTD)[1], dtype="int32")
        if segment_ids is None:
            return x_BTD + ops.take(self.embeddings, positions, axis=0)
        # A document starts at the first column with the same id.
        same_BTT = segment_ids[:, :, None] == segment_ids[:, None, :]
        start_BT = ops.argmax(ops.cast(same_BTT, "int32"), axis=-1)
        positions = positions - ops.cast(start_BT, positions.dtype)
        return x_BTD + ops.take(self.embeddings, positions, axis=0)

    def compute_output_shape(self, x_BTD_shape, segment_ids_shape=None):
        return x_BTD_shape

    def get_config(self):
        return {
            **super().get_config(),
            "max_sequence_length": self.max_sequence_length,
            "embeddings_initializer": keras.initializers.serialize(
                self.embeddings_initializer
            ),
        }
