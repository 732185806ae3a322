"""Stability methods by name: `VARIANTS`, and `get`.

Two variants differ only in what their entries say.

    import keras_stable as ks

    ks.get_variant("qk_norm_cap")                        # by name
    ks.get_variant("qk_norm_cap").replace(cap=30.0)      # an ablation
    ks.get_variant(json.loads(json.dumps(v.to_dict())))  # back from JSON
"""

from keras_stable.choices import Architecture
from keras_stable.choices import Clip
from keras_stable.choices import Entropy
from keras_stable.choices import Learned
from keras_stable.choices import Placement
from keras_stable.choices import QKVNorm
from keras_stable.choices import SigmaReparam
from keras_stable.choices import Softmax
from keras_stable.choices import nearest
from keras_stable.variant import Variant


def get(identifier):
    """The `Variant` for a name in `VARIANTS`, a dictionary, or a `Variant`.

    Raises:
        ValueError: for an unknown name, with the nearest spelling.
        TypeError: for anything else.
    """
    if isinstance(identifier, Variant):
        return identifier
    if isinstance(identifier, dict):
        return Variant.from_dict(identifier)
    if isinstance(identifier, str):
        if identifier not in VARIANTS:
            raise nearest(identifier, VARIANTS, "variant")
        return VARIANTS[identifier]
    raise TypeError(
        "A variant is a name, a Variant or the dictionary of one. Received: "
        f"{identifier!r} of type {type(identifier).__name__}"
    )


def to_markdown():
    """The README's table of variants."""
    rows = ["| name | what it changes | paper |", "|---|---|---|"]
    for variant in VARIANTS.values():
        url = f"[{variant.paper}](https://arxiv.org/abs/{variant.paper})"
        url = url if variant.paper else "none"
        rows.append(f"| `{variant.name}` | {variant.note} | {url} |")
    return "\n".join(rows)


