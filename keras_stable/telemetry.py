"""What is measured of a training step, in float32, inside the compiled step.

`measure` and `attention_statistics` are the formulas. A `Recorder` collects
what they find while a step is traced or run; `remat` lets its findings out of
rematerialised functions, from which nothing else may escape.

B batch, T query time, S key time, N heads, K key heads, H head dimension.
"""

import contextlib
import dataclasses
import threading

import keras
import numpy as np
from keras import ops

from keras_stable import backend
from keras_stable.backend import internals

# Of an activation, over its tokens; the last axis holds a token's channels.
STATISTICS = ("l2", "rms", "abs_max", "mean", "kurtosis", "nonfinite")
# Of an attention core, per head.
HEAD_STATISTICS = ("max_logit", "max_logit_capped", "entropy")
# Kurtosis, a mean over tokens, and the every-step search for non-finite
# numbers look at no more tokens than these: another pass over all of them
# would double the cost of the table.
TOKENS = 4096
# How many queries of a head the logits are computed for where no kernel gives
# them: in the full table, and in every step.
QUERIES, QUERIES_EACH_STEP = 512, 128
MASKED = -1e30
# The largest float32 whose arctanh is finite.
CLOSE = 1 - 2.0**-24


@backend.fused
def measure(x):
    """Statistics of an activation.

    ```
    l2        = mean over tokens of sqrt(sum_i x_i^2)
    rms       = sqrt(mean(x^2))
    abs_max   = max |x|
    mean      = mean(x)
    kurtosis  = mean over tokens of mean_i((x_i - m)^4) / var^2,   m, var of
                the token's channels; 3 for normal numbers
    nonfinite = number of NaN and infinite entries
    ```

    All but the last are of the finite entries; the others count as 0.
    `l2` is the norm that Rybakov et al. (arXiv 2410.16682) follow for inputs
    and outputs of linear layers; `kurtosis` is that of MosaicML Composer's
    `ActivationMonitor`, over the first 4096 tokens.

    Args:
        x: floating point tensor of shape (..., dim), one token a row. Entries
            beyond 1e19 overflow the squares; `abs_max` still holds.

    Returns:
        float32 tensor (6,), in the order of `STATISTICS`.

    Example:

    >>> dict(zip(STATISTICS, measure(ops.ones((2, 4)))))["l2"]  # doctest: +SKIP
    2.0
    """
    # The observer takes no part in the gradient.
    x = _rows(ops.stop_gradient(x))
    finite = ops.isfinite(x)
    x = ops.where(finite, ops.cast(x, "float32"), 0.0)
    bad = ops.sum(1.0 - ops.cast(finite, "float32"), axis=-1)
    square = ops.sum(ops.square(x), axis=-1)
    some = x[:TOKENS]
    centred = some - ops.mean(some, axis=-1, keepdims=True)
    variance = ops.mean(ops.square(centred), axis=-1, keepdims=True)
    # Divided before the power, which would overflow; constant rows give 0.
    z = centred / ops.sqrt(ops.maximum(variance, 1e-30))
    return ops.stack(
        [
            ops.mean(ops.sqrt(square)),
            ops.sqrt(ops.mean(square) / x.shape[-1]),
            ops.max(ops.max(ops.abs(x), axis=-1)),
            ops.mean(ops.mean(x, axis=-1)),
            ops.mean(ops.mean(ops.square(ops.square(z)), axis=-1)),
            ops.sum(bad),
        ]
    )


@backend.fused
def count_nonfinite(x):
    """NaN and infinite entries among the first 4096 tokens; float32 ()."""
    x = _rows(ops.stop_gradient(x))[:TOKENS]
    return ops.sum(1.0 - ops.cast(ops.isfinite(x), "float32"))


def _rows(x):
    return ops.reshape(x, (-1, x.shape[-1] if len(x.shape) else 1))


def _heads_of(z):
    """(B, heads..., T, S) as (B, N, T, S)."""
    shape = ops.shape(z)
    heads = int(np.prod(z.shape[1:-2]))
    return ops.reshape(z, (shape[0], heads, shape[-2], shape[-1]))


def _visible(z, visible):
    """Both as (B, N, T, S), logits in float32."""
    z = ops.cast(ops.stop_gradient(z), "float32")
    if visible is None:
        visible = ops.ones_like(z, dtype="bool")
    visible = ops.broadcast_to(visible, ops.shape(z))
    return _heads_of(z), _heads_of(visible)


