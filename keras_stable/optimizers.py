"""AdamW as language models are trained with it."""

import re

import keras
from keras import ops

from keras_stable import backend
from keras_stable.choices import check_choice
from keras_stable.choices import check_integer
from keras_stable.schedules import number_in

# On torch, Keras replaces its own AdamW, but no subclass of it, by one that
# updates all variables in a few fused calls. We inherit from what it makes.
# `__new__` alone makes no variable, so that an import touches no device.
_KerasAdamW = type(keras.optimizers.AdamW.__new__(keras.optimizers.AdamW))


@keras.saving.register_keras_serializable("keras_stable")
class AdamW(_KerasAdamW):
    """AdamW that decays matrices only and counts in updates.

    Update number t (from 1), with g the gradient after clipping:

    ```
    w <- w - lr(t) * weight_decay * w                          "coupled"
    w <- w - lr(t) / peak_learning_rate * weight_decay * w     "independent"

    m <- beta_1 * m + (1 - beta_1) * g
    v <- beta_2 * v + (1 - beta_2) * g^2
    w <- w - lr(t) * sqrt(1 - beta_2^t) / (1 - beta_1^t)
             * m / (sqrt(v) + epsilon)
    ```

    `m` and `v` have the shape of `w`. What differs from
    `keras.optimizers.AdamW`:

    - *Defaults* are those of language models, see the arguments.
    - *Decay on matrices only.* Variables of fewer than two dimensions (norm
      gains, biases, scalars) are never decayed. `no_decay` excludes more.
    - *Independent decay.* Its strength follows the schedule but not the peak,
      so that a sweep over learning rates does not sweep the decay as well.
    - *Gradient accumulation.* The schedule, like Adam's t, counts updates;
      Keras's own counts batches, so that it runs k times too fast. k batches
      of size b give the update of one batch of size k * b: the gradient is
      averaged, then clipped, and the decay is applied once.
    - *Replicas of `tf.distribute`.* Their gradients are summed, then clipped.
    - *Embeddings on TensorFlow.* Their sparse gradients are added up first.
      Keras squares the parts of a repeated token one by one, in `v` and in
      the norm that is clipped.

    Epsilon is added to sqrt(v) *before* the bias correction ("epsilon hat" of
    Kingma and Ba), as in Keras. PyTorch and optax add it after the
    correction; in their terms it is `epsilon / sqrt(1 - beta_2^t)` here: 4.5
    times `epsilon` at the first update, and `epsilon` after about 100.

    Args:
        learning_rate: float, `LearningRateSchedule` or callable without
            arguments. Defaults to 1e-3, safe for models of up to about 100
            million parameters; larger ones want 3e-4 and less.
        weight_decay: float, at least 0. Defaults to 0.1, made for
            `"coupled"`; 1e-4 is usual for `"independent"` (Wortsman et al.).
        beta_1: float in [0, 1). Defaults to 0.9.
        beta_2: float in [0, 1). Defaults to 0.95: with 0.999 v lags behind
            growing gradients by a thousand steps, a known cause of spikes.
        epsilon: float, positive. Defaults to 1e-8. Layers whose gradients are
            as small as this stop learning.
        decay: `"coupled"` or `"independent"`. Defaults to `"coupled"`.
        peak_learning_rate: float, positive. What `"independent"` divides by.
            Defaults to `learning_rate.peak` where there is one
            (`WarmupSchedule`), or to a float `learning_rate` itself. Fixed
            from construction on: lowering the learning rate later lowers the
            decay with it.
        no_decay: strings, regular expressions. A variable is not decayed if
            one of them is found in its `path`, e.g. `["embedding"]`. Saved
            with the model, unlike `exclude_from_weight_decay()`, which works
            too. Defaults to none.
        global_clipnorm: float, positive, or None for none. Defaults to
            `"auto"`: 1, or None if `clipnorm` or `clipvalue` is given.
        gradient_accumulation_steps: int. Batches per update, at least 1.
            Defaults to `None`, which is 1. Keras has none for several
            replicas of `tf.distribute`.
        **kwargs: of `keras.optimizers.AdamW`: `clipnorm`, `clipvalue`,
            `use_ema`, `amsgrad`, `loss_scale_factor`, `name`, ...

    Raises:
        ValueError: at construction, for a value out of range.

    Example:

    >>> optimizer = AdamW(3e-3, weight_decay=1e-4, decay="independent")
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer, loss="mse")

    Reference:
        [Loshchilov and Hutter, 2019](https://arxiv.org/abs/1711.05101);
        [Wortsman et al., 2023](https://arxiv.org/abs/2309.14322), section 3.2,
        for independent decay (theirs is lr(t) / peak) and the defaults.
    """

    def __init__(
        self,
        learning_rate=1e-3,
        weight_decay=0.1,
        beta_1=0.9,
        beta_2=0.95,
        epsilon=1e-8,
        decay="coupled",
        peak_learning_rate=None,
        no_decay=(),
        global_clipnorm="auto",
        gradient_accumulation_steps=None,
        **kwargs,
    ):
        check_choice(decay, ("coupled", "independent"), "weight decay mode")
        learning_rate = _learning_rate(learning_rate)
        if decay == "independent":
            peak_learning_rate = _peak(learning_rate, peak_learning_rate)
        elif peak_learning_rate is not None:
            raise ValueError(
                "`peak_learning_rate` is for decay='independent' only. "
                f"Received: peak_learning_rate={peak_learning_rate!r}, "
                f"decay={decay!r}"
            )
        super().__init__(
            learning_rate,
            weight_decay=number_in(weight_decay, "`weight_decay`"),
            beta_1=number_in(beta_1, "`beta_1`", high=1),
            beta_2=number_in(beta_2, "`beta_2`", high=1),
            epsilon=_positive(epsilon, "`epsilon`"),
            gradient_accumulation_steps=_accumulation(
                gradient_accumulation_steps, kwargs.get("use_ema")
            ),
            **_clipping(global_clipnorm, kwargs),
        )
        self.decay = decay
        self.peak_learning_rate = peak_learning_rate
        self.no_decay = _patterns(no_decay)

    def apply(self, grads, trainable_variables=None):
        variables = trainable_variables or self._trainable_variables
        self._apply_merged(self._merge(grads, variables), trainable_variables)

    # Where replicas are observed, it is between these two.

    def _apply_merged(self, grads, trainable_variables):
        if self.gradient_accumulation_steps and backend.replicas() > 1:
            # Keras has replicas meet within a condition, which cannot be.
            raise ValueError(
                "Under `tf.distribute` with several replicas, Keras cannot "
                "accumulate gradients. Received: gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}. Use larger batches, or "
                "distribute on jax."
            )
        super().apply(grads, trainable_variables)

    def _merge(self, grads, variables):
        """The whole batch's gradients."""
        if keras.backend.backend() == "tensorflow":
            # `reshape` adds up the slices of sparse gradients.
            grads = [
                g if g is None else ops.reshape(g, v.shape)
                for g, v in zip(grads, variables)
            ]
        return backend.merge(grads)

    def _all_reduce_sum_gradients(self, grads_and_vars):
        """Nothing is left to sum: `apply` did it, before they are clipped.

        Keras on TensorFlow would clip each replica's part by itself.
        """
        return grads_and_vars

    # Keras calls the next three on every backend.

    def _get_current_learning_rate(self):
        schedules = keras.optimizers.schedules.LearningRateSchedule
        if isinstance(self._learning_rate, schedules):
            # `iterations` counts updates, `_iterations` batches.
            return self._learning_rate(self.iterations)
        return super()._get_current_learning_rate()

    def _use_weight_decay(self, variable):
        if len(variable.shape) < 2:
            return False
        if any(re.search(text, variable.path) for text in self.no_decay):
            return False
        return super()._use_weight_decay(variable)

    def _apply_weight_decay(self, variables):
        if self._fused(self._trainable_variables):
            return
        rate = self.learning_rate
        if self.decay == "independent":
            peak = self.peak_learning_rate
            # Another program may have put its own in its place.
            peak = backend.number(peak) if isinstance(peak, float) else peak
            rate = rate / peak
        # Not w * (1 - rate * decay): float32 would round the bracket, by
        # percents of a decay of 1e-6.
        for variable in filter(self._use_weight_decay, variables):
            strength = ops.cast(rate * self.weight_decay, variable.dtype)
            self.assign_sub(variable, variable * strength)

    # On torch these three are one pass over the weights instead of twenty.

    def _fused(self, variables):
        plain = not (self.amsgrad or self.clipnorm or self.clipvalue)
        return plain and backend.fuses_adamw(variables)

    def _clip_gradients(self, grads):
        if self._fused(self._trainable_variables):
            return grads
        return super()._clip_gradients(grads)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if not self._fused(trainable_variables):
            return super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
        strength = self.weight_decay / (self.peak_learning_rate or 1.0)
        decay = [
            strength if self._use_weight_decay(v) else 0.0
            for v in trainable_variables
        ]
        rate = ops.cast(learning_rate, "float32")
        backend.update_adamw(self, grads, trainable_variables, rate, decay)

    def get_config(self):
        return {
            **super().get_config(),
            "decay": self.decay,
            "peak_learning_rate": self.peak_learning_rate,
            "no_decay": list(self.no_decay),
        }


