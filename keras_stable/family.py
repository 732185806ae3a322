"""One shipped architecture as a value: `Family`.

It says how `transformers` writes the configurations of a model down, and reads
and writes them. No array is touched here.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field

from keras_stable import variants
from keras_stable.choices import CYCLED
from keras_stable.config_keys import refuse
from keras_stable.config_keys import whole
from keras_stable.layer_kinds import cycle
from keras_stable.layer_kinds import expand
from keras_stable.layer_kinds import read_rotary
from keras_stable.layer_kinds import read_windows
from keras_stable.layer_kinds import write_rotary
from keras_stable.layer_kinds import write_windows

# Keys that change the function, unless a family reads them or they have one
# of these values. Other unknown keys change nothing in `transformers` either.
FOREIGN = {
    "add_cross_attention": (None, False),
    "attn_logit_softcapping": (None,),
    "auto_map": (None, {}),
    "clip_qkv": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (None, False),
    "partial_rotary_factor": (None, 1),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "sliding_window": (None,),
    "use_bidirectional_attention": (None, False),
}
# What logits do not depend on: a configuration says nothing of it.
TRAINING_ONLY = {"name", "paper", "note", "doubts", "entropy", "z_loss"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one shipped architecture is written down in `transformers`.

    Args:
        name: of its entry in `VARIANTS`.
        model_type, architecture: what its configurations call it.
        sizes: our sizes and their keys.
        nulls: functions that give a size, by its key, from those before it
            in `sizes` where the configuration has null.
        aliases: other names of keys, which `transformers` takes too, so that
            they cannot be passed over.
        keys: their keys that are one field of `Variant` each.
        defaults: what absent keys mean: the defaults of its configuration
            class.
        norms: names of the norms of a block, ours and theirs.
        dropouts: keys of dropout rates that must agree. A single one is
            attention's, which must be 0.
        slides: of `layer_kinds.read_windows`.
        wavelengths: of `layer_kinds.read_rotary`; empty without rotary
            positions.
        whole_heads: whether D must be a multiple of the number of heads.
    """

    name: str
    model_type: str
    architecture: str
    sizes: dict
    keys: dict
    defaults: dict
    norms: dict
    nulls: dict = field(default_factory=dict)
    aliases: dict = field(default_factory=dict)
    dropouts: tuple[str, ...] = ("attention_dropout",)
    slides: Callable | None = None
    wavelengths: tuple[float, ...] = (10_000.0,)
    whole_heads: bool = False

    def read(self, config, dropout=None):
        """Sizes, `Variant` and dropout of a configuration.

        Args:
            config: dictionary, as of `config.json` or `config.to_dict()`.
            dropout: float, instead of the configuration's.

        Returns:
            Tuple of a dictionary of `StableBackbone`'s sizes, the named
            variant with what differs replaced, and a float.

        Raises:
            ValueError: for a key that is missing, malformed, or changes the
                function in a way that `Variant` cannot express.
        """
        config = {**self.defaults, **config}
        for key, harmless in FOREIGN.items():
            known = key in self.keys
            known = known or (self.slides and key == "sliding_window")
            if not known and config.get(key) not in harmless:
                words = " or ".join(map(repr, harmless))
                raise refuse(key, config[key], f"absent or {words}")
        for alias, key in self.aliases.items():
            if config.get(alias) not in (None, config[key]):
                what = f"absent, `{key}` instead of it"
                raise refuse(alias, config[alias], what)
        sizes = self._read_sizes(config)
        num_layers = sizes["num_layers"]
        config |= {"head_dim": sizes["head_dim"]}
        fields = {
            key.field: key.read(config, name) for name, key in self.keys.items()
        }
        kinds, windows = read_windows(config, num_layers, self.slides)
        fields["sliding_window"] = windows
        if self.wavelengths:
            fields |= read_rotary(config, kinds, self.wavelengths)
        named = variants.get(self.name)
        same = choices(named, num_layers)
        fields = {
            name: value
            for name, value in fields.items()
            if choices(named.replace(**{name: value}), num_layers) != same
        }
        variant = named.replace(**fields) if fields else named
        return sizes, variant, self._read_dropout(config, dropout)

    def _read_sizes(self, config):
        sizes = {}
        for ours, key in self.sizes.items():
            if config.get(key) is None and key in self.nulls:
                config = {**config, key: self.nulls[key](sizes)}
            # More layers than any model has would make long lists here.
            most = 10_000 if ours == "num_layers" else 2**31 - 1
            sizes[ours] = whole(config, key, most)
        N, D = sizes["num_heads"], sizes["hidden_dim"]
        if D % N and (self.whole_heads or "head_dim" not in sizes):
            what = f"a multiple of `{self.sizes['num_heads']}`, {N}"
            raise refuse(self.sizes["hidden_dim"], D, what)
        sizes.setdefault("num_key_value_heads", N)
        sizes.setdefault("head_dim", D // N)
        K, H = sizes["num_key_value_heads"], sizes["head_dim"]
        if N % K:
            what = f"a multiple of `num_key_value_heads`, {K}"
            raise refuse(self.sizes["num_heads"], N, what)
        if self.wavelengths and H % 2:
            raise refuse("head_dim", H, "even, for rotary positions")
        return sizes

    def _read_dropout(self, config, dropout):
        if dropout is not None:
            return dropout
        rates = {key: config.get(key) or 0.0 for key in self.dropouts}
        one = rates[self.dropouts[0]]
        same = all(rate == one for rate in rates.values())
        shared = same and (len(rates) > 1 or one == 0)
        if not shared or type(one) not in (int, float) or not 0 <= one < 1:
            raise ValueError(
                "Ours is one dropout rate in [0, 1), of embeddings, attention "
                "and branches alike; pass dropout=0.0, or another rate, "
                f"instead of the configuration's. Received: {rates}"
            )
        return float(one)

    def write(self, sizes, variant, dropout=0.0):
        """The configuration of a model, a dictionary of JSON values.

        What it cannot say is not in it: see `differences`. Dropout is in it
        for GPT-2 only.
        """
        config = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            **{key: sizes[ours] for ours, key in self.sizes.items()},
        }
        architecture, num_layers = variant.architecture, sizes["num_layers"]
        for name, key in self.keys.items():
            owner = variant.softmax if key.field == "cap" else architecture
            config[name] = key.write(getattr(owner, key.field), sizes)
        rate = dropout if len(self.dropouts) > 1 else 0.0
        config |= dict.fromkeys(self.dropouts, rate)
        windows = write_windows(architecture.sliding_window, num_layers)
        if self.slides:
            config |= windows
        if "use_sliding_window" in self.defaults:
            used = windows["sliding_window"] is not None
            config["use_sliding_window"] = used
        if self.wavelengths:
            kinds = windows["layer_types"]
            config |= write_rotary(architecture, kinds, self.wavelengths)
        return config

    def differences(self, sizes, variant):
        """What of a model this family cannot say, a list of texts."""
        try:
            found = self.read(self.write(sizes, variant))
        except (ValueError, OverflowError) as error:
            return [str(error)]
        num_layers = sizes["num_layers"]
        ours = {**sizes, **choices(variant, num_layers)}
        theirs = {**found[0], **choices(found[1], num_layers)}
        return [
            f"{key}={ours.get(key)!r} (there {theirs.get(key)!r})"
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
        ]


def choices(variant, num_layers):
    """What a model's function depends on, as `{path: value}`."""
    cycled = {
        name: cycle(expand(getattr(variant.architecture, name), num_layers))
        for name in CYCLED
    }
    if variant.architecture.position != "rope":
        cycled |= {"rope_wavelength": None, "rope_factor": None}
    flat = {}
    for name, part in vars(variant).items():
        inner = {"": part}
        if dataclasses.is_dataclass(part):
            inner = vars(part)
        if name == "architecture":
            inner = {**inner, **cycled}
        for leaf, value in inner.items():
            if name not in TRAINING_ONLY and leaf not in TRAINING_ONLY:
                flat[f"{name}.{leaf}".rstrip(".")] = value
    return flat
