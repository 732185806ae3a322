r"""Training steps in plain PyTorch: what `benchmark.py` compares with.

Question: how fast is the model of the variants `baseline`, `qk_norm` and
`qk_norm_cap` without Keras, as a good engineer would write it; and how fast is
the GPT-2 of `transformers`, of the same shapes?
By hand: a function of a dictionary of tensors under `torch.compile`, one
projection for query, key and value, `scaled_dot_product_attention`
(`flex_attention` where logits are capped, which learns on GPUs alone), bfloat16
products with float32 weights, a fused AdamW. Run by

    python recipes/benchmark.py --rows "hand/torch*/*,transformers/*"

B batch, T time, N heads, H head dimension, D width, V vocabulary.
"""

import functools

import torch
import torch.nn.functional as F
from peer_weights import layout
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention

EPSILON, WAVELENGTH, CAP = 1e-6, 10_000.0, 50.0
# Of `ks.AdamW`.
DECAY, BETAS, ADAM_EPSILON, CLIP = 0.1, (0.9, 0.95), 1e-8, 1.0


def initialize(config, kind, device="cpu", seed=0):
    """All weights, float32: a dictionary of tensors and dictionaries."""
    where = {"device": device}
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, deviation=0.02):
        weight = torch.empty(shape, **where)
        weight.normal_(0.0, deviation, generator=generator)
        return weight.requires_grad_()

    def norm(width):
        return {
            "scale": torch.ones(width, **where).requires_grad_(),
            "bias": torch.zeros(width, **where).requires_grad_(),
        }

    return layout(config, kind, normal, norm)


def leaves(tree):
    """The tensors in a tree of dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [leaf for part in parts for leaf in leaves(part)]


def layer_norm(x, weights):
    shape = weights["scale"].shape
    y = F.layer_norm(
        x.float(), shape, weights["scale"], weights["bias"], EPSILON
    )
    return y.to(x.dtype)


def rotations(length, head_dim, device="cpu"):
    """Cosines and sines of all positions, float32 (T, 1, H / 2)."""
    half = head_dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=device)
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = positions[:, None, None] * WAVELENGTH ** (-steps / half)
    return angles.cos().float(), angles.sin().float()


def rotate(x_BTNH, rotation):
    cos, sin = rotation
    x1, x2 = x_BTNH.float().chunk(2, dim=-1)
    y = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return y.to(x_BTNH.dtype)


def past(length, device="cpu"):
    """What `flex_attention` is told of who sees whom."""
    return create_block_mask(
        lambda b, n, t, s: t >= s, None, None, length, length, device
    )


def attend(q_BTNH, k_BTNH, v_BTNH, seen):
    qkv = (x.transpose(1, 2) for x in (q_BTNH, k_BTNH, v_BTNH))
    if seen is None:
        y_BNTH = F.scaled_dot_product_attention(*qkv, is_causal=True)
    else:

        def cap(z, b, n, t, s):
            return CAP * torch.tanh(z / CAP)

        y_BNTH = flex_attention(*qkv, cap, seen)
    return y_BNTH.transpose(1, 2)


def block(x_BTD, weights, rotation, seen=None):
    B, T, D = x_BTD.shape
    H = 2 * rotation[0].shape[-1]

    def matrix(name):
        return weights[name].to(x_BTD.dtype)

    h = layer_norm(x_BTD, weights["attention_norm"])
    q, k, v = (h @ matrix("qkv")).view(B, T, 3, D // H, H).unbind(2)
    if "query_norm" in weights:
        q = layer_norm(q, weights["query_norm"])
        k = layer_norm(k, weights["key_norm"])
    q, k = rotate(q, rotation), rotate(k, rotation)
    y_BTD = attend(q, k, v, seen).reshape(B, T, D)
    x_BTD = x_BTD + y_BTD @ matrix("output")
    h = layer_norm(x_BTD, weights["mlp_norm"])
    return x_BTD + F.gelu(h @ matrix("fc1")) @ matrix("fc2")


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def loss_of(weights, rotation, inputs, targets, dtype=torch.float32, seen=None):
    """Mean cross-entropy of next tokens; int64 (B, T) each.

    Logits of attention are capped where `seen` is what `past` returns.
    """
    x_BTD = F.embedding(inputs, weights["embedding"]).to(dtype)
    for layer in weights["blocks"]:
        x_BTD = block(x_BTD, layer, rotation, seen)
    x_BTD = layer_norm(x_BTD, weights["final_norm"])
    return cross_entropy(x_BTD @ weights["head"].to(dtype), targets)


def transformers_loss(config, device):
    """Weights and loss function of the GPT-2 of `transformers`."""
    import transformers

    gpt2 = transformers.GPT2Config(
        vocab_size=config["vocabulary"],
        n_positions=config["sequence_length"],
        n_embd=config["hidden_dim"],
        n_layer=config["num_layers"],
        n_head=config["num_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        gpt2, attn_implementation="sdpa"
    ).to(device)
    mixed = config["precision"] == "mixed_bfloat16"

    def loss(inputs, targets):
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            return cross_entropy(model(inputs).logits, targets)

    return list(model.parameters()), loss


def train(config, row, batches, tick):
    """Trains on batches of numpy arrays; returns parameters, last loss."""
    library, place, kind = row.split("/")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if library == "transformers":
        parameters, loss_function = transformers_loss(config, device)
        compiled = device == "cuda"
    else:
        weights = initialize(config, kind, device)
        parameters = leaves(weights)
        head_dim = config["hidden_dim"] // config["num_heads"]
        T = config["sequence_length"]
        rotation = rotations(T, head_dim, device)
        seen = past(T, device) if kind == "qk_norm_cap" else None
        mixed = config["precision"] == "mixed_bfloat16"
        dtype = torch.bfloat16 if mixed else torch.float32
        loss_function = functools.partial(
            loss_of, weights, rotation, dtype=dtype, seen=seen
        )
        compiled = place == "torch"
    if compiled:
        loss_function = torch.compile(loss_function, dynamic=False)
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in parameters if w.ndim > 1]},
            {
                "params": [w for w in parameters if w.ndim < 2],
                "weight_decay": 0.0,
            },
        ],
        lr=config["learning_rate"],
        betas=BETAS,
        eps=ADAM_EPSILON,
        weight_decay=DECAY,
        fused=device == "cuda",
    )
    tick(0)
    for i, batch in enumerate(batches, 1):
        inputs, targets = (
            torch.from_numpy(ids).to(device).long() for ids in batch
        )
        loss = loss_function(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tick(i, loss.detach())
    return sum(w.numel() for w in parameters), float(loss.detach())
