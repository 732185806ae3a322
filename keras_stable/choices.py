"""The choices that a `Variant` is made of, each a small frozen value.

Around a residual branch: `Placement`. Between the attention projections and
the softmax: `QKVNorm`, `Softmax`, `Clip`. How a kernel is parametrised:
`SigmaReparam`. What the block is made of otherwise: `Architecture`. All of
them check their values when they are made. Standard library only.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass

# What `norms.NORMS` can build; `None` means "no norm here".
NORM_KINDS = (
    "layer",
    "layer_no_bias",
    "layer_plain",
    "rms",
    "rms_plus_one",
    "rms_plain",
    "l2",
)
# What `mlp.ACTIVATIONS` can build.
ACTIVATION_KINDS = (
    "gelu",
    "gelu_tanh",
    "relu_squared",
    "swiglu",
    "geglu",
    "geglu_tanh",
)
# Scales given as formulas of the number of blocks L.
DEPTH_SCALES = {
    # DeepNet (arXiv 2203.00555), decoder-only: the skip is multiplied by it.
    "deepnorm": lambda num_layers: (2 * num_layers) ** 0.25,
    # Keeps the stream's RMS at one when every branch writes RMS one.
    "1/sqrt(2L)": lambda num_layers: 1 / math.sqrt(2 * num_layers),
}
LINEAR_NAMES = ("query", "key", "value", "output", "gate", "fc1", "fc2")


def nearest(received, allowed, what):
    """The `ValueError` for a name that is not one of `allowed`.

    It names what was received, the nearest spelling if there is one, and all
    that is allowed.
    """
    allowed = list(dict.fromkeys(allowed))
    texts = [name for name in allowed if isinstance(name, str)]
    lower = {name.lower(): name for name in texts}
    close = difflib.get_close_matches(str(received).lower(), lower, n=1)
    hint = f" Did you mean {lower[close[0]]!r}?" if close else ""
    names = ", ".join(repr(name) for name in allowed)
    return ValueError(
        f"Unknown {what}.{hint} Allowed: {names}. Received: {received!r}"
    )


def check_choice(value, allowed, what):
    """Raises the `ValueError` of `nearest` unless `value` is allowed."""
    if value not in allowed:
        raise nearest(value, allowed, what)


def check_number(value, what, low=-math.inf):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= low:
        bound = "" if low == -math.inf else f" greater than {low}"
        raise ValueError(
            f"{what} must be a finite number{bound}. Received: {value!r}"
        )


def check_expression(text, what):
    """The compiled regular expression; None for None.

    Raises:
        ValueError: if it is none.
    """
    try:
        return None if text is None else re.compile(text)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`{what}` must be a regular expression. Received: {text!r} "
            f"({error})"
        ) from error


@dataclass(frozen=True)
class Learned:
    """A scale learned per channel, shape (hidden_dim,), starting at `init`."""

    init: float

    def __post_init__(self):
        check_number(self.init, "`init` of a learned scale")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where norms and scales stand around one residual branch.

    Args:
        pre: norm kind. `P`, on the branch's input. Defaults to `"layer"`.
        branch: norm kind. `B`, on the branch's output. Defaults to `None`.
        stream: norm kind. `S`, on the sum. Defaults to `None`.
        skip: number, or a name in `DEPTH_SCALES`. `a`. Defaults to 1.
        gain: number, a name in `DEPTH_SCALES`, or `Learned(init)` (LayerScale).
            `g`. Defaults to 1.
    """

    pre: str | None = "layer"
    branch: str | None = None
    stream: str | None = None
    skip: float | str = 1.0
    gain: float | str | Learned = 1.0

    def __post_init__(self):
        for field in ("pre", "branch", "stream"):
            check_choice(getattr(self, field), (None, *NORM_KINDS), "norm")
        for field in ("skip", "gain"):
            value = getattr(self, field)
            if isinstance(value, str):
                what = f"depth formula for `{field}`"
                check_choice(value, DEPTH_SCALES, what)
            elif not (field == "gain" and isinstance(value, Learned)):
                check_number(value, f"`{field}`")

    def at(self, num_layers):
        """This placement with its depth formulas turned into numbers."""
        resolved = {
            field: DEPTH_SCALES[value](num_layers)
            for field in ("skip", "gain")
            if isinstance(value := getattr(self, field), str)
        }
        return dataclasses.replace(self, **resolved)


