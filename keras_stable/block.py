"""The residual equation, and the transformer block: that equation twice.

B batch, T time, D model dimension.
"""

import keras
from keras import ops

from keras_stable import telemetry
from keras_stable import variants
from keras_stable.attention import CausalSelfAttention
from keras_stable.choices import Learned
from keras_stable.choices import check_choice
from keras_stable.distribution import along_batch
from keras_stable.mlp import MLP
from keras_stable.norms import make_norm
from keras_stable.randomness import check_rate
from keras_stable.randomness import dropout

# What a block may compute again in the backward pass, by memory kept.
REMAT = ("none", "mlp", "block")


class Residual(keras.layers.Layer):
    """Everything around one residual branch.

    ```
    x <- S(a * x + g * dropout(B(f(P(x)))))
    ```

    P, B, S are the norms `pre_norm`, `branch_norm`, `stream_norm` of a
    `Placement`, or nothing; a is its `skip`; g its `gain`, a number or the
    weight `gain` of shape (D,).

    Args:
        placement: `Placement` with numbers for scales: see `Placement.at`.
        epsilon: float, of the norms.
        dropout: float.

    Call arguments:
        x_BTD: tensor.
        branch: function f, from (B, T, D) to (B, T, D).
        seed: for dropout; None for no dropout.
    """

    def __init__(self, placement, epsilon=1e-6, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.placement = placement
        self.epsilon = epsilon
        self.dropout = check_rate(dropout)

    def build(self, x_BTD_shape):
        for name in ("pre", "branch", "stream"):
            norm = make_norm(
                getattr(self.placement, name),
                epsilon=self.epsilon,
                name=f"{name}_norm",
                dtype=self.dtype_policy,
            )
            if norm is not None:
                norm.build(x_BTD_shape)
            setattr(self, f"{name}_norm", norm)
        self.gain = self.placement.gain
        if isinstance(self.gain, Learned):
            self.gain = self.add_weight(
                name="gain",
                shape=(x_BTD_shape[-1],),
                initializer=keras.initializers.Constant(self.gain.init),
                # 1e-4 + 1e-6 is 1e-4 in bfloat16.
                autocast=False,
            )

    def call(self, x_BTD, *, branch, seed=None):
        def normalize(norm, x):
            return x if norm is None else norm(x)

        def scaled(x, scale):
            if isinstance(scale, float) and scale == 1.0:
                return x
            scale = ops.cast(scale, "float32")
            return ops.cast(ops.cast(x, "float32") * scale, x.dtype)

        x_BTD = along_batch(x_BTD)
        y_BTD = along_batch(branch(normalize(self.pre_norm, x_BTD)))
        y_BTD = normalize(self.branch_norm, y_BTD)
        y_BTD = scaled(dropout(y_BTD, self.dropout, seed), self.gain)
        x_BTD = scaled(x_BTD, self.placement.skip) + y_BTD
        return normalize(self.stream_norm, x_BTD)

    def compute_output_shape(self, x_BTD_shape):
        return x_BTD_shape


@keras.saving.register_keras_serializable("keras_stable")
class TransformerBlock(keras.layers.Layer):
    """One decoder block: attention, then MLP, each in a `Residual`.

    ```
    x <- S(a * x + g * B(attention(P(x))))
    x <- S(a * x + g * B(mlp(P(x))))
    ```

    All that the block remembers (power-iteration vectors, seeds) is advanced
    by `next_state` before the block's function runs and enters it as an
    argument, so the function itself is pure and can be rematerialised on every
    backend. Weights: `attention/...`, `attention_residual/...`, `mlp/...`,
    `mlp_residual/...`.

    Args:
        num_heads: int.
        intermediate_dim: int. Defaults to 4 D.
        num_key_value_heads, head_dim: of `CausalSelfAttention`.
        variant: name, `Variant` or its dictionary. Defaults to `"baseline"`.
            For one of several layers give `variant.at(num_layers, layer)`,
            which resolves what depends on them; this is the only one.
        dropout: float. On attention probabilities and on both branches.
        remat: what the backward pass recomputes instead of keeping it:
            `"none"`; `"mlp"`, the second half, whose inner activations are
            the largest; `"block"`, all of it. True is `"block"`, False
            `"none"`. Defaults to `"none"`.
        kernel_initializer, output_initializer: of linear layers that read
            from, and that write to, the residual stream.
        seed: int or None, for dropout.

    Call arguments:
        x_BTD: tensor.
        segment_ids: int tensor (B, T): 0 for padding, any other value names a
            document. Tokens see only tokens of the same document.
        state: what `next_state(training)` returned; called here by default.
            Pass it when the call itself is rematerialised.
        cache, start: of `CausalSelfAttention`. With a cache the call returns
            a tuple of its output and of the next cache.
        training: bool.

    Example:

    >>> block = TransformerBlock(num_heads=4, variant="qkv_norm")
    >>> x = block(keras.random.normal((2, 8, 32)))
    """

    def __init__(
        self,
        num_heads,
        intermediate_dim=None,
        num_key_value_heads=None,
        head_dim=None,
        variant="baseline",
        dropout=0.0,
        remat="none",
        kernel_initializer=None,
        output_initializer=None,
        seed=None,
        **kwargs,
    ):
        # Keras would cast the float32 sigmas in `state` to the compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.variant = variants.get(variant).at(num_layers=1, layer=0)
        remat = {True: "block", False: "none"}.get(remat, remat)
        check_choice(remat, REMAT, "`remat`")
        self.remat = remat
        self.dropout = check_rate(dropout)
        shared = {
            "variant": self.variant,
            "kernel_initializer": kernel_initializer,
            "output_initializer": output_initializer,
            "dtype": self.dtype_policy,
        }
        self.attention = CausalSelfAttention(
            num_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            dropout=dropout,
            seed=seed,
            name="attention",
            **shared,
        )
        self.mlp = MLP(intermediate_dim, name="mlp", **shared)
        self.attention_residual, self.mlp_residual = (
            Residual(
                getattr(self.variant, branch),
                epsilon=self.variant.architecture.epsilon,
                dropout=dropout,
                name=f"{branch}_residual",
                dtype=self.dtype_policy,
            )
            for branch in ("attention", "mlp")
        )
        self.supports_masking = True

    def build(self, x_BTD_shape, segment_ids_shape=None):
        for layer in (
            self.attention,
            self.mlp,
            self.attention_residual,
            self.mlp_residual,
        ):
            layer.build(x_BTD_shape)

    def next_state(self, training=False):
        """Advances what the block remembers; returns what `call` needs."""
        state = {
            "attention": self.attention.next_state(training),
            "mlp": self.mlp.next_state(training),
        }
        if training and self.dropout > 0:
            generator = self.attention.seed_generator
            state["seeds"] = [generator.next() for _ in range(2)]
        return state

    def call(
        self,
        x_BTD,
        segment_ids=None,
        state=None,
        cache=None,
        start=None,
        training=None,
    ):
        x_BTD = ops.cast(x_BTD, self.compute_dtype)
        state = self.next_state(training) if state is None else state
        penalized = training and self.variant.softmax.entropy is not None

        def attention_half(x_BTD, state, segment_ids=None):
            beside = None

            def attention(x_BTD):
                # The next cache and the penalty must leave as outputs.
                nonlocal beside
                y = self.attention(
                    x_BTD,
                    segment_ids=segment_ids,
                    state=state["attention"],
                    cache=cache,
                    start=start,
                    training=training,
                    return_penalty=penalized,
                )
                if cache is not None or penalized:
                    y, beside = y
                return y

            seed = state.get("seeds", (None, None))[0]
            x_BTD = self.attention_residual(x_BTD, branch=attention, seed=seed)
            return x_BTD if beside is None else (x_BTD, beside)

        def mlp_half(x_BTD, state):
            def mlp(x_BTD):
                return self.mlp(x_BTD, state=state["mlp"], training=training)

            seed = state.get("seeds", (None, None))[1]
            return self.mlp_residual(x_BTD, branch=mlp, seed=seed)

        def whole(x_BTD, state, segment_ids=None):
            x_BTD, *beside = listed(attention_half(x_BTD, state, segment_ids))
            x_BTD = mlp_half(x_BTD, state)
            return (x_BTD, *beside) if beside else x_BTD

        def listed(found):
            return found if isinstance(found, (tuple, list)) else (found,)

        def part(function, name):
            if cache is None and "seeds" not in state:
                # Seeded random numbers are not torch operations.
                key = (name, *self._key())
                function = telemetry.region(self, function, key, training)
            if training and name == self.remat:
                function = telemetry.remat(function)
            return function

        # TensorFlow rematerialises functions of tensors, None is not one.
        where = () if segment_ids is None else (segment_ids,)
        if training and self.remat == "mlp":
            first = part(attention_half, "attention")
            x_BTD, *beside = listed(first(x_BTD, state, *where))
            x_BTD = part(mlp_half, "mlp")(x_BTD, state)
        else:
            found = part(whole, "block")(x_BTD, state, *where)
            x_BTD, *beside = listed(found)
        if cache is not None:
            return x_BTD, *beside
        if penalized:
            self.add_loss(*beside)
        return x_BTD

    def _key(self):
        """Equal for blocks that compute the same of equal variables."""
        attention = self.attention
        return (
            self.variant,
            attention.num_heads,
            attention.num_key_value_heads,
            self.compute_dtype,
        )

    def get_config(self):
        inherited = self.attention.get_config()
        names = (
            "num_heads",
            "num_key_value_heads",
            "head_dim",
            "kernel_initializer",
            "output_initializer",
            "seed",
        )
        return {
            **super().get_config(),
            **{name: inherited[name] for name in names},
            "intermediate_dim": self.mlp.intermediate_dim,
            "variant": self.variant.to_dict(),
            "dropout": self.dropout,
            "remat": self.remat,
        }
