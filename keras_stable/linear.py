"""Linear layers, plain and with sigma-Reparam."""

import keras
from keras import ops


def power_iteration(kernel, u, epsilon=1e-12):
    """One step of power iteration for the largest singular value.

    ```
    v <- normalize(u W),  u <- normalize(W v),  sigma = u W v
    ```

    `u` and `v` are constants to the gradient, so that d sigma / d W = u v^T.

    Args:
        kernel: float32 tensor (input_dim, units). W.
        u: float32 tensor (input_dim,). The estimate so far.

    Returns:
        `(sigma, u)`: a scalar, and the next estimate.
    """

    def normalize(x):
        return x / ops.maximum(ops.norm(x), epsilon)

    frozen = ops.stop_gradient(kernel)
    v = normalize(ops.matmul(u, frozen))
    u = normalize(ops.matmul(frozen, v))
    return ops.matmul(u, ops.matmul(kernel, v)), u


@keras.saving.register_keras_serializable("keras_stable")
class SigmaReparamDense(keras.layers.Dense):
    """A dense layer whose kernel is `gamma / sigma(W) * W`.

    ```
    y = x (gamma / sigma(W) W) + bias
    ```

    `sigma(W)` is the largest singular value, estimated by one power iteration
    per *training* call on a stored vector `u` (shape (input_dim,)) that starts
    as W's left singular vector; gradients flow through sigma. `gamma` is one
    learned number per kernel. All of it is float32 under mixed policies; the
    product is rounded once. At inference the iteration is made and `u` is left
    alone. This is not `keras.layers.SpectralNormalization`, which overwrites
    the kernel and has no gamma.

    Args:
        units: int. Output dimension.
        gamma_init: `"one"` or `"spectral"` (gamma starts at sigma(W), so that
            the layer starts as the plain one). Defaults to `"one"`.
        **kwargs: of `keras.layers.Dense`.

    Call arguments:
        inputs: tensor (..., input_dim).
        sigma: what `next_state()` returned, for calls inside a rematerialised
            function, where assigning `u` is not possible. By default it is
            called here.

    Reference:
        [Zhai et al., 2023](https://arxiv.org/abs/2303.06296);
        github.com/apple/ml-sigma-reparam, `vision/layers.py` SNLinear
        (`"spectral"`) and `speech/layers.py` SNDense (`"one"`).

    Example:

    >>> y = SigmaReparamDense(8)(keras.random.normal((2, 4)), training=True)
    """

    def __init__(self, units, gamma_init="one", **kwargs):
        if gamma_init not in ("one", "spectral"):
            raise ValueError(
                '`gamma_init` must be "one" or "spectral". Received: '
                f"gamma_init={gamma_init!r}"
            )
        # Keras would cast a float32 sigma to the compute dtype.
        super().__init__(units, autocast=False, **kwargs)
        self.gamma_init = gamma_init

    def add_weight(self, *args, **kwargs):
        # A bfloat16 kernel would make sigma, and so every output, noisy.
        return super().add_weight(*args, **{"autocast": False, **kwargs})

    def build(self, input_shape):
        super().build(input_shape)
        self.u = self.add_weight(
            name="u",
            shape=(input_shape[-1],),
            initializer=lambda *args, **kwargs: _left_singular(self.kernel),
            dtype="float32",
            trainable=False,
            # Replicas of `tf.distribute` compute the same.
            aggregation="only_first_replica",
        )
        self.gamma = self.add_weight(
            name="gamma",
            shape=(),
            initializer=self._initial_gamma,
            dtype="float32",
        )

    def _initial_gamma(self, shape, dtype):
        if self.gamma_init == "one":
            return ops.ones(shape, dtype)
        kernel = ops.cast(self.kernel, "float32")
        return power_iteration(kernel, ops.convert_to_tensor(self.u))[0]

    def next_state(self, training=False):
        """Advances `u` when training, and returns sigma, a float32 scalar."""
        kernel = ops.cast(self.kernel, "float32")
        sigma, u = power_iteration(kernel, ops.convert_to_tensor(self.u))
        if training:
            self.u.assign(u)
        return sigma

    def call(self, inputs, sigma=None, training=None):
        if sigma is None:
            sigma = self.next_state(training)
        kernel = ops.cast(self.kernel, "float32") * (self.gamma / sigma)
        kernel = ops.cast(kernel, self.compute_dtype)
        x = ops.matmul(ops.cast(inputs, self.compute_dtype), kernel)
        if self.bias is not None:
            x = x + ops.cast(self.bias, self.compute_dtype)
        return self.activation(x) if self.activation is not None else x

    def enable_lora(self, *args, **kwargs):
        super().enable_lora(*args, **kwargs)
        self.gamma.trainable = False

    def _saved(self):
        variables = [self._kernel, self.bias, self.gamma, self.u]
        return [v for v in variables if v is not None]

    # `Dense` would save its kernel and bias alone.
    def save_own_variables(self, store):
        for i, variable in enumerate(self._saved()):
            # `kernel` has the product of the LoRA matrices in it.
            store[str(i)] = self.kernel if i == 0 else variable

    def load_own_variables(self, store):
        variables = self._saved()
        if len(store.keys()) != len(variables):
            raise ValueError(
                f"Layer {self.name!r} has {len(variables)} variables (kernel, "
                "bias if any, gamma, u). Received: a file with "
                f"{len(store.keys())}"
            )
        for i, variable in enumerate(variables):
            variable.assign(store[str(i)])
        if self.lora_enabled:
            self.lora_kernel_a.assign(ops.zeros(self.lora_kernel_a.shape))
            self.lora_kernel_b.assign(ops.zeros(self.lora_kernel_b.shape))

    def get_config(self):
        return {**super().get_config(), "gamma_init": self.gamma_init}