_ARCHITECTURE_DOUBT = (
    "The paper's activation, position encoding, biases, epsilon and "
    "initialisation are unknown to us: GELU, RoPE, no biases and 1e-6 assumed."
)
_QK_SCOPE_DOUBT = (
    "Per-head or full-width, affine or not, before or after RoPE: not known "
    "for the paper; per-head, scale and bias, before RoPE, as in Megatron."
)
_QK = QKVNorm(qk="layer")
_SANDWICH = Placement(pre="rms_plus_one", branch="rms_plus_one")
_PRE_RMS = Placement(pre="rms")
_POST_RMS = Placement(pre=None, branch="rms")
_GEMMA = {
    "activation": "geglu_tanh",
    "tie_embeddings": True,
    "scale_embeddings": True,
}

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            name="baseline",
            paper="2410.16682",
            note="Pre-LN: `x + f(LN(x))` for attention and MLP, final LN.",
            doubts=(_ARCHITECTURE_DOUBT,),
        ),
        Variant(
            name="sigma_reparam",
            reparam=SigmaReparam(),
            paper="2303.06296",
            note="Every linear kernel is `gamma / sigma(W) * W`, sigma by one "
            "power iteration a step.",
            doubts=(
                "Apple's two reference codes start gamma at 1 (speech) and at "
                "sigma(W) (vision); the source says 1.",
                "Apple's ViT recipe then removes every norm; whether the "
                "comparison did is unknown: pre-LN kept. Without norms: "
                "replace(pre=None, final_norm=None).",
                "Query, key and value are separate matrices here, each with "
                "its own sigma; a fused kernel would have one.",
            ),
        ),
        Variant(
            name="soft_temp",
            softmax=Softmax(temperature=0.5),
            paper="2410.16682",
            note="Logits times 0.5 before the softmax.",
            doubts=(
                "Whether 0.5 multiplies or divides is not known; only "
                "multiplying makes logits smaller, as the result demands.",
            ),
        ),
        Variant(
            name="soft_cap",
            softmax=Softmax(cap=50.0),
            paper="2408.00118",
            note="Logits `50 tanh(z / 50)` before mask and softmax.",
        ),
        Variant(
            name="soft_clip",
            softmax=Softmax(clip=Clip(zeta=1.03, gamma=-0.03)),
            paper="2306.12929",
            note="Probabilities `clip(1.06 p - 0.03, 0, 1)`.",
            doubts=(
                "With a fixed gamma of -0.03, a query whose attention is near "
                "uniform over more than 35 keys outputs zeros and gets no "
                "gradient. Clip(zeta=1.0, alpha=12.0) is its authors' later "
                "form for language models.",
            ),
        ),
        Variant(
            name="layer_scale",
            attention=Placement(gain=Learned(1e-4)),
            mlp=Placement(gain=Learned(1e-4)),
            paper="2103.17239",
            note="Branch outputs times a learned vector that starts at 1e-4.",
            doubts=(
                "The comparison does not report the initial value: 1e-4 is "
                "the default of the method's own code.",
            ),
        ),
        Variant(
            name="qk_norm",
            qkv_norm=_QK,
            paper="2302.05442",
            note="LN on queries and keys, pre-LN kept.",
            doubts=(_QK_SCOPE_DOUBT,),
        ),
        Variant(
            name="qk_fc_norm",
            attention=Placement(branch="layer"),
            mlp=Placement(branch="layer"),
            qkv_norm=_QK,
            paper="2410.16682",
            note="`qk_norm`, and LN on the outputs of Proj and FC2.",
            doubts=(_QK_SCOPE_DOUBT,),
        ),
        Variant(
            name="qkv_norm",
            attention=Placement(pre=None),
            qkv_norm=QKVNorm(qk="layer", v="layer"),
            paper="2410.16682",
            note="LN on queries, keys and values instead of the pre-LN before "
            "them; the MLP keeps its pre-LN.",
            doubts=(
                _QK_SCOPE_DOUBT,
                "Three norms or one over the fused projection: not known; "
                "three here, as in HybridNorm.",
            ),
        ),
        Variant(
            name="qk_norm_cap",
            qkv_norm=_QK,
            softmax=Softmax(cap=50.0),
            paper="2410.16682",
            note="`qk_norm`, then `50 tanh(z / 50)`.",
            doubts=(
                _QK_SCOPE_DOUBT,
                "With unit gains |z| is at most sqrt(head_dim), where the cap "
                "changes next to nothing: it acts once gains have grown.",
            ),
        ),
        # Shipped models: `from_transformers` reads and writes their weights.
        Variant(
            name="gpt2",
            final_norm="layer",
            architecture=Architecture(
                activation="gelu_tanh",
                position="learned",
                use_bias=True,
                epsilon=1e-5,
                tie_embeddings=True,
            ),
            note="GPT-2 (Radford et al., 2019): pre-LN, biases, learned "
            "positions, tied head.",
        ),
        Variant(
            name="gemma2",
            attention=_SANDWICH,
            mlp=_SANDWICH,
            softmax=Softmax(cap=50.0),
            final_norm="rms_plus_one",
            architecture=Architecture(
                sliding_window=(4096, None), output_cap=30.0, **_GEMMA
            ),
            paper="2408.00118",
            note="Gemma 2: RMSNorm before and after each branch, caps on "
            "attention and output logits, a window in every other layer.",
        ),
        Variant(
            name="gemma3",
            attention=_SANDWICH,
            mlp=_SANDWICH,
            qkv_norm=QKVNorm(qk="rms_plus_one"),
            final_norm="rms_plus_one",
            architecture=Architecture(
                sliding_window=(*[1024] * 5, None),
                rope_wavelength=(*[10_000.0] * 5, 1_000_000.0),
                **_GEMMA,
            ),
            paper="2503.19786",
            note="Gemma 3: RMSNorm before and after each branch and on "
            "queries and keys, a window in five of six layers, no caps.",
            doubts=(
                "The window is 512 in the 1B model; from 4B on, positions of "
                "layers without one are divided by 8.",
            ),
        ),
        Variant(
            name="qwen3",
            attention=_PRE_RMS,
            mlp=_PRE_RMS,
            qkv_norm=QKVNorm(qk="rms"),
            final_norm="rms",
            architecture=Architecture(
                activation="swiglu", rope_wavelength=1_000_000.0
            ),
            paper="2505.09388",
            note="Qwen 3: pre-RMSNorm, RMSNorm on queries and keys, SwiGLU.",
            doubts=("Heads of models below 8B are tied.",),
        ),
        Variant(
            name="olmo2",
            attention=_POST_RMS,
            mlp=_POST_RMS,
            qkv_norm=QKVNorm(qk="rms", scope="full"),
            final_norm="rms",
            architecture=Architecture(
                activation="swiglu", rope_wavelength=500_000.0
            ),
            paper="2501.00656",
            note="OLMo 2: RMSNorm on branch outputs instead of inputs, and on "
            "all heads' queries and keys at once, SwiGLU.",
            doubts=(
                "Its training also uses a z-loss of 1e-5: "
                "replace(z_loss=1e-5).",
            ),
        ),
        # Penalties on the entropy of attention: not of the ten compared.
        Variant(
            name="entropy_floor",
            softmax=Softmax(entropy=Entropy(weight=1e-2, floor=0.1)),
            note="Penalty on attention whose entropy is below a tenth of the "
            "largest.",
            doubts=("Weight and floor are ours, not published ones.",),
        ),
        Variant(
            name="entropy_band",
            softmax=Softmax(entropy=Entropy(weight=1e-5, tolerance=0.2)),
            paper="2501.03489",
            note="Penalty on attention whose entropy is far from a learned "
            "part of the largest.",
            doubts=(
                "Published as a sum over sequences and queries; a mean here, "
                "so the published weight is a weaker one.",
            ),
        ),
    )
}
# The ten settings that arXiv 2410.16682 compares.
PAPER = tuple(VARIANTS)[:10]
