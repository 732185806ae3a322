"""What is measured of a training step, in float32, inside the compiled step.

`summarize` has the formulas of activations, `logits` those of attention. A
`Recorder` collects them while a step is traced or run; `remat` lets them out
of rematerialised functions, from which nothing else may escape.

B batch, C calls of measured layers, R rows: tokens of an activation.
"""

import contextlib
import dataclasses
import threading

import keras
import numpy as np
from keras import ops

from keras_stable import backend
from keras_stable import logits
from keras_stable.backend import internals

# Of an activation, over its tokens; the last axis holds a token's channels.
STATISTICS = ("l2", "rms", "abs_max", "mean", "kurtosis", "nonfinite")
# Kurtosis, a mean over tokens, looks at no more of them than these: another
# pass over all would double the cost of the table. The search for non-finite
# numbers in every step must cost next to nothing.
TOKENS, TOKENS_EACH_STEP = 1024, 128


@backend.fused
def row_statistics(x):
    """What `summarize` needs of an activation, read once.

    Args:
        x: floating point tensor (..., dim), one token a row.

    Returns:
        `(rows, kurtosis)`: float32 tensor (4, rows): of the finite entries of
        each row the sum of squares, largest magnitude and sum, and the number
        of the others; and the mean kurtosis of the first `TOKENS` rows.
    """
    # The observer takes no part in the gradient.
    x = ops.stop_gradient(x)
    x = ops.reshape(x, (-1, x.shape[-1] if len(x.shape) else 1))
    rows = backend.reduce_rows(x)
    some = x[:TOKENS]
    some = ops.where(ops.isfinite(some), ops.cast(some, "float32"), 0.0)
    centred = some - ops.mean(some, axis=-1, keepdims=True)
    variance = ops.mean(ops.square(centred), axis=-1, keepdims=True)
    # Divided before the power, which would overflow; constant rows give 0.
    z = centred / ops.sqrt(ops.maximum(variance, 1e-30))
    fourth = ops.mean(ops.square(ops.square(z)), axis=-1)
    return rows, ops.mean(fourth)


def summarize(rows, kurtosis, dim):
    """Statistics of activations from those of their rows.

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
    `ActivationMonitor`, over the first 1024 tokens. Entries beyond 1e19
    overflow the squares; `abs_max` still holds.

    Args:
        rows: float32 tensor (C, 4, R), of C activations of R tokens.
        kurtosis: float32 tensor (C,).
        dim: float32 tensor (C,). Channels of a token.

    Returns:
        float32 tensor (C, 6), in the order of `STATISTICS`.
    """
    square, largest, total, bad = (rows[:, i] for i in range(4))
    return ops.stack(
        [
            ops.mean(ops.sqrt(square), axis=-1),
            ops.sqrt(ops.mean(square, axis=-1) / dim),
            ops.max(largest, axis=-1),
            ops.mean(total, axis=-1) / dim,
            kurtosis,
            ops.sum(bad, axis=-1),
        ],
        axis=-1,
    )


def measure(x):
    """Statistics of one activation, float32 (6,): see `summarize`.

    Example:

    >>> float(measure(ops.ones((2, 4)))[STATISTICS.index("l2")])
    2.0
    """
    rows, kurtosis = row_statistics(x)
    dim = ops.full((1,), float(x.shape[-1]))
    return summarize(rows[None], kurtosis[None], dim)[0]


def sample_tokens(x):
    """Entries of some tokens, in which to look for non-finite ones.

    All tokens, if there are no more than 128. Otherwise the last positions of
    each sequence: attention carries what is bad in a token to all later ones,
    and a bad weight is bad for every token.

    Args:
        x: floating point tensor (B, ..., dim).

    Returns:
        Tensor (n,), of the dtype of `x`.
    """
    x = ops.stop_gradient(x)
    if len(x.shape) > 2 and None not in x.shape:
        tokens = int(np.prod(x.shape[:-1]))
        if tokens > TOKENS_EACH_STEP:
            each = x.shape[1] * TOKENS_EACH_STEP // tokens
            x = x[:TOKENS_EACH_STEP, -max(each, 1) :]
    elif len(x.shape) > 1:
        x = x[:TOKENS_EACH_STEP]
    return ops.reshape(x, (-1,))


@dataclasses.dataclass(frozen=True)
class Record:
    """One thing measured.

    Attributes:
        name: of the layer.
        value: of an activation `row_statistics(x)`, or `sample_tokens(x)` in
            a light step; of an attention core (3, N), or (N,).
        note: channels of a token; or the sample of queries, or "exact".
    """

    name: str
    value: object
    note: object


