r"""A training step written by hand in JAX: what `benchmark.py` compares with.

Question: how fast is the model of the variants `baseline`, `qk_norm` and
`qk_norm_cap` without Keras, as a good engineer would write it?
One pure function, layers unrolled, one projection for query, key and value,
cuDNN's attention on GPUs (an explicit softmax where logits are capped),
bfloat16 products with float32 weights, clip and AdamW in the same program,
whose state is donated. Run by

    python recipes/benchmark.py --rows "hand/jax/*"

B batch, T time, N heads, H head dimension, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from peer_weights import layout

EPSILON, WAVELENGTH, CAP = 1e-6, 10_000.0, 50.0
# Of `ks.AdamW`.
DECAY, BETA_1, BETA_2, ADAM_EPSILON, CLIP = 0.1, 0.9, 0.95, 1e-8, 1.0


def initialize(config, kind, seed=0):
    """All weights, float32: a dictionary of arrays and dictionaries."""
    matrices = 4 * config["num_layers"] + 2
    keys = iter(jax.random.split(jax.random.key(seed), matrices))

    def normal(*shape, deviation=0.02):
        return deviation * jax.random.normal(next(keys), shape)

    def norm(width):
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    return layout(config, kind, normal, norm)


def layer_norm(x, weights):
    y = x.astype("float32")
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + EPSILON)
    return (y * weights["scale"] + weights["bias"]).astype(x.dtype)


def rotate(x_BTNH):
    T, half = x_BTNH.shape[1], x_BTNH.shape[-1] // 2
    frequencies = WAVELENGTH ** (-np.arange(half) / half)
    angles = np.arange(T)[:, None, None] * frequencies
    cos, sin = (f(angles).astype("float32") for f in (np.cos, np.sin))
    x1, x2 = jnp.split(x_BTNH.astype("float32"), 2, axis=-1)
    y = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return y.astype(x_BTNH.dtype)


def attend(q_BTNH, k_BTNH, v_BTNH, capped):
    if not capped:
        fused = jax.default_backend() == "gpu" and q_BTNH.dtype == "bfloat16"
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            is_causal=True,
            implementation="cudnn" if fused else "xla",
        )
    # cuDNN has no cap.
    z_BNTS = jnp.einsum(
        "btnh,bsnh->bnts", q_BTNH, k_BTNH, preferred_element_type="float32"
    )
    z_BNTS = CAP * jnp.tanh(z_BNTS * (q_BTNH.shape[-1] ** -0.5 / CAP))
    T = q_BTNH.shape[1]
    z_BNTS = jnp.where(np.tri(T, dtype=bool), z_BNTS, -1e30)
    p_BNTS = jax.nn.softmax(z_BNTS).astype(v_BTNH.dtype)
    return jnp.einsum("bnts,bsnh->btnh", p_BNTS, v_BTNH)


def block(x_BTD, weights, num_heads, capped):
    B, T, D = x_BTD.shape

    def matrix(name):
        return weights[name].astype(x_BTD.dtype)

    h = layer_norm(x_BTD, weights["attention_norm"])
    qkv = (h @ matrix("qkv")).reshape(B, T, 3, num_heads, D // num_heads)
    q, k, v = (qkv[:, :, i] for i in range(3))
    if "query_norm" in weights:
        q = layer_norm(q, weights["query_norm"])
        k = layer_norm(k, weights["key_norm"])
    y = attend(rotate(q), rotate(k), v, capped).reshape(B, T, D)
    x_BTD = x_BTD + y @ matrix("output")
    h = layer_norm(x_BTD, weights["mlp_norm"])
    h = jax.nn.gelu(h @ matrix("fc1"), approximate=False)
    return x_BTD + h @ matrix("fc2")


@jax.custom_vjp
def head(h_BTD, kernel_DV):
    """Float32 logits; the gradient's products are of the compute dtype."""
    return jnp.matmul(h_BTD, kernel_DV, preferred_element_type="float32")


def _head_backward(saved, g_BTV):
    h_BTD, kernel_DV = saved
    # Of float32 they would run at half the speed, or less.
    g_BTV = g_BTV.astype(h_BTD.dtype)
    return g_BTV @ kernel_DV.T, jnp.einsum("btd,btv->dv", h_BTD, g_BTV)


head.defvjp(lambda h, kernel: (head(h, kernel), (h, kernel)), _head_backward)


def loss_of(weights, inputs, targets, *, num_heads, kind, dtype):
    """Mean cross-entropy of next tokens; int32 (B, T) each."""
    # Cast after the lookup: the table is much larger than the batch.
    x_BTD = weights["embedding"][inputs].astype(dtype)
    for layer in weights["blocks"]:
        x_BTD = block(x_BTD, layer, num_heads, kind == "qk_norm_cap")
    x_BTD = layer_norm(x_BTD, weights["final_norm"])
    logits = head(x_BTD, weights["head"].astype(dtype))
    # A comparison, unlike a gather, has no scatter in its gradient.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    picked = jnp.where(hit, logits, 0.0).sum(-1)
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


def update(state, gradients, learning_rate):
    """AdamW after a clip to a global norm of 1; decay on matrices only."""
    leaves = jax.tree.leaves(gradients)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in leaves))
    scale = CLIP / jnp.maximum(norm, CLIP)
    count = state["count"] + 1
    t = count.astype("float32")
    rate = learning_rate * jnp.sqrt(1 - BETA_2**t) / (1 - BETA_1**t)

    def one(w, m, v, g):
        g = g * scale
        m = m + (1 - BETA_1) * (g - m)
        v = v + (1 - BETA_2) * (g * g - v)
        if w.ndim > 1:
            w = w - learning_rate * DECAY * w
        return w - rate * m / (jnp.sqrt(v) + ADAM_EPSILON), m, v

    names = ("weights", "m", "v")
    found = jax.tree.map(one, *(state[name] for name in names), gradients)
    new = jax.tree.transpose(
        jax.tree.structure(gradients), jax.tree.structure((0, 0, 0)), found
    )
    return {**dict(zip(names, new)), "count": count}


def train(config, row, batches, tick):
    """Trains on batches of numpy arrays; returns parameters, last loss."""
    kind = row.split("/")[-1]
    mixed = config["precision"] == "mixed_bfloat16"
    how = {
        "num_heads": config["num_heads"],
        "kind": kind,
        "dtype": "bfloat16" if mixed else "float32",
    }

    @jax.jit
    def start():
        weights = initialize(config, kind)
        # Two trees: one buffer cannot be donated twice.
        m, v = (jax.tree.map(jnp.zeros_like, weights) for _ in range(2))
        return {"weights": weights, "m": m, "v": v, "count": jnp.int32(0)}

    def step(state, inputs, targets):
        loss, gradients = jax.value_and_grad(loss_of)(
            state["weights"], inputs, targets, **how
        )
        return update(state, gradients, config["learning_rate"]), loss

    step = jax.jit(step, donate_argnums=0)
    state = jax.block_until_ready(start())
    tick(0)
    for i, (inputs, targets) in enumerate(batches, 1):
        state, loss = step(state, jnp.asarray(inputs), jnp.asarray(targets))
        tick(i, loss)
    sizes = [w.size for w in jax.tree.leaves(state["weights"])]
    return sum(sizes), float(loss)