def _positive(value, what):
    value = number_in(value, what)
    if value == 0:
        raise ValueError(f"{what} must be greater than 0. Received: {value!r}")
    return value


def _learning_rate(value):
    """A schedule or callable as it is, a number as a float."""
    if callable(value):
        return value
    if isinstance(value, str):
        raise ValueError(
            "`learning_rate` must be a number, a `LearningRateSchedule` or a "
            f"callable without arguments. Received: {value!r}"
        )
    return number_in(value, "`learning_rate`")


def _peak(learning_rate, peak):
    """What independent decay divides the learning rate by."""
    if peak is None:
        peak = getattr(learning_rate, "peak", learning_rate)
    if callable(peak):
        raise ValueError(
            "decay='independent' needs the peak of the learning rate, and "
            f"{type(learning_rate).__name__} has no attribute `peak`. Give "
            "`peak_learning_rate`, or use `WarmupSchedule`."
        )
    return _positive(peak, "`peak_learning_rate` of independent decay")


def _accumulation(steps, use_ema):
    if steps is None:
        return None
    steps = check_integer(steps, "`gradient_accumulation_steps`", low=1)
    if steps > 1 and use_ema:
        # Keras averages after every batch, not after every update.
        raise ValueError(
            "`use_ema` with gradient accumulation would average the weights "
            f"{steps} times per update. Use one of the two. Received: "
            f"use_ema={use_ema}, gradient_accumulation_steps={steps}"
        )
    return steps if steps > 1 else None


def _clipping(global_clipnorm, kwargs):
    """`kwargs` with the three ways of clipping resolved and checked."""
    others = [kwargs.get(name) for name in ("clipnorm", "clipvalue")]
    if global_clipnorm == "auto":
        global_clipnorm = 1.0 if others == [None, None] else None
    kwargs = {**kwargs, "global_clipnorm": global_clipnorm}
    # Keras takes 0 and negative numbers for "no clipping".
    for name in ("clipnorm", "clipvalue", "global_clipnorm"):
        if kwargs.get(name) is not None:
            kwargs[name] = _positive(kwargs[name], f"`{name}`")
    return kwargs


def _patterns(no_decay):
    """`no_decay` as a tuple of regular expressions that compile."""
    if isinstance(no_decay, str):
        raise ValueError(
            "`no_decay` is a list of strings: write "
            f"no_decay=[{no_decay!r}]. Received: {no_decay!r}"
        )
    for text in no_decay:
        try:
            re.compile(text)
        except (re.error, TypeError) as error:
            raise ValueError(
                "`no_decay` takes regular expressions that are searched in "
                f"variable paths. Received: {text!r} ({error})"
            ) from error
    return tuple(no_decay)
