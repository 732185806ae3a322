"""The block in float64 numpy, from the formulas, weights by their paths.

Shares no code with the package. Also gradients on any backend.
"""

import math

import keras
import numpy as np


def weights_of(layer):
    """`{path below the layer: float64 array}`."""
    found = {}
    for v in layer.weights:
        value = keras.ops.convert_to_numpy(v).astype("float64")
        found[v.path.split("/", 1)[1] if "/" in v.path else v.path] = value
    return found


def randomize(layer, seed=0):
    """Weights large enough that a wrong formula shows."""
    rng = np.random.default_rng(seed)
    for v in layer.weights:
        value = rng.normal(size=v.shape)
        if v.path.endswith("/u"):
            continue
        if v.path.endswith("kernel"):
            value /= v.shape[0] ** 0.5
        else:
            value = 1 + 0.3 * value
        v.assign(value.astype("float32"))


def layer_norm(x, w, name, epsilon=1e-6):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * w[f"{name}/scale"] + w[f"{name}/bias"]


def rope(x):
    B, T, N, H = x.shape
    angle = np.arange(T)[:, None] * 10000.0 ** (-2 * np.arange(H // 2) / H)
    # As complex numbers: a rotation is a product.
    z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(
        1j * angle[None, :, None]
    )
    return np.concatenate([z.real, z.imag], -1)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def linear(x, w, name, method):
    kernel = w[f"{name}/kernel"]
    if method == "sigma_reparam":
        # The stored vector has converged: the estimate is the norm itself.
        kernel = kernel * w[f"{name}/gamma"] / np.linalg.norm(kernel, 2)
    return x @ kernel


def attention(x, w, method, heads, visible):
    B, T, D = x.shape
    q, k, v = (
        linear(x, w, f"attention/{name}", method).reshape(B, T, heads, -1)
        for name in ("query", "key", "value")
    )
    if method.startswith("qk"):
        q = layer_norm(q, w, "attention/query_norm")
        k = layer_norm(k, w, "attention/key_norm")
    if method == "qkv_norm":
        v = layer_norm(v, w, "attention/value_norm")
    z = np.einsum("btnh,bsnh->bnts", rope(q), rope(k)) / q.shape[-1] ** 0.5
    if method == "soft_temp":
        z = 0.5 * z
    if method in ("soft_cap", "qk_norm_cap"):
        z = 50 * np.tanh(z / 50)
    z = np.where(visible, z, -np.inf)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if method == "soft_clip":
        p = np.clip(1.06 * p - 0.03, 0, 1)
    y = np.einsum("bnts,bsnh->btnh", p, v).reshape(B, T, -1)
    if "attention/inner_norm/scale" in w:
        y = layer_norm(y, w, "attention/inner_norm")
    return linear(y, w, "attention/output", method)


def block(x, w, method, heads, visible):
    """One of the paper's ten, by name; inner norms where there are weights."""

    def branch_end(y, name):
        if method == "layer_scale":
            return y * w[f"{name}/gain"]
        if method == "qk_fc_norm":
            return layer_norm(y, w, f"{name}/branch_norm")
        return y

    h = x
    if method != "qkv_norm":
        h = layer_norm(x, w, "attention_residual/pre_norm")
    y = attention(h, w, method, heads, visible)
    x = x + branch_end(y, "attention_residual")
    h = layer_norm(x, w, "mlp_residual/pre_norm")
    h = linear(h, w, "mlp/fc1", method)
    if "mlp/inner_norm/scale" in w:
        h = layer_norm(h, w, "mlp/inner_norm")
    h = gelu(h)
    y = linear(h, w, "mlp/fc2", method)
    return x + branch_end(y, "mlp_residual")


def gradient(function, x):
    """d function(x) / d x, as numpy; `function` returns a scalar."""
    _, (found,) = with_gradients(function, x)
    return keras.ops.convert_to_numpy(found)


def with_gradients(function, *arrays):
    """The value of a function, and its gradients by all arrays."""
    if keras.backend.backend() == "jax":
        import jax

        value, gradients = jax.value_and_grad(function, range(len(arrays)))(
            *arrays
        )
        return float(value), gradients
    if keras.backend.backend() == "torch":
        import torch

        tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
        value = function(*tensors)
        value.backward()
        return float(value.detach()), [x.grad for x in tensors]
    import tensorflow as tf

    tensors = [tf.constant(x) for x in arrays]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(*tensors)
    return float(value), tape.gradient(value, tensors)
