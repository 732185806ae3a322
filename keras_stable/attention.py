"""Causal self-attention, with every stability method that acts inside it.

B batch, T query time, S key time, D model dimension, N query heads, K key and
value heads, H head dimension.
"""

import keras
from keras import ops

from keras_stable import variants
from keras_stable.attend import attend
from keras_stable.attend import choose
from keras_stable.entropy import THETA_INIT
from keras_stable.entropy import entropy_penalty
from keras_stable.linear import advance
from keras_stable.linear import apply_linear
from keras_stable.linear import make_linear
from keras_stable.norms import make_norm
from keras_stable.positions import rotate
from keras_stable.randomness import check_rate


def explain(
    variant,
    batch_size,
    length,
    num_heads,
    head_dim,
    dtype=None,
    packed=False,
    dropout=False,
):
    """Which path the attention of a variant takes here, in training.

    Paths never change a formula; they differ in speed and memory. It depends
    on the backend, on its device and on shapes.

    Args:
        variant: name, `Variant` or its dictionary. Where its layers differ,
            its first one.
        batch_size, length, num_heads, head_dim: ints. B, T, N and H.
        dtype: that layers compute in. Defaults to the global policy's.
        packed: whether there are `segment_ids`.
        dropout: whether there is dropout.

    Returns:
        `Path`, with `name` and `why`.

    >>> explain("soft_cap", 2, 64, 4, 32, dtype="float32").name
    'formula'
    """
    variant = variants.get(variant).at(num_layers=1, layer=0)
    dtype = dtype or keras.config.dtype_policy().compute_dtype
    shape = (batch_size, length, num_heads, head_dim)
    window = variant.architecture.sliding_window
    return choose(
        keras.KerasTensor(shape, dtype),
        variant.softmax,
        masked=packed or window is not None,
        penalized=variant.softmax.entropy is not None,
        dropout=dropout,
    )


