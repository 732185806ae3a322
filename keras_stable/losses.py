"""Next-token loss from hidden states, without the tensor of all logits.

B batch, T time, D model dimension, V vocabulary; C chunks of L time steps,
R = B L tokens of a chunk.
"""

import math

import keras
from keras import ops

from keras_stable import backend

# Logits and tokens of one chunk, at most. Each chunk reads and writes the
# gradient of the head; 4096 tokens make its products five times as long as
# that. More would only take memory, and 2^29 logits take 2 GB in float32.
CHUNK, TOKENS = 2**29, 4096
# Rows of a batch where they are not known when the step is traced.
_ROWS = 16


@keras.saving.register_keras_serializable("keras_stable")
class NextTokenLoss(keras.losses.SparseCategoricalCrossentropy):
    """Cross-entropy of integer targets: `mean(w * (lse(z) - z[target]))`.

    What `StableCausalLM.compile(loss="auto")` means. Given logits z (..., V)
    it is `SparseCategoricalCrossentropy(from_logits=True)`. `fit` and
    `evaluate` of a `StableCausalLM` compute it from hidden states instead, by
    `next_token_loss`, unless metrics ask for logits.

    Example:

    >>> float(NextTokenLoss()(np.array([[1]]), np.zeros((1, 1, 2))))
    0.6931472
    """

    def __init__(self, name="next_token_loss", **kwargs):
        super().__init__(from_logits=True, name=name, **kwargs)

    def get_config(self):
        config = super().get_config()
        return {k: v for k, v in config.items() if k != "from_logits"}


def z_loss(logits, sample_weight=None):
    """`mean(w * logsumexp(logits)^2)`: keeps the softmax's scale near one.

    Args:
        logits: float32 tensor (..., V).
        sample_weight: tensor (...) or None: w, as in the loss.

    Reference:
        [Chowdhery et al., 2022](https://arxiv.org/abs/2204.02311), where its
        weight is 1e-4.
    """
    square = ops.square(ops.logsumexp(ops.cast(logits, "float32"), axis=-1))
    if sample_weight is not None:
        square = square * ops.cast(sample_weight, "float32")
    return ops.mean(square)


def _weights(sample_weight, shape):
    """Weights (B, T), float32, of tokens; given None, of tokens or of rows."""
    if sample_weight is None:
        return ops.ones(shape, "float32")
    weight = ops.cast(ops.convert_to_tensor(sample_weight), "float32")
    if len(weight.shape) == 1:
        weight = weight[:, None]
    return ops.broadcast_to(weight, shape)


def token_accuracy(logits, target, sample_weight=None):
    """`sum(w (argmax(logits) == target)) / sum(w)`."""
    right = ops.argmax(logits, axis=-1) == ops.reshape(
        ops.cast(target, "int32"), ops.shape(logits)[:-1]
    )
    right = ops.cast(right, "float32")
    weight = _weights(sample_weight, ops.shape(right))
    return ops.sum(weight * right) / ops.maximum(ops.sum(weight), 1e-30)


def _rows(raw_RV, target_R, weight_R, output_cap, z_weight, gradient_dtype):
    """What one chunk adds to the sums, and the gradient of its logits.

    ```
    z    = cap * tanh(raw / cap)                      if there is a cap
    loss = w (lse - z[target]) + z_weight w lse^2,    lse = logsumexp(z)
    d    = w ((1 + 2 z_weight lse) softmax(z) - onehot(target)) dz/draw
    ```

    Returns:
        `(sums, d)`: float32 (3,), of the loss, of w lse^2 and of w where the
        target has the largest logit; d (R, V), or None without a dtype.
    """
    z, slope = raw_RV, None
    if output_cap is not None:
        bounded = ops.tanh(raw_RV / output_cap)
        z, slope = output_cap * bounded, 1.0 - ops.square(bounded)
    hit = ops.arange(raw_RV.shape[-1], dtype="int32") == target_R[:, None]
    # Written so that torch's compiler finds a softmax, and reads z once for it.
    largest = ops.max(z, axis=-1, keepdims=True)
    scale = ops.sum(ops.exp(z - largest), axis=-1, keepdims=True)
    scale, largest = scale[:, 0], largest[:, 0]
    wanted = ops.sum(ops.where(hit, z, 0.0), axis=-1)
    known = ops.logical_and(target_R >= 0, target_R < raw_RV.shape[-1])
    wanted = ops.where(known, wanted, float("nan"))
    lse = ops.log(scale) + largest
    square = weight_R * ops.square(lse)
    nll = weight_R * (lse - wanted)
    right = ops.cast(wanted >= largest, "float32")
    sums = ops.stack(
        [
            ops.sum(x)
            for x in (nll + z_weight * square, square, weight_R * right)
        ]
    )
    if gradient_dtype is None:
        return sums, None
    p = ops.exp(z - lse[:, None])
    pull = (weight_R * (1.0 + 2.0 * z_weight * lse))[:, None] * p
    d = pull - ops.where(hit, weight_R[:, None], 0.0)
    if slope is not None:
        d = d * slope
    return sums, ops.cast(d, gradient_dtype)


_rows = backend.fused(_rows)