class Recorder:
    """Collects what a training step measures.

    Args:
        full: bool. Whether the full table is measured, or only what is looked
            at in every step.
        inputs: bool. Whether inputs of layers are measured beside outputs.
        scope: name of the layer that is being called.
        regions: dictionary that outlives the step: what was measured in
            functions whose programs are kept, see `region`.

    Attributes:
        tensors: list of `Record`s of activations, in the order of the forward
            pass.
        heads: list of `Record`s of attention cores.
    """

    def __init__(self, full, inputs=False, scope="", regions=None):
        self.full, self.inputs, self.scope = full, inputs, scope
        self.regions = {} if regions is None else regions
        self.open = True
        self.tensors, self.heads = [], []

    def tensor(self, name, x):
        if not (self.open and hasattr(x, "shape")):
            return
        if "float" in keras.backend.standardize_dtype(x.dtype):
            look = row_statistics if self.full else sample_tokens
            dim = x.shape[-1] if len(x.shape) else 1
            self.tensors.append(Record(name, look(x), dim))

    def logits(self, z, visible, cap=None, capped=False):
        """Records logits (B, heads..., T, S) that a formula computed."""
        if self.open:
            value, note = logits.of_formula(self.full, z, visible, cap, capped)
            self.heads.append(Record(self.scope, value, note))

    def rows(
        self, maximum, entropy, segment_ids=None, sliding_window=None, cap=None
    ):
        """Records rows (B, N, T) of logits that a kernel has measured."""
        if self.open:
            value, note = logits.of_rows(
                *(self.full, maximum, entropy),
                *(segment_ids, sliding_window, cap),
            )
            self.heads.append(Record(self.scope, value, note))

    def queries(self, q, k, scale, segment_ids=None, sliding_window=None):
        """Records the largest logit of a few queries, in a light step."""
        if self.open:
            value, note = logits.of_queries(
                q, k, scale, segment_ids, sliding_window
            )
            self.heads.append(Record(self.scope, value, note))

    def dot_product(self, query, key, *, scale, mask, is_causal, cap):
        """Records logits that a fused kernel keeps to itself."""
        if self.open:
            value, note = logits.of_kernel(
                self.full, query, key, mask, scale, is_causal, cap
            )
            self.heads.append(Record(self.scope, value, note))

    @contextlib.contextmanager
    def within(self, scope):
        """Names attention cores measured inside after their layer."""
        outer, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = outer


_local = threading.local()
# Replicas of TensorFlow are traced in threads that take turns: the first that
# begins intercepts for all, until the last ends.
_threads, _interception = [], contextlib.ExitStack()


def recorder():
    """The `Recorder` of the step being traced or run, or None."""
    return getattr(_local, "recorder", None)


def _observe(*args, **kwargs):
    if recorder() is not None:
        recorder().dot_product(*args, **kwargs)


@contextlib.contextmanager
def _intercepted():
    if not _threads:
        attention = internals.intercept_attention(_observe)
        _interception.enter_context(attention)
    _threads.append(threading.current_thread())
    try:
        yield
    finally:
        _threads.pop()
        if not _threads:
            _interception.close()


@contextlib.contextmanager
def recording(value):
    """Makes `value` the `recorder()`, also for Keras's fused attention."""
    outer, _local.recorder = recorder(), value
    try:
        with _intercepted() if outer is None else contextlib.nullcontext():
            yield value
    finally:
        _local.recorder = outer


def escaping(function, found=None):
    """Lets measured values out of a function that nothing may escape from.

    Nothing traced inside a rematerialised function may be used outside, unless
    the function returns it.

    Args:
        function: any.
        found: list, where the records are kept without their values; empty
            if `function` was not run yet.

    Returns:
        None where nothing is recorded, or `(inner, record)`: `inner` returns
        `(result, values)`, `record(values)` records them.
    """
    outer, found = recorder(), [] if found is None else found
    if outer is None:
        return None

    def inner(*args, **kwargs):
        inside = Recorder(outer.full, outer.inputs, outer.scope, outer.regions)
        with recording(inside):
            result = function(*args, **kwargs)
        kept = (inside.tensors, inside.heads)
        found[:] = [
            [dataclasses.replace(r, value=None) for r in records]
            for records in kept
        ]
        return result, [[r.value for r in records] for records in kept]

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


def region(owner, function, key, training):
    """`backend.region`, from which measured values escape."""

    def run(*args):
        outer = recorder()
        if outer is None:
            return backend.region(owner, function, key, training)(*args)
        found = outer.regions.setdefault((owner.path, key), [])
        inner, record = escaping(function, found)
        if not found:
            # On torch no step runs without programs: it would set the peak of
            # memory, and differ in its last bits from one that is unwatched.
            backend.rehearse(inner, *args)
        measured = inner
        if found:
            # What is measured, by names within the owner: not known before
            # the function ran once. Programs are shared by owners.
            what = tuple(
                (r.name.partition(f"{owner.name}/")[2], str(r.note))
                for records in found
                for r in records
            )
            whole = (key, what, outer.full, outer.inputs)
            measured = backend.region(owner, inner, whole, training)
        result, values = measured(*args)
        record(values)
        return result

    return run


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
        self.value = self.add_variable(
            (), "zeros", aggregation="only_first_replica", name="value"
        )

    def update_state(self, value, sample_weight=None):
        self.value.assign(ops.cast(value, self.dtype))

    def result(self):
        # Not the variable itself, which the next step overwrites.
        return ops.copy(ops.convert_to_tensor(self.value))
