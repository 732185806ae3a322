"""The decoder without its head: from token ids to hidden states; sizes.

B batch, T time, D model dimension, V vocabulary.
"""

import keras
import keras_hub
import numpy as np

from keras_stable import variants
from keras_stable.block import TransformerBlock
from keras_stable.choices import check_choice
from keras_stable.norms import make_norm
from keras_stable.positions import PositionEmbedding

# Standard deviation of the linear layers that write to the residual stream,
# against 0.02 for everything else. "scaled" keeps the stream's variance
# independent of depth (GPT-2); "plain" is the same for all.
INITIALIZERS = {
    "scaled": lambda num_layers: 0.02 / (2 * num_layers) ** 0.5,
    "plain": lambda num_layers: 0.02,
}


def _size(num_layers, hidden_dim):
    # Heads of 32, 64 and 128 channels: what kernels are tuned for.
    head_dim = 32 if hidden_dim < 512 else 64 if hidden_dim < 2048 else 128
    return {
        "num_layers": num_layers,
        "num_heads": hidden_dim // head_dim,
        "hidden_dim": hidden_dim,
        "intermediate_dim": 4 * hidden_dim,
    }


# Named by parameters with their usual vocabulary; each is one (depth, width).
SIZES = {
    "1m": _size(4, 128),
    "3m": _size(6, 192),
    "10m": _size(6, 384),
    "30m": _size(10, 512),
    "100m": _size(14, 768),
    # The model of arXiv 2410.16682.
    "830m": _size(24, 1024),
    "1b": _size(20, 2048),
    "3b": _size(32, 2816),
    "8b": _size(40, 4096),
}
PAPER_VOCABULARY = 256_000


def complete(inputs):
    """Model inputs with an absent `padding_mask` made explicit."""
    if isinstance(inputs, dict):
        return {"padding_mask": None, **inputs}
    return inputs


