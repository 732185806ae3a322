"""Stability methods as values.

Every method is one setting of the residual equation

    x <- S(a * x + g * B(f(P(x))))

and of the few switches between the attention projections and the softmax. A
`Variant` names those choices and nothing else, so two variants differ only in
what their entries say. This module needs the standard library alone.

    import keras_stable as ks

    ks.get_variant("qk_norm_cap")                        # by name
    ks.get_variant("qk_norm_cap").replace(cap=30.0)      # an ablation
    ks.get_variant(json.loads(json.dumps(v.to_dict())))  # back from JSON
"""

import dataclasses
import json
from dataclasses import dataclass

from keras_stable.choices import NORM_KINDS
from keras_stable.choices import Architecture
from keras_stable.choices import Clip
from keras_stable.choices import Learned
from keras_stable.choices import Placement
from keras_stable.choices import QKVNorm
from keras_stable.choices import SigmaReparam
from keras_stable.choices import Softmax
from keras_stable.choices import check_choice
from keras_stable.choices import nearest


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to build a transformer, with its paper.

    Args:
        name: the name in logs, files and tables.
        attention, mlp: `Placement` of the two residual branches.
        qkv_norm: `QKVNorm`.
        softmax: `Softmax`.
        reparam: `SigmaReparam`, or `None` for plain kernels.
        final_norm: norm kind before the head, or `None`.
        architecture: `Architecture`.
        paper: arXiv number of the source.
        note: what it does, in one sentence.
        doubts: what the source leaves open, and what was assumed.
    """

    name: str
    attention: Placement = Placement()
    mlp: Placement = Placement()
    qkv_norm: QKVNorm = QKVNorm()
    softmax: Softmax = Softmax()
    reparam: SigmaReparam | None = None
    final_norm: str | None = "layer"
    architecture: Architecture = Architecture()
    paper: str = ""
    note: str = ""
    doubts: tuple[str, ...] = ()

    def __post_init__(self):
        check_choice(self.final_norm, (None, *NORM_KINDS), "final norm")
        object.__setattr__(self, "doubts", tuple(self.doubts))
        for field, cls in _PARTS.items():
            value = getattr(self, field)
            if not isinstance(value, cls) and not (
                field == "reparam" and value is None
            ):
                raise TypeError(
                    f"`{field}` must be a {cls.__name__}. Received: {value!r}"
                )

    def replace(self, **changes):
        """A copy with some choices changed; the name says which.

        A change names a field of the variant or of one of its parts. A field
        of `Placement` is set in both branches.

        Example:

        >>> get("soft_cap").replace(cap=30.0).name
        'soft_cap+cap=30.0'
        >>> get("layer_scale").replace(gain=Learned(0.1)).mlp.gain.init
        0.1

        Raises:
            ValueError: if a name is not a field, or names a part that this
                variant does not have.
        """
        new, words = {}, []
        for name, value in changes.items():
            words.append(f"{name}={_short(value)}")
            if name in _FIELDS:
                new[name] = value
                continue
            owners = [f for f, cls in _PARTS.items() if name in _names(cls)]
            if not owners:
                leaves = [n for cls in _PARTS.values() for n in _names(cls)]
                raise nearest(name, (*_FIELDS, *leaves), "field of Variant")
            for owner in owners:
                part = new.get(owner, getattr(self, owner))
                if part is None:
                    raise ValueError(
                        f"Variant {self.name!r} has no `{owner}`, so {name!r} "
                        f"cannot be replaced. Pass {owner}="
                        f"{_PARTS[owner].__name__}({name}={value!r}) instead."
                    )
                new[owner] = dataclasses.replace(part, **{name: value})
        new.setdefault("name", "+".join([self.name, *words]))
        return dataclasses.replace(self, **new)

    def at(self, num_layers):
        """This variant with depth formulas turned into numbers."""
        attention, mlp = self.attention.at(num_layers), self.mlp.at(num_layers)
        return dataclasses.replace(self, attention=attention, mlp=mlp)

    def to_dict(self):
        """Nested dictionary of JSON values; `get` reads it back."""
        # Through JSON, so that tuples are lists here already.
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, config):
        """The inverse of `to_dict`."""
        return _decode(cls, config)


# The parts of a Variant, by field. Their field names are unique except that
# both placements share theirs, which is what `replace` relies on.
_PARTS = {
    "attention": Placement,
    "mlp": Placement,
    "qkv_norm": QKVNorm,
    "softmax": Softmax,
    "reparam": SigmaReparam,
    "architecture": Architecture,
}
_VALUES = {**_PARTS, "gain": Learned, "clip": Clip}


def _names(cls):
    return tuple(field.name for field in dataclasses.fields(cls))


_FIELDS = _names(Variant)


def _short(value):
    if not dataclasses.is_dataclass(value):
        return str(value)
    words = (f"{k}:{v}" for k, v in vars(value).items() if v is not None)
    return "(" + ",".join(words) + ")"


def _decode(cls, config):
    unknown = set(config) - set(_names(cls))
    if unknown:
        raise nearest(unknown.pop(), _names(cls), f"field of {cls.__name__}")
    decoded = {
        name: _decode(_VALUES[name], value)
        if name in _VALUES and isinstance(value, dict)
        else (tuple(value) if isinstance(value, list) else value)
        for name, value in config.items()
    }
    return cls(**decoded)


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
    )
}