@backend.fused
def logit_statistics(z, visible, cap=None, capped=False):
    """Statistics of attention logits, per head.

    ```
    max_logit        = largest visible z
    max_logit_capped = cap * tanh(max_logit / cap), or max_logit
    entropy          = mean over queries of -sum_s p log p / log(visible keys),
                       p the softmax of the (capped) logits, before any clip
    ```

    Entropy is 1 for uniform attention and 0 for a single key. Queries that
    see fewer than two keys have none.

    Args:
        z: tensor (B, heads..., T, S): scaled logits before the mask.
        visible: bool tensor that broadcasts to z, or None for all.
        cap: float or None.
        capped: bool. Whether z is capped already; `max_logit` then inverts
            the cap, which float32 can do up to about 8 times the cap.

    Returns:
        float32 tensor (3, N), in the order of `HEAD_STATISTICS`.
    """
    z, visible = _visible(z, visible)
    raw = largest = ops.max(ops.where(visible, z, MASKED), axis=(0, 2, 3))
    if cap is not None and capped:
        raw = cap * ops.arctanh(ops.clip(largest / cap, -CLOSE, CLOSE))
    elif cap is not None:
        z, largest = (cap * ops.tanh(x / cap) for x in (z, largest))
    log_p = ops.log_softmax(ops.where(visible, z, MASKED), axis=-1)
    # Where p is 0, log p is -1e30: the product is 0 and not NaN.
    entropy = -ops.sum(ops.exp(log_p) * log_p, axis=-1)
    keys = ops.sum(ops.cast(visible, "float32"), axis=-1)
    several = ops.cast(keys > 1.5, "float32")
    share = several * entropy / ops.log(ops.maximum(keys, 2.0))
    queries = ops.maximum(ops.sum(several, axis=(0, 2)), 1.0)
    return ops.stack([raw, largest, ops.sum(share, axis=(0, 2)) / queries])


