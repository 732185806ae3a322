"""One method as a value: `Variant`.

It is a setting of the residual equation

    x <- S(a * x + g * B(f(P(x))))

and of the few switches between the attention projections and the softmax: it
names those choices and nothing else. Standard library only.
"""

import dataclasses
import json
from dataclasses import dataclass

from keras_stable.choices import NORM_KINDS
from keras_stable.choices import Architecture
from keras_stable.choices import Clip
from keras_stable.choices import Entropy
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
        paper: arXiv number of the source; empty if it has none.
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

        >>> get_variant("soft_cap").replace(cap=30.0).name
        'soft_cap+cap=30.0'
        >>> get_variant("layer_scale").replace(gain=Learned(0.1)).mlp.gain.init
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

    def at(self, num_layers, layer):
        """This variant for one layer of several: formulas become numbers."""
        return dataclasses.replace(
            self,
            attention=self.attention.at(num_layers),
            mlp=self.mlp.at(num_layers),
            softmax=self.softmax.at(num_layers),
            architecture=self.architecture.at(layer),
        )

    def to_dict(self):
        """Nested dictionary of JSON values; `get` reads it back."""
        # Through JSON, so that tuples are lists here already.
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, config):
        """The inverse of `to_dict`.

        Raises:
            ValueError: for a name that is no field, or a value that is not
                allowed.
            TypeError: for a value of another type, or without a name.
        """
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
_VALUES = {**_PARTS, "gain": Learned, "clip": Clip, "entropy": Entropy}


def _names(cls):
    return tuple(field.name for field in dataclasses.fields(cls))


_FIELDS = _names(Variant)


def _short(value):
    if not dataclasses.is_dataclass(value):
        return str(value)
    words = (f"{k}:{v}" for k, v in vars(value).items() if v is not None)
    return "(" + ",".join(words) + ")"


def _decode(cls, config):
    if not isinstance(config, dict):
        raise TypeError(
            f"{cls.__name__} is made of a dictionary. Received: {config!r}"
        )
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
