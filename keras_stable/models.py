"""The language model, on KerasHub's conventions.

B batch, T time, D model dimension, V vocabulary.
"""

import contextlib

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_stable import backend
from keras_stable import checkpoints
from keras_stable import generation
from keras_stable import losses
from keras_stable import telemetry
from keras_stable.backbone import PAPER_VOCABULARY
from keras_stable.backbone import SIZES
from keras_stable.backbone import StableBackbone
from keras_stable.backbone import complete
from keras_stable.choices import check_choice
from keras_stable.choices import nearest
from keras_stable.distribution import check_heard
from keras_stable.optimizers import AdamW
from keras_stable.preprocessing import StableCausalLMPreprocessor
from keras_stable.preprocessing import preprocessor_of
from keras_stable.presets import Presets

# Tokens whose logits a monitor sees, where `fit` does not make those of all.
SEEN = 256


@keras.saving.register_keras_serializable("keras_stable")
class StableCausalLM(Presets, keras_hub.models.CausalLM):
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
    that of the last batch alone; and `z_loss` and `entropy_penalty`, weighted,
    if the variant has them: both are in the gradient and not in the loss, so
    that `exp(loss)` is a perplexity. Neither `fit` nor `evaluate` makes the
    tensor of all logits, unless `compile` is given a loss or metrics of
    yours: see `next_token_loss`. `fit` takes strings, or dictionaries with
    `"token_ids"` and optionally `"padding_mask"` with the next ids as targets.

    Example:

    >>> lm = StableCausalLM.from_size("1m", 256, variant="qkv_norm")
    >>> ids = np.ones((2, 9), "int32")
    >>> _ = lm.fit({"token_ids": ids[:, :-1]}, ids[:, 1:], verbose=0)
    """

    backbone_cls = StableBackbone
    preprocessor_cls = StableCausalLMPreprocessor
    # Set by `compile`, which KerasHub calls within `__init__`.
    token_accuracy = None
    _chunked = _in_step = False

    def __init__(self, backbone, preprocessor=None, **kwargs):
        self.backbone = backbone
        self.preprocessor = preprocessor
        hidden_BTD = backbone(backbone.input)
        logits_BTV = backbone.token_embedding(hidden_BTD, reverse=True)
        super().__init__(inputs=backbone.input, outputs=logits_BTV, **kwargs)
        self.batch_loss = telemetry.LastValue(name="batch_loss")
        self.penalties = {}
        if backbone.variant.architecture.z_loss:
            self.penalties["z_loss"] = keras.metrics.Mean(name="z_loss")
        if backbone.variant.softmax.entropy is not None:
            name = "entropy_penalty"
            self.penalties[name] = keras.metrics.Mean(name=name)
        self._assistant = lambda: None

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
        return cls(backbone, preprocessor_of(tokenizer))

    @classmethod
    def from_transformers(cls, source, **kwargs):
        """The model of a `transformers` checkpoint: see `checkpoints.read`.

        Args:
            source: directory, `"hf:OWNER/NAME"`, or `transformers` model.
            **kwargs: `dropout`, `dtype`, and others of `StableBackbone`.
        """
        backbone, tokenizer = checkpoints.read(source, **kwargs)
        return cls(backbone, preprocessor_of(tokenizer))

    def to_transformers(self, path, **kwargs):
        """Writes what `transformers` reads: see `checkpoints.write`.

        Args:
            path: directory, new or empty.
            **kwargs: `dtype` and `max_shard_size`.
        """
        tokenizer = None
        if self.preprocessor is not None:
            tokenizer = self.preprocessor.tokenizer
        return checkpoints.write(self.backbone, tokenizer, path, **kwargs)

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(complete(inputs), *args, **kwargs)

    def call(self, inputs, training=None, **kwargs):
        if self._without_logits:
            # Hidden states: the loss has the head in it.
            return self.backbone(inputs, training=training)
        return super().call(complete(inputs), training=training, **kwargs)

    def compile(self, optimizer="auto", loss="auto", **kwargs):
        """Configures training.

        Args:
            optimizer: defaults to `AdamW(3e-4)`.
            loss: defaults to `NextTokenLoss()`.
            **kwargs: of `keras_hub.models.CausalLM.compile`. Its default
                `weighted_metrics`, the accuracy of tokens, needs no logits.
        """
        check_heard()
        weighted_metrics = kwargs.pop("weighted_metrics", "auto")
        if optimizer == "auto":
            optimizer = AdamW(3e-4)
        if loss == "auto":
            loss = losses.NextTokenLoss()
        if self.token_accuracy is not None:
            del self.token_accuracy
        if weighted_metrics == "auto":
            name = "sparse_categorical_accuracy"
            self.token_accuracy = keras.metrics.Mean(name=name)
            weighted_metrics = None
        super().compile(
            optimizer=optimizer,
            loss=loss,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )
        if backend.must_merge() and not isinstance(self.optimizer, AdamW):
            raise ValueError(
                "In several processes on torch, `keras_stable.AdamW` alone "
                "sums their gradients, and not under mixed_float16. Received: "
                f"{type(self.optimizer).__name__}. Use it with mixed_bfloat16 "
                "or float32, or KERAS_BACKEND=jax."
            )
        self._chunked = (
            isinstance(loss, losses.NextTokenLoss)
            and loss.reduction == "sum_over_batch_size"
            and loss.ignore_class is None
            and not (weighted_metrics or kwargs.get("metrics"))
            and not kwargs.get("loss_weights")
        )

    @property
    def _without_logits(self):
        """Whether the step that runs gives hidden states to the loss."""
        embedding = self.backbone.token_embedding
        plain = embedding.quantization_mode is None
        return self._in_step and self._chunked and plain

    @contextlib.contextmanager
    def _step(self):
        self._in_step = True
        try:
            with backend.queueing():
                yield
        finally:
            self._in_step = False

    def train_step(self, *args):
        with self._step():
            logs = super().train_step(*backend.to_device(args))
        return backend.send_logs(logs)

    def test_step(self, *args):
        with self._step():
            return super().test_step(*backend.to_device(args))

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

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """See `keras.Model.compute_loss`; adds the variant's penalties."""
        extra, weight = {}, self.backbone.variant.architecture.z_loss
        weight = weight if training else 0.0
        # Of `tf.distribute`, whose losses Keras adds up.
        replicas = backend.replicas()
        if self._without_logits:
            embedding = self.backbone.token_embedding
            if telemetry.recorder() is not None:
                # Of the logits, those of some tokens are measured.
                last = max(SEEN // (y_pred.shape[0] or SEEN), 1)
                seen = ops.stop_gradient(y_pred[:, -last:])
                with backend.without_gradient():
                    embedding(seen, reverse=True)
            loss, penalty, accuracy = losses.next_token_loss(
                y_pred,
                embedding.head_kernel(),
                y,
                sample_weight,
                output_cap=embedding.logit_soft_cap,
                z_weight=weight,
                training=training,
            )
            # What layers gave to `add_loss`.
            loss = sum(self.losses, loss) / replicas
            accuracy = backend.global_mean(accuracy)
        else:
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            if weight:
                penalty = weight * losses.z_loss(y_pred, sample_weight)
                loss = loss + penalty / replicas
            accuracy = None
        if weight:
            extra["z_loss"] = penalty
        if training and "entropy_penalty" in self.penalties:
            # The blocks' `add_loss`: in `loss` already.
            extra["entropy_penalty"] = sum(self.losses)
        loss = backend.global_mean(loss)
        if extra:
            extra = {k: backend.global_mean(v) for k, v in extra.items()}
            # Penalties are in the gradient alone: the loss that is reported,
            # watched and exponentiated stays the tokens' cross-entropy.
            loss -= ops.stop_gradient(sum(extra.values())) / replicas
        for name, value in extra.items():
            self.penalties[name].update_state(value)
        if self.token_accuracy is not None:
            if accuracy is None:
                accuracy = losses.token_accuracy(y_pred, y, sample_weight)
            weighted = sample_weight is not None
            count = ops.sum(sample_weight) if weighted else ops.size(y)
            self.token_accuracy.update_state(accuracy, sample_weight=count)
        self.batch_loss.update_state(*backend.merge([ops.stop_gradient(loss)]))
        return loss

    # KerasHub's tasks forget compile settings and optimizer slots when saved;
    # these two keep them.
    def get_compile_config(self):
        config = super().get_compile_config()
        if config:
            config["sampler"] = keras_hub.samplers.serialize(self.sampler)
            config["has_slots"] = self.optimizer.built
            if self.token_accuracy is not None:
                config["weighted_metrics"] = "auto"
        return config

    def compile_from_config(self, config):
        config = keras.saving.deserialize_keras_object(config)
        has_slots = config.pop("has_slots", True)
        self.compile(**config)
        if has_slots:
            self.optimizer.build(self.trainable_variables)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        if not isinstance(x, dict) or "token_ids" not in x:
            return super().preprocess_samples(x, y, sample_weight)
        # Batches of a Grain pipeline are seen here for the first time.
        self._check_ids(x)
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def make_generate_function(self):
        function = super().make_generate_function()
        assistant = self._assistant()

        def generate(inputs, stop_token_ids=None):
            self._check_ids(inputs)
            generation.check_prompts(inputs, assistant)
            if assistant is not None:
                values = [v.value for v in assistant.variables]
                inputs = {**inputs, "assistant": values}
            return function(inputs, stop_token_ids=stop_token_ids)

        return generate

    def generate_step(self, inputs, stop_token_ids=None):
        """See `generation.continue_prompts`."""
        return generation.continue_prompts(
            self, inputs, stop_token_ids, self._assistant()
        )

    def generate(self, inputs, *args, assistant=None, **kwargs):
        """Continues prompts: see `keras_hub.models.CausalLM.generate`.

        Args:
            inputs: string, list of strings; or, without a preprocessor, a
                dictionary of `"token_ids"` and `"padding_mask"` (B, T), padded
                to the length wanted, the mask 1 on prompts.
            *args, **kwargs: `max_length`, `stop_token_ids`, `strip_prompt`.
            assistant: `StableCausalLM` of the same vocabulary that drafts
                tokens for a `keras_hub.samplers.SpeculativeSampler`.

        Raises:
            ValueError: for an empty prompt, ids outside the vocabulary, more
                tokens than learned positions, or an assistant amiss.
        """
        generation.check_assistant(self, assistant)
        if assistant is not self._assistant():
            # In a function, so that Keras does not take it for a part.
            self._assistant = lambda: assistant
            self.generate_function = None
        return super().generate(inputs, *args, **kwargs)

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode="logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """Logits or losses of given tokens, as in KerasHub's models.

        Args:
            token_ids: int (B, T).
            padding_mask: int (B, T), as in calls. Defaults to one document.
            scoring_mode: `"logits"`, or `"loss"`: -log p(target) of each
                token.
            layer_intercept_fn: function `(x_BTD, i)` that returns what takes
                x's place: of the embeddings, i = -1, and of block i's output.
            target_ids: int (B, T), for `"loss"`.

        Returns:
            Float32 tensor (B, T, V), or (B, T) for `"loss"`.
        """
        check_choice(scoring_mode, ("logits", "loss"), "`scoring_mode`")
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError('scoring_mode="loss" needs `target_ids`.')
        self._check_ids({"token_ids": token_ids})
        backbone = self.backbone
        intercept = layer_intercept_fn or (lambda x, i: x)
        x = backbone.embed(token_ids, segment_ids=padding_mask)
        x = intercept(x, -1)
        for i, layer in enumerate(backbone.transformer_layers):
            x = intercept(layer(x, segment_ids=padding_mask), i)
        logits = backbone.token_embedding(backbone.finish(x), reverse=True)
        if scoring_mode == "logits":
            return logits
        return keras.losses.sparse_categorical_crossentropy(
            target_ids, logits, from_logits=True
        )
