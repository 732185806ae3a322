"""Causal self-attention, with every stability method that acts inside it.

B batch, T query time, S key time, D model dimension, N query heads, K key and
value heads, G = N / K queries a key, H head dimension.
"""

import keras
from keras import ops

from keras_stable import backend
from keras_stable import telemetry
from keras_stable import variants
from keras_stable.linear import advance
from keras_stable.linear import apply_linear
from keras_stable.linear import make_linear
from keras_stable.norms import make_norm
from keras_stable.positions import rotate
from keras_stable.randomness import check_rate
from keras_stable.randomness import dropout


def soft_cap(x, cap):
    """`cap * tanh(x / cap)`: the identity near zero, never beyond +-cap.

    Source: Gemma 2 (arXiv 2408.00118). Not the argument
    `attn_logits_soft_cap` of `ops.dot_product_attention`, which raises
    off TPU and documents another formula.
    """
    return cap * ops.tanh(x / cap)


def visible(length, segment_ids=None, sliding_window=None):
    """Which keys each query sees: bool tensor (1 or B, T, S).

    A token sees itself and earlier tokens of its own document, of those the
    last `sliding_window`. Padding (segment 0) sees padding only, so that its
    rows stay finite.
    """
    t, s = ops.arange(length)[:, None], ops.arange(length)[None, :]
    mask = s <= t
    if sliding_window is not None:
        mask = ops.logical_and(mask, t - s < sliding_window)
    mask = mask[None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = ops.logical_and(mask, same)
    return mask


def attend(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    *,
    scale,
    softmax=variants.Softmax(),
    segment_ids=None,
    sliding_window=None,
    dropout_rate=0.0,
    seed=None,
):
    """Attention from queries, keys and values, by the formula.

    ```
    z = temperature * scale * q k^T       float32
    z = cap * tanh(z / cap)               if capped; before the mask
    p = softmax(where(visible, z, -inf))  float32
    p = clip((zeta - gamma) p + gamma, 0, 1)   if clipped
    y = dropout(p) v
    ```

    Args:
        q_BTNH, k_BSKH, v_BSKH: tensors, K divides N, T = S.
        scale: float.
        softmax: `Softmax`: temperature, cap, clip.
        segment_ids: int tensor (B, T) or None: tokens see their own document.
        sliding_window: int or None: how many keys a query sees at most.
        dropout_rate, seed: dropout on probabilities, where `seed` is given.

    Returns:
        Tensor of the shape and dtype of `q_BTNH`.
    """
    scale = scale * softmax.temperature
    length = ops.shape(q_BTNH)[1]
    plain = softmax.cap is None and softmax.clip is None
    plain = plain and softmax.logits_dtype == "float32"
    # JAX's path has no float16 products with float32 sums on CPU, and GPUs
    # that want float16 (T4) have no fused kernel in it.
    plain = plain and keras.backend.standardize_dtype(q_BTNH.dtype) != "float16"
    if plain and seed is None:
        # Nothing changes logits or probabilities: the fused path will do.
        if segment_ids is None and sliding_window is None:
            where = {"is_causal": True}
        else:
            mask = visible(length, segment_ids, sliding_window)
            where = {"mask": mask[:, None]}
        if k_BSKH.shape[2] == 1:
            # Keras on TensorFlow repeats two heads and more, but not one.
            k_BSKH, v_BSKH = (
                ops.repeat(x, q_BTNH.shape[2], axis=2)
                for x in (k_BSKH, v_BSKH)
            )
        return ops.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, scale=scale, **where
        )

    B, T, N, H = ops.shape(q_BTNH)
    K = k_BSKH.shape[2]
    mask = visible(length, segment_ids, sliding_window)[:, None, None]
    # Products of bfloat16 numbers are exact in float32; a bfloat16 logit near
    # 300 would be off by one nat.
    q_BTKGH = ops.reshape(q_BTNH, (B, T, K, N // K, H))
    q_BTKGH, k_BSKH = (ops.cast(x, "float32") for x in (q_BTKGH, k_BSKH))

    def product(q_BTKGH, k_BSKH):
        return scale * ops.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH)

    raw_BKGTS = product(q_BTKGH, k_BSKH)
    if (recorder := telemetry.recorder()) is not None:
        seen = backend.apart(raw_BKGTS, product, q_BTKGH, k_BSKH)
        recorder.logits(seen, mask, softmax.cap)
    z = ops.cast(ops.cast(raw_BKGTS, softmax.logits_dtype), "float32")
    if softmax.cap is not None:
        z = soft_cap(z, softmax.cap)
    # Not -inf: its gradient through a fully masked row would be NaN.
    p = ops.softmax(ops.where(mask, z, -1e30), axis=-1)
    if softmax.clip is not None:
        clip = softmax.clip
        gamma = clip.gamma
        if gamma is None:
            gamma = -clip.alpha / ops.cast(length, "float32")
        p = ops.clip((clip.zeta - gamma) * p + gamma, 0.0, 1.0)
    p = ops.cast(dropout(p, dropout_rate, seed), v_BSKH.dtype)
    y_BTKGH = ops.einsum("bkgts,bskh->btkgh", p, v_BSKH)
    return ops.reshape(y_BTKGH, (B, T, N, H))


@keras.saving.register_keras_serializable("keras_stable")
class CausalSelfAttention(keras.layers.Layer):
    """Causal self-attention whose stability methods a `Variant` names.

    ```
    q, k, v = norm(x W_q), norm(x W_k), norm(x W_v)    norms as in `qkv_norm`
    q, k    = rope(q), rope(k)                         if positions are rotary
    y       = attend(q, k, v) W_o
    ```

    Weights: `query/kernel` (D, N H), `key/kernel` and `value/kernel` (D, K H),
    `output/kernel` (N H, D), and those of `query_norm`, `key_norm`,
    `value_norm`: (H,) per head, shared by heads, or the full width.

    Args:
        num_heads: int. N.
        num_key_value_heads: int. K, divides N: grouped-query attention; 1 is
            multi-query. Defaults to `num_heads`.
        head_dim: int. H. Defaults to D / num_heads, which must be whole.
        variant: name, `Variant` or its dictionary. Defaults to `"baseline"`.
        scale: float. Multiplies q.k. Defaults to 1/sqrt(head_dim).
        sliding_window: int or None. Keys a query sees at most.
        rope_wavelength: float. Defaults to 10000.
        dropout: float. On the attention probabilities.
        kernel_initializer, output_initializer: of query, key, value and of
            output. Default to normal(0.02).
        seed: int or None, for dropout.

    Call arguments:
        x_BTD: tensor.
        segment_ids: int tensor (B, T): 0 for padding, any other value names a
            document. Tokens see only tokens of the same document.
        state: what `next_state(training)` returned; called here by default.
            Pass it when the call itself is rematerialised.
        training: bool.
        return_stats: bool. Whether to return `(y, stats)`, statistics by
            linear layer and `"max_logit"`.

    Example:

    >>> layer = CausalSelfAttention(num_heads=4, variant="qk_norm_cap")
    >>> y = layer(keras.random.normal((2, 8, 32)))
    """

    def __init__(
        self,
        num_heads,
        num_key_value_heads=None,
        head_dim=None,
        variant="baseline",
        scale=None,
        sliding_window=None,
        rope_wavelength=10000.0,
        dropout=0.0,
        kernel_initializer=None,
        output_initializer=None,
        seed=None,
        **kwargs,
    ):
        # Keras would cast the float32 sigmas in `state` to the compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.variant = variants.get(variant)
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads or num_heads
        if num_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_heads` must be a multiple of `num_key_value_heads`. "
                f"Received: num_heads={num_heads}, "
                f"num_key_value_heads={num_key_value_heads}"
            )
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(
                "`sliding_window` must be at least 1 (the token itself), or "
                f"None. Received: sliding_window={sliding_window}"
            )
        self.head_dim = head_dim
        self.scale = scale
        self.sliding_window = sliding_window
        self.rope_wavelength = rope_wavelength
        self.dropout = check_rate(dropout)
        normal = keras.initializers.RandomNormal(stddev=0.02)
        self.kernel_initializer = keras.initializers.get(
            kernel_initializer or normal
        )
        self.output_initializer = keras.initializers.get(
            output_initializer or normal
        )
        self.seed = seed
        self.seed_generator = (
            keras.random.SeedGenerator(seed) if dropout > 0 else None
        )
        self.supports_masking = True

    def build(self, x_BTD_shape, segment_ids_shape=None):
        hidden_dim = x_BTD_shape[-1]
        if self.head_dim is None and hidden_dim % self.num_heads:
            raise ValueError(
                "The model dimension must be a multiple of `num_heads`, "
                f"unless `head_dim` is given. Received: {hidden_dim} "
                f"dimensions, num_heads={self.num_heads}"
            )
        H = self._head_dim = self.head_dim or hidden_dim // self.num_heads
        rotary = self.variant.architecture.position == "rope"
        if rotary and H % 2:
            raise ValueError(
                "Rotary positions rotate pairs of channels: `head_dim` must "
                f"be even. Received: head_dim={H}"
            )
        N, K = self.num_heads, self.num_key_value_heads
        self.query = self._linear("query", N * H, x_BTD_shape)
        self.key = self._linear("key", K * H, x_BTD_shape)
        self.value = self._linear("value", K * H, x_BTD_shape)
        self.output_dense = self._linear("output", hidden_dim, (None, N * H))
        norm = self.variant.qkv_norm
        self.query_norm = self._norm("query_norm", norm.qk, N * H)
        self.key_norm = self._norm("key_norm", norm.qk, K * H)
        self.value_norm = self._norm("value_norm", norm.v, K * H)

    def _linear(self, name, units, input_shape):
        initializer = (
            self.output_initializer
            if name == "output"
            else self.kernel_initializer
        )
        layer = make_linear(
            name,
            units,
            self.variant,
            # One instance each: a shared seed would give equal kernels.
            kernel_initializer=initializer.clone(),
            dtype=self.dtype_policy,
        )
        layer.build(input_shape)
        return layer

    def _norm(self, name, kind, width):
        layer = make_norm(
            kind,
            epsilon=self.variant.architecture.epsilon,
            name=name,
            dtype=self.dtype_policy,
        )
        if layer is not None:
            full = self.variant.qkv_norm.scope == "full"
            layer.build((None, width if full else self._head_dim))
        return layer

    def next_state(self, training=False):
        """Advances what the layer remembers; returns what `call` needs."""
        linears = (self.query, self.key, self.value, self.output_dense)
        state = advance(linears, training)
        if training and self.dropout > 0:
            state["seed"] = self.seed_generator.next()
        return state

    def _heads(self, x, norm, rotary=False):
        """(B, T, heads * H) to (B, T, heads, H), normed and rotated."""
        full = self.variant.qkv_norm.scope == "full"
        before = self.variant.qkv_norm.order == "before_rope" or not rotary

        def split(x):
            B, T, width = ops.shape(x)
            shape = (B, T, width // self._head_dim, self._head_dim)
            return ops.reshape(x, shape)

        def normalize(x):
            if norm is None:
                return x
            if not full:
                return norm(x)
            return ops.reshape(norm(ops.reshape(x, flat)), ops.shape(x))

        flat = ops.shape(x)
        x = split(x)
        if before:
            x = normalize(x)
        if rotary:
            x = rotate(x, ops.arange(flat[1]), self.rope_wavelength)
        return x if before else normalize(x)

    def call(self, x_BTD, segment_ids=None, state=None, training=None):
        x_BTD = ops.cast(x_BTD, self.compute_dtype)
        state = self.next_state(training) if state is None else state
        query = apply_linear(self.query, x_BTD, state)
        key = apply_linear(self.key, x_BTD, state)
        value = apply_linear(self.value, x_BTD, state)
        rotary = self.variant.architecture.position == "rope"
        y_BTNH = attend(
            self._heads(query, self.query_norm, rotary),
            self._heads(key, self.key_norm, rotary),
            self._heads(value, self.value_norm),
            scale=self._head_dim**-0.5 if self.scale is None else self.scale,
            softmax=self.variant.softmax,
            segment_ids=segment_ids,
            sliding_window=self.sliding_window,
            dropout_rate=self.dropout,
            seed=state.get("seed"),
        )
        y_BTE = ops.reshape(y_BTNH, ops.shape(query))
        return apply_linear(self.output_dense, y_BTE, state)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "variant": self.variant.to_dict(),
            "scale": self.scale,
            "sliding_window": self.sliding_window,
            "rope_wavelength": self.rope_wavelength,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "output_initializer": keras.initializers.serialize(
                self.output_initializer
            ),
            "seed": self.seed,
        }