@dataclass(frozen=True, kw_only=True)
class QKVNorm:
    """Norms on the attention projections.

    Args:
        qk: norm kind on queries and keys, one layer each. Defaults to `None`.
        v: norm kind on values. Defaults to `None`.
        scope: `"head"` normalises each head's `head_dim` channels with
            parameters that heads share; `"full"` all heads' channels at once
            (OLMo 2). Defaults to `"head"`.
        order: `"before_rope"` or `"after_rope"`, for queries and keys.
    """

    qk: str | None = None
    v: str | None = None
    scope: str = "head"
    order: str = "before_rope"

    def __post_init__(self):
        check_choice(self.qk, (None, *NORM_KINDS), "norm for `qk`")
        check_choice(self.v, (None, *NORM_KINDS), "norm for `v`")
        check_choice(self.scope, ("head", "full"), "norm scope")
        check_choice(self.order, ("before_rope", "after_rope"), "norm order")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Clipped softmax, `p <- clip((zeta - gamma) * p + gamma, 0, 1)`.

    Give `gamma`, or `alpha` for `gamma = -alpha / T` with T keys: a fixed
    `gamma` zeroes every row that is near uniform over more than
    `(zeta - gamma) / -gamma` keys (35 for the defaults), with zero gradient.
    """

    zeta: float = 1.03
    gamma: float | None = None
    alpha: float | None = None

    def __post_init__(self):
        if (self.gamma is None) == (self.alpha is None):
            raise ValueError(
                "Clip takes either `gamma` or `alpha`. Received: "
                f"gamma={self.gamma!r}, alpha={self.alpha!r}"
            )
        check_number(self.zeta, "`zeta`", low=0)
        if self.alpha is not None:
            check_number(self.alpha, "`alpha`", low=0)
        else:
            check_number(self.gamma, "`gamma`")
            if self.gamma > 0:
                raise ValueError(
                    "`gamma` stretches the softmax below zero and must be at "
                    f"most 0. Received: gamma={self.gamma}"
                )


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """From scaled logits `z = scale * q.k` to attention probabilities.

    Args:
        temperature: number that *multiplies* z. Defaults to 1.
        cap: `z <- cap * tanh(z / cap)`, before the mask. Defaults to `None`.
        clip: `Clip`, after the softmax. Defaults to `None`.
        logits_dtype: `"float32"`, or `"bfloat16"` to round z (an ablation).
    """

    temperature: float = 1.0
    cap: float | None = None
    clip: Clip | None = None
    logits_dtype: str = "float32"

    def __post_init__(self):
        check_number(self.temperature, "`temperature`", low=0)
        if self.cap is not None:
            check_number(self.cap, "`cap`", low=0)
        check_choice(
            self.logits_dtype, ("float32", "bfloat16"), "logits dtype"
        )
        if not isinstance(self.clip, (Clip, type(None))):
            raise TypeError(
                "`clip` must be a `Clip` or None, e.g. Clip(zeta=1.03, "
                f"gamma=-0.03). Received: {self.clip!r}"
            )


@dataclass(frozen=True, kw_only=True)
class SigmaReparam:
    """Kernels parametrised as `gamma / sigma(W) * W`.

    Args:
        gamma_init: `"one"` (the paper and Apple's speech code: every kernel
            starts with spectral norm 1) or `"spectral"` (Apple's vision code:
            gamma starts at sigma(W), so that the function does not change).
        targets: names of the linear layers that are reparametrised.
    """

    gamma_init: str = "one"
    targets: tuple[str, ...] = LINEAR_NAMES

    def __post_init__(self):
        check_choice(self.gamma_init, ("one", "spectral"), "gamma_init")
        object.__setattr__(self, "targets", tuple(self.targets))
        for target in self.targets:
            check_choice(target, LINEAR_NAMES, "linear layer in `targets`")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the block is made of, where stability methods leave it open.

    Args:
        activation: MLP kind: `"gelu"` (exact), `"gelu_tanh"`,
            `"relu_squared"`, or gated: `"swiglu"`, `"geglu"`, `"geglu_tanh"`.
        position: `"rope"` (on queries and keys) or `"learned"` (added to the
            embeddings).
        use_bias: whether linear layers have biases.
        epsilon: of every norm. Keras's default of 1e-3 would swamp q, k and v
            computed from raw embeddings, whose variance starts near 1e-4.
        scale_embeddings: whether embeddings are multiplied by
            `sqrt(hidden_dim)`.
        output_cap: `logits <- cap * tanh(logits / cap)` on the head.
    """

    activation: str = "gelu"
    position: str = "rope"
    use_bias: bool = False
    epsilon: float = 1e-6
    scale_embeddings: bool = False
    output_cap: float | None = None

    def __post_init__(self):
        check_choice(self.activation, ACTIVATION_KINDS, "activation")
        check_choice(self.position, ("rope", "learned"), "position encoding")
        check_number(self.epsilon, "`epsilon`", low=0)
        if self.output_cap is not None:
            check_number(self.output_cap, "`output_cap`", low=0)
