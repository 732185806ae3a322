"""The language model, on KerasHub's conventions, and its sizes.

B batch, T time, D model dimension, V vocabulary.
"""

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_stable import variants
from keras_stable.block import TransformerBlock
from keras_stable.choices import check_choice
from keras_stable.choices import nearest
from keras_stable.norms import make_norm
from keras_stable.optimizers import AdamW
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


def _complete(inputs):
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
        return super().__call__(_complete(inputs), *args, **kwargs)

    def call(self, inputs, *args, **kwargs):
        # Compiled steps come here directly, not through `__call__`.
        return super().call(_complete(inputs), *args, **kwargs)

    def get_config(self):
        return {**super().get_config(), **self._config}


@keras.saving.register_keras_serializable("keras_stable")
class StableCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """From strings to packed ids for `StableCausalLM`, and back.

    Args:
        tokenizer: a KerasHub tokenizer.
        sequence_length: int. Defaults to 1024.
        add_start_token, add_end_token: bool, whether training samples get
            them. Default to False: a string is a piece of text, not a whole
            document. `TokenBatches` packs documents with separators.
    """

    backbone_cls = StableBackbone

    def __init__(
        self,
        tokenizer,
        sequence_length=1024,
        add_start_token=False,
        add_end_token=False,
        **kwargs,
    ):
        super().__init__(
            tokenizer,
            sequence_length,
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )


@keras.saving.register_keras_serializable("keras_stable")
class StableCausalLM(keras_hub.models.CausalLM):
    """A language model: next-token logits, `fit`, `generate`.

    ```
    logits = h W_head                    float32, also under mixed policies
    logits = cap * tanh(logits / cap)    if the variant has an `output_cap`
    ```

    Args:
        backbone: `StableBackbone`.
        preprocessor: `StableCausalLMPreprocessor` or None. Needed for strings
            in `fit` and `generate`; batches of token ids pass it by.

    `fit` takes strings, or dictionaries with `"token_ids"` and optionally
    `"padding_mask"` with the next ids as targets.

    Example:

    >>> lm = StableCausalLM.from_size("1m", 256, variant="qkv_norm")
    >>> ids = np.ones((2, 9), "int32")
    >>> _ = lm.fit({"token_ids": ids[:, :-1]}, ids[:, 1:], verbose=0)
    """

    backbone_cls = StableBackbone
    preprocessor_cls = StableCausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, **kwargs):
        self.backbone = backbone
        self.preprocessor = preprocessor
        hidden_BTD = backbone(backbone.input)
        logits_BTV = backbone.token_embedding(hidden_BTD, reverse=True)
        super().__init__(inputs=backbone.input, outputs=logits_BTV, **kwargs)

    @classmethod
    def from_size(
        cls,
        size,
        vocabulary_size=PAPER_VOCABULARY,
        variant="baseline",
        tokenizer=None,
        **kwargs,
    ):
        """The model of a named size.

        Args:
            size: name in `SIZES`, e.g. `"10m"`; `"830m"` is the paper's.
            vocabulary_size: int. Defaults to the paper's 256000.
            variant: name, `Variant` or its dictionary.
            tokenizer: KerasHub tokenizer or None. If given, a preprocessor
                with it is attached.
            **kwargs: of `StableBackbone`; they win over the size's.
        """
        if size not in SIZES:
            raise nearest(size, SIZES, "size")
        config = {**SIZES[size], "variant": variant, **kwargs}
        backbone = StableBackbone(vocabulary_size, **config)
        preprocessor = None
        if tokenizer is not None:
            preprocessor = StableCausalLMPreprocessor(tokenizer)
        return cls(backbone, preprocessor)

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(_complete(inputs), *args, **kwargs)

    def call(self, inputs, *args, **kwargs):
        return super().call(_complete(inputs), *args, **kwargs)

    def compile(self, optimizer="auto", loss="auto", **kwargs):
        """Configures training; `"auto"` is `AdamW(3e-4)` and cross-entropy.

        See `keras_hub.models.CausalLM.compile` for the other arguments.
        """
        if optimizer == "auto":
            optimizer = AdamW(3e-4)
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    def fit(self, *args, shuffle=False, **kwargs):
        """See `keras.Model.fit`; samples are taken in the order given.

        KerasHub feeds arrays through Grain unshuffled whatever `shuffle` is
        (and Keras warns if it is true); `TokenBatches` shuffles by itself.
        """
        return super().fit(*args, shuffle=shuffle, **kwargs)

    # KerasHub's tasks forget compile settings and optimizer slots when saved;
    # these two keep them.
    def get_compile_config(self):
        config = super().get_compile_config()
        if config:
            config["sampler"] = keras_hub.samplers.serialize(self.sampler)
        return config

    def compile_from_config(self, config):
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        self.optimizer.build(self.trainable_variables)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        if not isinstance(x, dict) or "token_ids" not in x:
            return super().preprocess_samples(x, y, sample_weight)
        ids, size = x["token_ids"], self.backbone.token_embedding.input_dim
        # An embedding lookup clips or wraps such ids without a word.
        if isinstance(ids, np.ndarray) and ids.size:
            low, high = ids.min(), ids.max()
            if low < 0 or high >= size:
                raise ValueError(
                    f"Token ids must be in [0, {size}), the model's "
                    f"vocabulary. Received: ids from {low} to {high}"
                )
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def generate_step(self, inputs, stop_token_ids=None):
        """Continues every prompt of a batch up to its padded length.

        Args:
            inputs: dictionary of `"token_ids"` and `"padding_mask"` (B, T);
                the mask is 1 on prompts.
            stop_token_ids: ids after which a row is finished, or None.

        Returns:
            Dictionary of the same shape, the mask ending with the stop token.
        """
        token_ids = ops.cast(inputs["token_ids"], "int32")
        prompt_BT = ops.cast(inputs["padding_mask"], "bool")
        lengths = ops.sum(ops.cast(prompt_BT, "int32"), axis=-1)

        def next(prompt, cache, index):
            # What stands behind `index` is invisible to a causal model.
            hidden_BTD = self.backbone({"token_ids": prompt})
            start = (0, index - 1, 0)
            shape = (prompt.shape[0], 1, hidden_BTD.shape[-1])
            hidden_BD = ops.slice(hidden_BTD, start, shape)[:, 0]
            logits = self.backbone.token_embedding(hidden_BD, reverse=True)
            return logits, hidden_BD, cache

        token_ids = self.sampler(
            next=next,
            prompt=token_ids,
            index=ops.min(lengths),
            mask=prompt_BT,
            stop_token_ids=stop_token_ids,
            model=self,
        )
        mask = ops.ones_like(prompt_BT)
        if stop_token_ids is not None:
            stops = ops.zeros_like(prompt_BT)
            for stop in stop_token_ids:
                stops = ops.logical_or(stops, ops.equal(token_ids, stop))
            stops = ops.logical_and(stops, ops.logical_not(prompt_BT))
            stops = ops.cast(stops, "int32")
            mask = ops.equal(ops.cumsum(stops, axis=-1) - stops, 0)
        return {"token_ids": token_ids, "padding_mask": mask}
