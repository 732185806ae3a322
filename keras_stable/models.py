"""The language model, on KerasHub's conventions.

B batch, T time, D model dimension, V vocabulary.
"""

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_stable.backbone import PAPER_VOCABULARY
from keras_stable.backbone import SIZES
from keras_stable.backbone import StableBackbone
from keras_stable.backbone import complete
from keras_stable.choices import nearest
from keras_stable.optimizers import AdamW
from keras_stable.telemetry import LastValue


@keras.saving.register_keras_serializable("keras_stable")
class StableCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """From strings to packed ids for `StableCausalLM`, and back.

    A prompt to `generate` begins with the tokenizer's start token, if it has
    one, as in all of KerasHub.

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

    Beside `loss`, the mean since the epoch began, `fit` reports `batch_loss`,
    that of the last batch alone. `fit` takes strings, or dictionaries with
    `"token_ids"` and optionally `"padding_mask"` with the next ids as targets.

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
        self.batch_loss = LastValue(name="batch_loss")

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
        return super().__call__(complete(inputs), *args, **kwargs)

    def call(self, inputs, *args, **kwargs):
        return super().call(complete(inputs), *args, **kwargs)

    def compile(self, optimizer="auto", loss="auto", **kwargs):
        """Configures training; `"auto"` is `AdamW(3e-4)` and cross-entropy.

        See `keras_hub.models.CausalLM.compile` for the other arguments.
        """
        if optimizer == "auto":
            optimizer = AdamW(3e-4)
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    def fit(self, x=None, *args, shuffle=False, **kwargs):
        """See `keras.Model.fit`; samples are taken in the order given.

        KerasHub feeds arrays through Grain unshuffled whatever `shuffle` is
        (and Keras warns if it is true); `TokenBatches` shuffles by itself.
        """
        self._check_ids(x)
        return super().fit(x, *args, shuffle=shuffle, **kwargs)

    def evaluate(self, x=None, *args, **kwargs):
        """See `keras.Model.evaluate`."""
        self._check_ids(x)
        return super().evaluate(x, *args, **kwargs)

    def _check_ids(self, x):
        """Refuses ids that a lookup would clip or wrap without a word."""
        ids = x.get("token_ids") if isinstance(x, dict) else None
        if isinstance(ids, np.ndarray) and ids.size:
            size = self.backbone.token_embedding.input_dim
            low, high = ids.min(), ids.max()
            if low < 0 or high >= size:
                raise ValueError(
                    f"Token ids must be in [0, {size}), the model's "
                    f"vocabulary. Received: ids from {low} to {high}"
                )

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.batch_loss.update_state(loss)
        return loss

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
        # Batches of a Grain pipeline are seen here for the first time.
        self._check_ids(x)
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
        if stop_token_ids is not None:
            # Samplers look for stops in the whole row, and the padding may be
            # one: the byte tokenizer's zero is both.
            stops = set(stop_token_ids)
            other = next(i for i in range(len(stops) + 1) if i not in stops)
            token_ids = ops.where(prompt_BT, token_ids, other)

        def next_logits(prompt, cache, index):
            # What stands behind `index` is invisible to a causal model.
            hidden_BTD = self.backbone({"token_ids": prompt})
            start = (0, index - 1, 0)
            shape = (prompt.shape[0], 1, hidden_BTD.shape[-1])
            hidden_BD = ops.slice(hidden_BTD, start, shape)[:, 0]
            logits = self.backbone.token_embedding(hidden_BD, reverse=True)
            return logits, hidden_BD, cache

        token_ids = self.sampler(
            next=next_logits,
            prompt=token_ids,
            index=ops.min(lengths),
            mask=prompt_BT,
            stop_token_ids=stop_token_ids,
            model=self,
        )
        mask = ops.ones_like(prompt_BT)
        if stop_token_ids is not None:
            ends = ops.zeros_like(prompt_BT)
            for stop in stop_token_ids:
                ends = ops.logical_or(ends, ops.equal(token_ids, stop))
            ends = ops.logical_and(ends, ops.logical_not(prompt_BT))
            ends = ops.cast(ends, "int32")
            mask = ops.equal(ops.cumsum(ends, axis=-1) - ends, 0)
        return {"token_ids": token_ids, "padding_mask": mask}
