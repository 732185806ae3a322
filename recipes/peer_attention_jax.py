"""Attention on GPUs with JAX: cuDNN's, ours, and the formula written out."""

import jax
from jax import numpy as jnp


def rows(scale, cap, clip, attend):
    """What is timed, and how.

    Args:
        scale, cap: floats; clip: `(gamma, zeta)`.
        attend: our kernel, see `attention_kernel`.

    Returns:
        `{name: (function of q, k, v, its keywords)}`; from such a function
        to one that computes outputs and gradients; from numpy arrays to
        tensors; what waits for results; the formula; the device.
    """

    def formula(q, k, v, cap=None, clip=None):
        z = scale * jnp.einsum(
            "btnh,bsnh->bnts", q, k, preferred_element_type="float32"
        )
        z = z if cap is None else cap * jnp.tanh(z / cap)
        T = q.shape[1]
        z = jnp.where(jnp.tril(jnp.ones((T, T), bool)), z, -1e30)
        p = jax.nn.softmax(z, axis=-1)
        if clip is not None:
            p = jnp.clip((clip[1] - clip[0]) * p + clip[0], 0.0, 1.0)
        return jnp.einsum("bnts,bsnh->btnh", p.astype(v.dtype), v)

    def stock(q, k, v):
        return jax.nn.dot_product_attention(
            *(q, k, v), scale=scale, is_causal=True, implementation="cudnn"
        )

    def beside(q, k, v):
        """A second pass, of forward products, for the entropy of rows.

        The mean logit of a row is that of q with the mean key, which attention
        gives where values are keys. There is no largest logit among what is
        computed; and JAX rounds the normaliser to bfloat16, which costs
        nothing that is timed.
        """
        q_, k_ = (jax.lax.stop_gradient(x) for x in (q, k))
        mean_key, lse = jax.nn.dot_product_attention(
            *(q_, k_, k_),
            scale=scale,
            is_causal=True,
            implementation="cudnn",
            return_residual=True,
        )
        mean = scale * jnp.einsum(
            "btnh,btnh->btn", q_, mean_key, preferred_element_type="float32"
        )
        return stock(q, k, v), [(lse - mean).max((0, 1))]

    def ours(q, k, v, **how):
        y, rows = attend(q, k, v, scale, **how)
        # Kept as the monitor keeps them: reduced over sequences and queries.
        return y, None if rows is None else [x.max((0, 2)) for x in rows]

    def step(function):
        def total(q, k, v, dy):
            found = function(q, k, v)
            y, rows = found if isinstance(found, tuple) else (found, None)
            y = y.astype("float32") * dy.astype("float32")
            return y.sum(), (found, rows)

        run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

        def call(tensors):
            (_, (found, _)), gradients = run(*tensors)
            return (found[0] if isinstance(found, tuple) else found), gradients

        return call

    def make(arrays, dtype):
        return [jnp.asarray(x, dtype) for x in arrays]

    functions = {
        "cuDNN": (stock, {}),
        "cuDNN, entropy beside": (beside, {}),
        "ours": (ours, {}),
        "ours, statistics": (ours, {"statistics": True}),
        "ours, cap": (ours, {"cap": cap}),
        "ours, cap, statistics": (ours, {"cap": cap, "statistics": True}),
        "ours, clip": (ours, {"clip": clip}),
        "formula, cap": (formula, {"cap": cap}),
        "formula, clip": (formula, {"clip": clip}),
    }
    device = jax.devices()[0].device_kind
    return functions, step, make, jax.block_until_ready, formula, device
