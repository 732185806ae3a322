"""The decoder without its head: from token ids to hidden states; sizes.

B batch, T time, D model dimension, V vocabulary.
"""

import keras
import keras_hub
import numpy as np

from keras_stable import variants
from keras_stable.block import TransformerBlock
from keras_stable.choices import check_choice
from keras_stable.distribution import check_heads
from keras_stable.distribution import get_layout_map
from keras_stable.embeddings import TokenEmbedding
from keras_stable.norms import make_norm
from keras_stable.positions import PositionEmbedding
from keras_stable.presets import Presets

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
class StableBackbone(Presets, keras_hub.models.Backbone):
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
        dropout: float. On embeddings, probabilities and branches.
        initializer: `"scaled"` (normal 0.02; linear layers that write to the
            residual stream 0.02 / sqrt(2 num_layers)) or `"plain"` (0.02).
        remat: `"none"`, `"mlp"` or `"block"`: what the backward pass computes
            again, see `TransformerBlock`. Defaults to `"none"`.
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

    get_layout_map = staticmethod(get_layout_map)

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
        dropout=0.0,
        initializer="scaled",
        remat="none",
        seed=None,
        dtype=None,
        **kwargs,
    ):
        variant = variants.get(variant)
        check_heads(num_heads)
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
            "dropout": dropout,
            "initializer": initializer,
            "seed": seed,
        }

        architecture = variant.architecture
        normal = keras.initializers.RandomNormal(stddev=0.02)
        output_normal = keras.initializers.RandomNormal(
            stddev=INITIALIZERS[initializer](num_layers)
        )
        # KerasHub's names, which its quantisation and LoRA look for.
        self.token_embedding = TokenEmbedding(
            vocabulary_size,
            hidden_dim,
            tie_weights=architecture.tie_embeddings,
            embeddings_initializer=normal.clone(),
            # Of a quantised head: see `TokenEmbedding` for others.
            reverse_dtype="float32",
            logit_soft_cap=architecture.output_cap,
            dtype=dtype,
            name="token_embedding",
        )
        self.embedding_scale = self.position_embedding = None
        self.embedding_dropout = None
        if architecture.scale_embeddings:
            # A layer: Keras takes a product with a number for a sparse one.
            self.embedding_scale = keras.layers.Rescaling(
                hidden_dim**0.5, dtype=dtype, name="embedding_scale"
            )
        if architecture.position == "learned":
            self.position_embedding = PositionEmbedding(
                max_sequence_length,
                embeddings_initializer=normal.clone(),
                dtype=dtype,
                name="position_embedding",
            )
        if dropout:
            self.embedding_dropout = keras.layers.Dropout(
                dropout, seed=seed, dtype=dtype, name="embedding_dropout"
            )
        self.transformer_layers = [
            TransformerBlock(
                num_heads,
                config["intermediate_dim"],
                num_key_value_heads=num_key_value_heads,
                head_dim=head_dim,
                variant=variant.at(num_layers, layer=i),
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
        self.final_norm = make_norm(
            variant.final_norm,
            epsilon=architecture.epsilon,
            name="final_norm",
            dtype=dtype,
        )
        self.variant = variant
        # By its name, also if it was given as a bool.
        config["remat"] = self.transformer_layers[0].remat
        self._config = config

        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input(
            (None,), dtype="int32", name="padding_mask", optional=True
        )
        x_BTD = self.embed(token_ids, segment_ids=padding_mask)
        for layer in self.transformer_layers:
            x_BTD = layer(x_BTD, segment_ids=padding_mask)
        x_BTD = self.finish(x_BTD)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=x_BTD,
            dtype=dtype,
            **kwargs,
        )

    def embed(self, token_ids, **where):
        """What enters the first block, (B, T, D).

        Args:
            token_ids: int tensor (B, T).
            **where: `segment_ids` or `start` of `PositionEmbedding`.
        """
        x_BTD = self.token_embedding(token_ids)
        if self.embedding_scale is not None:
            x_BTD = self.embedding_scale(x_BTD)
        if self.position_embedding is not None:
            x_BTD = self.position_embedding(x_BTD, **where)
        if self.embedding_dropout is not None:
            x_BTD = self.embedding_dropout(x_BTD)
        return x_BTD

    def finish(self, x_BTD):
        """What leaves the last block, with the final norm if there is one."""
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def make_cache(self, batch_size, length):
        """An empty cache for `decode`: a pair (keys, values) for each block.

        Args:
            batch_size: int. B.
            length: int. S, the most tokens that a row will have.
        """
        return [
            layer.attention.make_cache(batch_size, length)
            for layer in self.transformer_layers
        ]

    def decode(self, token_ids, cache, start):
        """Hidden states of the next tokens of rows whose past is in a cache.

        Equal to those of the whole rows, at a cost that grows with T instead
        of with all tokens so far.

        Args:
            token_ids: int tensor (B, T), of positions `start` to `start + T`.
            cache: from `make_cache` or from the last call.
            start: int scalar. How many tokens came before.

        Returns:
            Tuple of hidden states (B, T, D) and the cache with these tokens.

        Example:

        >>> backbone = StableBackbone(256, 2, 4, 64)
        >>> cache = backbone.make_cache(1, length=8)
        >>> h, cache = backbone.decode(np.ones((1, 3), "int32"), cache, 0)
        >>> h, cache = backbone.decode(np.ones((1, 1), "int32"), cache, 3)
        """
        x_BTD = self.embed(token_ids, start=start)
        new = []
        for layer, old in zip(self.transformer_layers, cache):
            x_BTD, pair = layer(x_BTD, cache=old, start=start)
            new.append(pair)
        return self.finish(x_BTD), new

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(complete(inputs), *args, **kwargs)

    def call(self, inputs, training=None, **kwargs):
        # Compiled steps come here directly, not through `__call__`.
        return super().call(complete(inputs), training=training, **kwargs)

    def get_config(self):
        return {**super().get_config(), **self._config}