@dataclasses.dataclass(frozen=True)
class Queries:
    """Which queries the logits are computed for: a labelled sample.

    `rows` sequences from the first, and in each the `positions`, evenly
    spaced up to the last. With few enough tokens, all.
    """

    rows: int
    positions: object
    label: str

    @classmethod
    def sample(cls, batch, length, most):
        if not isinstance(length, int):
            # Unknown while it is traced (TensorFlow).
            at = ops.linspace(0.0, ops.cast(length - 1, "float32"), most // 4)
            return cls(4, ops.cast(at, "int32"), f"{most} queries")
        each = min(length, max(most // 4, most // (batch or most)))
        rows = max(most // each, 1)
        at = np.round(np.linspace(0, length - 1, each)).astype("int32")
        if batch is not None and rows >= batch and each == length:
            return cls(rows, at, "exact")
        return cls(rows, at, f"{each * min(rows, batch or rows)} queries")


def sampled_logits(q_BTNH, k_BSKH, most, *, scale, mask=None, is_causal=False):
    """Scaled logits of a sample of queries, and which keys those see.

    Args:
        q_BTNH, k_BSKH: tensors; K divides N.
        most: int. How many queries a head at most.
        scale: float.
        mask: bool tensor (B or 1, N or 1, T, S) or None.
        is_causal: bool. Whether later keys are invisible.

    Returns:
        `(z, visible, label)`: float32 tensor (rows, N, P, S), bool tensor
        that broadcasts to it or None, and what of the whole it is.
    """
    batch, length = q_BTNH.shape[0], ops.shape(q_BTNH)[1]
    sample = Queries.sample(batch, length, most)
    q = ops.take(q_BTNH[: sample.rows], sample.positions, axis=1)
    k = k_BSKH[: sample.rows]
    if k.shape[2] != q.shape[2]:
        k = ops.repeat(k, q.shape[2] // k.shape[2], axis=2)
    q, k = (ops.cast(ops.stop_gradient(x), "float32") for x in (q, k))
    z = scale * ops.einsum("bpnh,bsnh->bnps", q, k)
    visible = None
    if mask is not None:
        visible = ops.take(mask[: sample.rows], sample.positions, axis=2)
        visible = ops.cast(visible, "bool")
    if is_causal:
        keys = ops.arange(ops.shape(k)[1], dtype="int32")
        at = ops.convert_to_tensor(sample.positions)[:, None]
        earlier = (keys[None] <= at)[None, None]
        visible = earlier if visible is None else earlier & visible
    return z, visible, sample.label


@dataclasses.dataclass(frozen=True)
class Record:
    """One thing measured: a name, a float32 tensor, what of the whole it is."""

    name: str
    value: object
    label: str = "exact"


class Recorder:
    """Collects what a training step measures.

    Args:
        full: bool. Whether the full table is measured, or only what is looked
            at in every step.
        inputs: bool. Whether inputs of layers are measured beside outputs.

    Attributes:
        tensors: list of `Record`s of activations, in the order of the forward
            pass: (6,) each, or () when not `full`.
        heads: list of `Record`s of attention cores: (3, N), or (N,).
    """

    def __init__(self, full, inputs=False, scope=""):
        self.full = full
        self.inputs = inputs
        self.scope = scope
        self.open = True
        self.tensors, self.heads = [], []

    def tensor(self, name, x):
        if not (self.open and hasattr(x, "shape")):
            return
        if "float" in keras.backend.standardize_dtype(x.dtype):
            look = measure if self.full else count_nonfinite
            self.tensors.append(Record(name, look(x)))

    def logits(self, z, visible, cap=None, capped=False):
        """Records logits (B, heads..., T, S) that a formula computed."""
        label = "exact"
        if not self.full:
            batch, length = z.shape[0], ops.shape(z)[-2]
            sample = Queries.sample(batch, length, QUERIES_EACH_STEP)
            z = ops.take(z[: sample.rows], sample.positions, axis=-2)
            if visible is not None:
                visible = visible[: sample.rows]
                if visible.shape[-2] != 1:
                    visible = ops.take(visible, sample.positions, axis=-2)
            label = sample.label
        self._heads(z, visible, cap, capped, label)

    def dot_product(self, query, key, *, scale, mask, is_causal, cap):
        """Records logits that a fused kernel keeps to itself."""
        most = QUERIES if self.full else QUERIES_EACH_STEP
        z, visible, label = sampled_logits(
            query, key, most, scale=scale, mask=mask, is_causal=is_causal
        )
        self._heads(z, visible, cap, False, label)

    def _heads(self, z, visible, cap, capped, label):
        if self.open:
            value = logit_statistics(z, visible, cap, capped)
            if not self.full:
                # The compiler leaves out what is not used.
                value = value[0]
            self.heads.append(Record(self.scope, value, label))

    @contextlib.contextmanager
    def within(self, scope):
        """Names attention cores measured inside after their layer."""
        outer, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = outer


_local = threading.local()


def recorder():
    """The `Recorder` of the step being traced or run, or None."""
    return getattr(_local, "recorder", None)


@contextlib.contextmanager
def recording(value):
    """Makes `value` the `recorder()`, also for Keras's fused attention."""
    outer, _local.recorder = recorder(), value
    observe = contextlib.nullcontext()
    if outer is None:
        observe = internals.intercept_attention(
            lambda *args, **kwargs: recorder().dot_product(*args, **kwargs)
        )
    try:
        with observe:
            yield value
    finally:
        _local.recorder = outer


def escaping(function):
    """Lets measured values out of a function that nothing may escape from.

    Nothing traced inside a rematerialised function may be used outside, unless
    the function returns it.

    Returns:
        None where nothing is recorded, or `(inner, record)`: `inner` returns
        `(result, values)`, `record(values)` records them.
    """
    outer, found = recorder(), []
    if outer is None:
        return None

    def inner(*args, **kwargs):
        inside = Recorder(outer.full, outer.inputs, outer.scope)
        with recording(inside):
            result = function(*args, **kwargs)
        found[:] = inside.tensors, inside.heads
        return result, [[r.value for r in records] for records in found]

    def record(values):
        if outer.open:
            for kept, records, tensors in zip(
                (outer.tensors, outer.heads), found, values
            ):
                kept.extend(
                    dataclasses.replace(r, value=x)
                    for r, x in zip(records, tensors)
                )

    return inner, record


def remat(function):
    """`keras.remat`, from which measured values escape."""
    ways = escaping(function)
    if ways is None:
        return keras.remat(function)
    inner, record = ways

    def run(*args):
        result, values = keras.remat(inner)(*args)
        record(values)
        return result

    return run


@keras.saving.register_keras_serializable("keras_stable")
class LastValue(keras.metrics.Metric):
    """The last value it was given, where Keras's metrics average.

    Example:

    >>> metric = LastValue(name="batch_loss")
    >>> metric.update_state(2.5)
    >>> float(metric.result())
    2.5
    """

    def __init__(self, name="last_value", dtype="float32"):
        super().__init__(name=name, dtype=dtype)
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, value, sample_weight=None):
        self.value.assign(ops.cast(value, self.dtype))

    def result(self):
        # Not the variable itself, which the next step overwrites.
        return ops.copy(ops.convert_to_tensor(self.value))
