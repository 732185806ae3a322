"""The choices that a `Variant` is made of, each a small frozen value.

Around a residual branch: `Placement`. Between the attention projections and
the softmax: `QKVNorm`, `Softmax`, `Clip`, `Entropy`. How a kernel is
parametrised: `SigmaReparam`. What the model is made of otherwise:
`Architecture`. All check their values when made. Standard library only.
"""

import dataclasses
import difflib
import math
import numbers
import re
import sys
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
    # Not `isfinite`: an integer may be larger than any float.
    finite = number and abs(value) <= sys.float_info.max
    if not finite or value <= low:
        bound = "" if low == -math.inf else f" greater than {low}"
        raise ValueError(
            f"{what} must be a finite number{bound}. Received: {value!r}"
        )


def check_integer(value, what, low, high=None):
    """`value` as an int, or a `ValueError` unless `low <= value < high`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value >= high):
        bound = f"at least {low}" + (f" and below {high}" if high else "")
        raise ValueError(
            f"{what} must be an integer, {bound}. Received: {value!r}"
        )
    return int(value)


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
        inner: norm kind. Within f: on what leaves the heads of attention,
            before Proj; on what leaves FC1, before the MLP's activation.
            Defaults to `None`.
        branch: norm kind. `B`, on the branch's output. Defaults to `None`.
        stream: norm kind. `S`, on the sum. Defaults to `None`.
        skip: number, or a name in `DEPTH_SCALES`. `a`. Defaults to 1.
        gain: number, a name in `DEPTH_SCALES`, or `Learned(init)` (LayerScale).
            `g`. Defaults to 1.
    """

    pre: str | None = "layer"
    inner: str | None = None
    branch: str | None = None
    stream: str | None = None
    skip: float | str = 1.0
    gain: float | str | Learned = 1.0

    def __post_init__(self):
        for field in ("pre", "inner", "branch", "stream"):
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
class Entropy:
    """A penalty on the entropy of attention, in training only.

    With n visible keys and H = -sum_j p_j log p_j of a query, a mean over
    queries, heads and layers, times `weight`:

    ```
    relu(floor * log n - H)^2                               given `floor`
    d^2 where |d| > tolerance * log n, d = H - theta log n  given `tolerance`
    ```

    The first works against collapse only. The second is published (arXiv
    2501.03489): theta is learned, one number per head. There the sum over
    sequences and queries is taken, and log T for log n.
    """

    weight: float
    floor: float | None = None
    tolerance: float | None = None

    def __post_init__(self):
        if (self.floor is None) == (self.tolerance is None):
            raise ValueError(
                "Entropy takes either `floor` or `tolerance`. Received: "
                f"floor={self.floor!r}, tolerance={self.tolerance!r}"
            )
        for field in ("weight", "floor", "tolerance"):
            if getattr(self, field) is not None:
                check_number(getattr(self, field), f"`{field}`", low=0)
        for field in ("floor", "tolerance"):
            if (getattr(self, field) or 0) > 1:
                raise ValueError(
                    f"`{field}` is a part of the largest entropy, log n, at "
                    f"most 1. Received: {getattr(self, field)}"
                )


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """From scaled logits `z = scale * q.k` to attention probabilities.

    Args:
        temperature: number that *multiplies* z. Defaults to 1.
        cap: `z <- cap * tanh(z / cap)`, before the mask. Defaults to `None`.
        clip: `Clip`, after the softmax. Defaults to `None`.
        entropy: `Entropy`, a penalty. Defaults to `None`.
        logits_dtype: `"float32"`, or `"bfloat16"` to round z (an ablation).
    """

    temperature: float = 1.0
    cap: float | None = None
    clip: Clip | None = None
    entropy: Entropy | None = None
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
        if not isinstance(self.entropy, (Entropy, type(None))):
            raise TypeError(
                "`entropy` must be an `Entropy` or None, e.g. "
                f"Entropy(weight=1e-2, floor=0.1). Received: {self.entropy!r}"
            )

    def at(self, num_layers):
        """This softmax with the penalty's mean over layers in its weight."""
        if self.entropy is None:
            return self
        weight = self.entropy.weight / num_layers
        entropy = dataclasses.replace(self.entropy, weight=weight)
        return dataclasses.replace(self, entropy=entropy)


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
    """What the model is made of, where stability methods leave it open.

    A tuple for `sliding_window`, `rope_wavelength` or `rope_factor` is cycled
    over the layers: `(4096, None)` is a window of 4096 keys in the first, the
    third, ... layer, and none in the others.

    Args:
        activation: MLP kind: `"gelu"` (exact), `"gelu_tanh"`,
            `"relu_squared"`, or gated: `"swiglu"`, `"geglu"`, `"geglu_tanh"`.
        position: `"rope"` (on queries and keys) or `"learned"` (added to the
            embeddings).
        use_bias: whether linear layers have biases: bool, or `"attention"`
            for those of attention only.
        epsilon: of every norm. Keras's default of 1e-3 would swamp q, k and v
            computed from raw embeddings, whose variance starts near 1e-4.
        query_scale: what q.k is multiplied by. Defaults to `None`,
            1/sqrt(head_dim).
        sliding_window: int, `None`, or a tuple: keys a query sees at most.
        rope_wavelength: number or a tuple. Defaults to 10000.
        rope_factor: number or a tuple: positions are divided by it before
            they are rotated ("linear" scaling). Defaults to 1.
        tie_embeddings: whether the head is the transposed embedding.
        scale_embeddings: whether embeddings are multiplied by
            `sqrt(hidden_dim)`.
        output_cap: `logits <- cap * tanh(logits / cap)` on the head.
        z_loss: weight of `mean(logsumexp(logits)^2)` in the training
            objective. Defaults to 0; 1e-4 in PaLM (arXiv 2204.02311).
    """

    activation: str = "gelu"
    position: str = "rope"
    use_bias: bool | str = False
    epsilon: float = 1e-6
    query_scale: float | None = None
    sliding_window: int | None | tuple[int | None, ...] = None
    rope_wavelength: float | tuple[float, ...] = 10000.0
    rope_factor: float | tuple[float, ...] = 1.0
    tie_embeddings: bool = False
    scale_embeddings: bool = False
    output_cap: float | None = None
    z_loss: float = 0.0

    def __post_init__(self):
        check_choice(self.activation, ACTIVATION_KINDS, "activation")
        check_choice(self.position, ("rope", "learned"), "position encoding")
        check_choice(self.use_bias, (False, True, "attention"), "`use_bias`")
        check_number(self.epsilon, "`epsilon`", low=0)
        for field in ("query_scale", "output_cap"):
            if getattr(self, field) is not None:
                check_number(getattr(self, field), f"`{field}`", low=0)
        if self.z_loss != 0:
            check_number(self.z_loss, "`z_loss`", low=0)
        for field in CYCLED:
            value = getattr(self, field)
            if isinstance(value, (list, tuple)):
                if not value:
                    raise ValueError(f"`{field}` is an empty tuple.")
                object.__setattr__(self, field, tuple(value))
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if field != "sliding_window":
                    check_number(each, f"`{field}`", low=0)
                elif each is not None and (type(each) is not int or each < 1):
                    raise ValueError(
                        "`sliding_window` must be an integer, at least 1 (the "
                        f"token itself), or None. Received: {value!r}"
                    )

    def at(self, layer):
        """This architecture with tuples turned into one layer's values."""
        own = {
            field: value[layer % len(value)]
            for field in CYCLED
            if isinstance(value := getattr(self, field), tuple)
        }
        return dataclasses.replace(self, **own)


# Fields of `Architecture` in which layers may differ.
CYCLED = ("sliding_window", "rope_wavelength", "rope_factor")