@keras.saving.register_keras_serializable("keras_stable")
class CausalSelfAttention(keras.layers.Layer):
    """Causal self-attention whose stability methods a `Variant` names.

    ```
    q, k, v = norm(x W_q), norm(x W_k), norm(x W_v)    norms as in `qkv_norm`
    q, k    = rope(q), rope(k)                         if positions are rotary
    y       = norm(attend(q, k, v)) W_o                `inner` of `attention`
    ```

    Weights: `query/kernel` (D, N H), `key/kernel` and `value/kernel` (D, K H),
    `output/kernel` (N H, D), those of `query_norm`, `key_norm`, `value_norm`:
    (H,) per head, shared by heads, or the full width; of `inner_norm`: (N H,).

    Args:
        num_heads: int. N.
        num_key_value_heads: int. K, divides N: grouped-query attention; 1 is
            multi-query. Defaults to `num_heads`.
        head_dim: int. H. Defaults to D / num_heads, which must be whole.
        variant: name, `Variant` or its dictionary. Defaults to `"baseline"`.
            Where its layers differ, this is the first of them: see
            `Variant.at`.
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
        cache: keys and values (B, S, K, H) of a row so far, from
            `make_cache(B, S)` on, for decoding. The call returns a tuple of
            its output and of the cache with the call's tokens in it.
        start: int scalar. With a cache, the position of the first token.
        training: bool.
        return_penalty: bool. Whether to return a tuple of the output and the
            weighted entropy penalty (where the variant has one; in training),
            instead of passing the penalty to `add_loss`: not possible within
            a rematerialised function.

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
        dropout=0.0,
        kernel_initializer=None,
        output_initializer=None,
        seed=None,
        **kwargs,
    ):
        # Keras would cast the float32 sigmas in `state` to the compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.variant = variants.get(variant).at(num_layers=1, layer=0)
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads or num_heads
        if num_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_heads` must be a multiple of `num_key_value_heads`. "
                f"Received: num_heads={num_heads}, "
                f"num_key_value_heads={num_key_value_heads}"
            )
        self.head_dim = head_dim
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
        architecture = self.variant.architecture
        if architecture.position == "rope" and H % 2:
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
        inner = self.variant.attention.inner
        self.inner_norm = self._norm("inner_norm", inner, N * H, "full")
        self.scale = architecture.query_scale or H**-0.5
        entropy, self.entropy_theta = self.variant.softmax.entropy, None
        if entropy is not None and entropy.tolerance is not None:
            self.entropy_theta = self.add_weight(
                name="entropy_theta",
                shape=(N,),
                initializer=keras.initializers.Constant(THETA_INIT),
                autocast=False,
            )

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

    def _norm(self, name, kind, width, scope=None):
        layer = make_norm(
            kind,
            epsilon=self.variant.architecture.epsilon,
            name=name,
            dtype=self.dtype_policy,
        )
        if layer is not None:
            full = (scope or self.variant.qkv_norm.scope) == "full"
            layer.build((None, width if full else self._head_dim))
        return layer

    def next_state(self, training=False):
        """Advances what the layer remembers; returns what `call` needs."""
        linears = (self.query, self.key, self.value, self.output_dense)
        state = advance(linears, training)
        if training and self.dropout > 0:
            state["seed"] = self.seed_generator.next()
        return state

    def make_cache(self, batch_size, length):
        """An empty cache: keys and values, zeros (B, length, K, H)."""
        shape = (batch_size, length, self.num_key_value_heads, self._head_dim)
        return tuple(ops.zeros(shape, self.compute_dtype) for _ in range(2))

    def _heads(self, x, norm, rotary=False, positions=None):
        """(B, T, heads * H) to (B, T, heads, H), normed and rotated."""
        B, T, width = ops.shape(x)
        shape = (B, T, width // self._head_dim, self._head_dim)
        how = self.variant.qkv_norm

        def normalize(x):
            if norm is None:
                return x
            if how.scope == "head":
                return norm(x)
            return ops.reshape(norm(ops.reshape(x, (B, T, width))), shape)

        x = ops.reshape(x, shape)
        if not rotary:
            return normalize(x)
        if how.order == "before_rope":
            x = normalize(x)
        architecture = self.variant.architecture
        wavelength = architecture.rope_wavelength
        x = rotate(x, positions, wavelength, architecture.rope_factor)
        return x if how.order == "before_rope" else normalize(x)

    def call(
        self,
        x_BTD,
        segment_ids=None,
        state=None,
        cache=None,
        start=None,
        training=None,
        return_penalty=False,
    ):
        x_BTD = ops.cast(x_BTD, self.compute_dtype)
        state = self.next_state(training) if state is None else state
        query = apply_linear(self.query, x_BTD, state)
        key = apply_linear(self.key, x_BTD, state)
        value = apply_linear(self.value, x_BTD, state)

        positions = None
        if cache is not None:
            positions = start + ops.arange(ops.shape(x_BTD)[1], dtype="int32")
        rotary = self.variant.architecture.position == "rope"
        q_BTNH = self._heads(query, self.query_norm, rotary, positions)
        k_BSKH = self._heads(key, self.key_norm, rotary, positions)
        v_BSKH = self._heads(value, self.value_norm)
        if cache is not None:
            cache = k_BSKH, v_BSKH = tuple(
                ops.slice_update(old, (0, start, 0, 0), new)
                for old, new in zip(cache, (k_BSKH, v_BSKH))
            )
        penalize = self._penalize(segment_ids) if training else None
        y_BTNH = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            scale=self.scale,
            softmax=self.variant.softmax,
            positions=positions,
            segment_ids=segment_ids,
            sliding_window=self.variant.architecture.sliding_window,
            penalize=penalize,
            dropout_rate=self.dropout,
            seed=state.get("seed"),
        )
        penalty = None
        if penalize is not None:
            y_BTNH, penalty = y_BTNH
            if not return_penalty:
                self.add_loss(penalty)
        y_BTE = ops.reshape(y_BTNH, ops.shape(query))
        if self.inner_norm is not None:
            y_BTE = self.inner_norm(y_BTE)
        y_BTD = apply_linear(self.output_dense, y_BTE, state)
        if cache is not None:
            return y_BTD, cache
        return (y_BTD, penalty) if return_penalty else y_BTD

    def _penalize(self, segment_ids):
        """The variant's entropy penalty as a function of logits, or None."""
        if (entropy := self.variant.softmax.entropy) is None:
            return None
        return lambda z, mask: entropy.weight * entropy_penalty(
            z, mask, entropy, theta=self.entropy_theta, segment_ids=segment_ids
        )

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "variant": self.variant.to_dict(),
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "output_initializer": keras.initializers.serialize(
                self.output_initializer
            ),
            "seed": self.seed,
        }