def _shares():
    """Over how many devices the rows of a batch are divided."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]


def _chunks(batch, length, vocabulary):
    """`(C, L)`: how many chunks of how many time steps."""
    # Each chunk gathers the head and reduces its gradient, if they are cut:
    # no more of them than one device needs for its own rows.
    tokens = math.ceil((batch or _ROWS) / _shares()) * length
    count = math.ceil(max(tokens * vocabulary / CHUNK, tokens / TOKENS))
    steps = math.ceil(length / min(count, length))
    return math.ceil(length / steps), steps


def next_token_loss(
    hidden_BTD,
    kernel_DV,
    target_BT,
    weight_BT=None,
    *,
    output_cap=None,
    z_weight=0.0,
    training=False,
):
    """Loss of the next tokens, one chunk of logits at a time.

    ```
    z     = cap * tanh(h W / cap)       float32; the cap if there is one
    total = mean(w (logsumexp(z) - z[target])) + z_weight mean(w logsumexp(z)^2)
    ```

    The largest tensor is a chunk of about 2^29 logits, or of 4096 tokens if
    those have fewer, whatever B, T and V are; of each device, if they share
    the batch. In training the gradients of h
    and W are computed beside the loss, as in the Liger kernels: no logit is
    computed twice. Those of the logits are rounded to the dtype of h, as in
    any layer; sums are float32.

    Args:
        hidden_BTD: tensor.
        kernel_DV: tensor. It is cast to the dtype of `hidden_BTD`; its gradient
            is float32 if it is.
        target_BT: int tensor. One outside of the vocabulary makes NaN.
        weight_BT: tensor or None: w. Defaults to ones. Means divide by the
            number of tokens, not by the sum of w, as Keras does.
        output_cap: float or None.
        z_weight: float.
        training: bool. Whether there will be a gradient.

    Returns:
        Float32 scalars `(total, penalty, accuracy)`: the loss, the part of it
        that is z-loss, and the weighted mean of targets that have the largest
        logit. Only `total` has a gradient, and of the first order.

    Reference:
        [Hsu et al., 2024](https://arxiv.org/abs/2410.10989), section 3.2.

    Example:

    >>> h, w = np.ones((1, 3, 4), "float32"), np.zeros((4, 8), "float32")
    >>> float(next_token_loss(h, w, np.zeros((1, 3), "int32"))[0])
    2.0794415
    """
    hidden_BTD, kernel_DV, target_BT = (
        ops.convert_to_tensor(x) for x in (hidden_BTD, kernel_DV, target_BT)
    )
    B, T, D = ops.shape(hidden_BTD)
    V = kernel_DV.shape[-1]
    static = hidden_BTD.shape
    C, L = (1, T) if static[1] is None else _chunks(static[0], static[1], V)
    target_BT = ops.cast(ops.reshape(target_BT, (B, T)), "int32")
    weight_BT = _weights(weight_BT, (B, T))

    def split(x):
        """(B, T, ...) to (C, B, L, ...), filled up with zeros at the end."""
        if C == 1:
            return x[None]
        rest = list(x.shape[2:])
        if C * L > T:
            x = ops.pad(x, [(0, 0), (0, C * L - T)] + [(0, 0)] * len(rest))
        x = ops.reshape(x, [B, C, L, *rest])
        return ops.transpose(x, [1, 0, *range(2, len(x.shape))])

    def passes(hidden_BTD, kernel_DV, target_BT, weight_BT, gradient=True):
        dtype = keras.backend.standardize_dtype(hidden_BTD.dtype)
        # In here: the gradient is that of the kernel as it came.
        kernel_DV = ops.cast(kernel_DV, dtype)

        def chunk(carry, inputs):
            hidden, target, weight = inputs
            hidden = ops.reshape(hidden, (-1, D))
            raw = backend.matmul_float32(hidden, kernel_DV)
            flat = (ops.reshape(x, (-1,)) for x in (target, weight))
            sums, d = _rows(
                raw, *flat, output_cap, z_weight, dtype if gradient else None
            )
            del raw
            if not gradient:
                return carry + sums, ops.zeros((1,))
            total, kernel = carry
            kernel = backend.add_product(kernel, ops.transpose(hidden), d)
            back = backend.matmul_float32(d, ops.transpose(kernel_DV))
            return (total + sums, kernel), ops.reshape(back, (B, L, D))

        zero = ops.zeros((3,), "float32")
        start = (zero, ops.zeros((D, V), "float32")) if gradient else zero
        inputs = [split(x) for x in (hidden_BTD, target_BT, weight_BT)]
        if C == 1:
            # Unrolled, or XLA would not fuse across a loop of one pass.
            carry, back = chunk(start, [x[0] for x in inputs])
            back = back[None]
        else:
            carry, back = backend.scan(chunk, start, inputs)
        if not gradient:
            return carry
        sums, kernel = carry
        back = ops.transpose(back, (1, 0, 2, 3))
        return sums, (ops.reshape(back, (B, C * L, D))[:, :T], kernel)

    tensors = (hidden_BTD, kernel_DV, target_BT, weight_BT)
    if training:
        sums = backend.with_gradient(passes, *tensors)
    else:
        sums = passes(*tensors, gradient=False)
    total, square, right = ops.unstack(sums)
    # After the gradients, which are then scaled once for all.
    count = ops.cast(B * T, "float32")
    share = ops.maximum(ops.sum(weight_BT), 1e-30)
    return total / count, z_weight * square / count, right / share