def _left_singular(kernel, width=8, iterations=40):
    """The left singular vector of the largest singular value.

    By subspace iteration: Apple's code takes a full SVD, which needs minutes
    for the larger sizes; 8 vectors reach the same one in 40 products.
    """
    kernel = ops.cast(kernel, "float32")
    rows = kernel.shape[0]
    q = keras.random.normal((rows, min(width, rows)), seed=0, dtype="float32")
    q = ops.qr(q)[0]

    def iterate(_, q):
        product = ops.matmul(kernel, ops.matmul(ops.transpose(kernel), q))
        return ops.qr(product)[0]

    # On jax one program: of many small ones over a mesh, those of CPUs can
    # wait for each other.
    q = ops.fori_loop(0, iterations, iterate, q)
    # Rayleigh-Ritz: the best direction inside the subspace.
    projected = ops.matmul(ops.transpose(q), kernel)
    u = ops.svd(projected, full_matrices=False)[0]
    return ops.matmul(q, u[:, 0])


def make_linear(name, units, variant, *, kernel_initializer, dtype):
    """The linear layer `name` of a variant, a `Dense` or a subclass of it."""
    reparam = variant.reparam
    bias = variant.architecture.use_bias
    if bias == "attention":
        bias = name in ("query", "key", "value", "output")
    kwargs = {
        "use_bias": bias,
        "kernel_initializer": kernel_initializer,
        "name": name,
        "dtype": dtype,
    }
    if reparam is not None and name in reparam.targets:
        return SigmaReparamDense(units, gamma_init=reparam.gamma_init, **kwargs)
    return keras.layers.Dense(units, **kwargs)


def advance(layers, training):
    """Next states of those layers that have one, by name: `{name: sigma}`."""
    return {
        layer.name: layer.next_state(training)
        for layer in layers
        if isinstance(layer, SigmaReparamDense)
    }


def apply_linear(layer, x, state):
    """`layer(x)`, with its state passed in if it has one."""
    if layer.name in state:
        return layer(x, sigma=state[layer.name])
    return layer(x)