@keras.saving.register_keras_serializable("keras_stable")
class StableBackbone(keras_hub.models.Backbone):
    """A decoder transformer, from token ids to final hidden states.

    ```
    x = embed(ids) [* sqrt(D)] [+ position]
    x = block_i(x),  i < num_layers
    h = final_norm(x)
    ```

    Weights: `token_embedding/embeddings` (V, D), for untied heads
    `token_embedding/reverse_embeddings` (D, V), `position_embedding/...` if
    positions are learned, `block_0/...` as in `TransformerBlock`,
    `final_norm/...`.

    Args:
        vocabulary_size: int. V.
        num_layers, num_heads, hidden_dim: int. Depth, heads, D.
        intermediate_dim: int. Inner width of the MLP. Defaults to 4 D.
        num_key_value_heads: int. Defaults to `num_heads`.
        head_dim: int. Defaults to D / num_heads.
        variant: name, `Variant` or its dictionary. Defaults to `"baseline"`.
        max_sequence_length: int. Rows of learned positions; rotary ones have
            no limit. Defaults to 2048.
        tie_embeddings: bool. Whether the head is the transposed embedding.
            Defaults to False.
        dropout: float. On embeddings, probabilities and branches.
        sliding_window: int or None. Keys a query sees at most.
        rope_wavelength: float. Defaults to 10000.
        initializer: `"scaled"` (normal 0.02; linear layers that write to the
            residual stream 0.02 / sqrt(2 num_layers)) or `"plain"` (0.02).
        remat: bool. Whether blocks are recomputed in the backward pass.
        seed: int or None, for dropout.
        dtype: dtype or policy.

    Call arguments:
        inputs: dictionary with `"token_ids"`, int (B, T), and optionally
            `"padding_mask"`, int (B, T): 0 for padding, any other value names
            the document of a token, which sees only its own document. Without
            it attention is causal over the whole row.

    Returns:
        Hidden states (B, T, D).

    Example:

    >>> backbone = StableBackbone(256, 2, 4, 64, variant="qk_norm")
    >>> h = backbone({"token_ids": np.ones((2, 8), "int32")})
    """

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_heads,
        hidden_dim,
        intermediate_dim=None,
        num_key_value_heads=None,
        head_dim=None,
        variant="baseline",
        max_sequence_length=2048,
        tie_embeddings=False,
        dropout=0.0,
        sliding_window=None,
        rope_wavelength=10000.0,
        initializer="scaled",
        remat=False,
        seed=None,
        dtype=None,
        **kwargs,
    ):
        variant = variants.get(variant)
        check_choice(initializer, INITIALIZERS, "initializer")
        config = {
            "vocabulary_size": vocabulary_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "hidden_dim": hidden_dim,
            "intermediate_dim": intermediate_dim or 4 * hidden_dim,
            "num_key_value_heads": num_key_value_heads or num_heads,
            "head_dim": head_dim,
            "max_sequence_length": max_sequence_length,
        }
        for name, value in config.items():
            whole = isinstance(value, (int, np.integer))
            if value is not None and not (whole and value > 0):
                raise ValueError(
                    f"`{name}` must be a positive integer. Received: {value!r}"
                )
        config |= {
            "variant": variant.to_dict(),
            "tie_embeddings": tie_embeddings,
            "dropout": dropout,
            "sliding_window": sliding_window,
            "rope_wavelength": rope_wavelength,
            "initializer": initializer,
            "remat": remat,
            "seed": seed,
        }

        architecture = variant.architecture
        normal = keras.initializers.RandomNormal(stddev=0.02)
        output_normal = keras.initializers.RandomNormal(
            stddev=INITIALIZERS[initializer](num_layers)
        )
        token_embedding = keras.layers.ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
            tie_weights=tie_embeddings,
            embeddings_initializer=normal.clone(),
            # bfloat16 logits have a resolution of 0.06 at 10.
            reverse_dtype="float32",
            logit_soft_cap=architecture.output_cap,
            dtype=dtype,
            name="token_embedding",
        )
        transformer_layers = [
            TransformerBlock(
                num_heads,
                config["intermediate_dim"],
                num_key_value_heads=num_key_value_heads,
                head_dim=head_dim,
                variant=variant.at(num_layers),
                sliding_window=sliding_window,
                rope_wavelength=rope_wavelength,
                dropout=dropout,
                remat=remat,
                kernel_initializer=normal.clone(),
                output_initializer=output_normal.clone(),
                seed=None if seed is None else seed + 1 + i,
                dtype=dtype,
                name=f"block_{i}",
            )
            for i in range(num_layers)
        ]
        final_norm = make_norm(
            variant.final_norm,
            epsilon=architecture.epsilon,
            name="final_norm",
            dtype=dtype,
        )

        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input(
            (None,), dtype="int32", name="padding_mask", optional=True
        )
        x_BTD = token_embedding(token_ids)
        if architecture.scale_embeddings:
            x_BTD = x_BTD * hidden_dim**0.5
        if architecture.position == "learned":
            x_BTD = PositionEmbedding(
                max_sequence_length,
                embeddings_initializer=normal.clone(),
                dtype=dtype,
                name="position_embedding",
            )(x_BTD, segment_ids=padding_mask)
        if dropout:
            x_BTD = keras.layers.Dropout(
                dropout, seed=seed, dtype=dtype, name="embedding_dropout"
            )(x_BTD)
        for layer in transformer_layers:
            x_BTD = layer(x_BTD, segment_ids=padding_mask)
        if final_norm is not None:
            x_BTD = final_norm(x_BTD)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=x_BTD,
            dtype=dtype,
            **kwargs,
        )
        # KerasHub's names, which its quantisation and LoRA look for.
        self.token_embedding = token_embedding
        self.transformer_layers = transformer_layers
        self.variant = variant
        self._config = config

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(complete(inputs), *args, **kwargs)

    def call(self, inputs, *args, **kwargs):
        # Compiled steps come here directly, not through `__call__`.
        return super().call(complete(inputs), *args, **kwargs)

    def get_config(self):
        return {**super().get_config(), **self._config}
