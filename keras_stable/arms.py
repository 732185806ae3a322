"""What experiments are made of: `Arm`, `Experiment`, `SETUPS`."""

import dataclasses
import re

from keras_stable.lr_search import Ladder
from keras_stable.variant import Variant
from keras_stable.variants import get

# Not what JSON has no numbers for.
_LABEL = re.compile(r"(?!(nan|inf)$)[A-Za-z0-9][A-Za-z0-9_.+=-]{0,99}")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One method under comparison, at all learning rates and seeds.

    Args:
        label: str, what tables and directories call it: letters, digits and
            any of `_.+=-`.
        variant: name, `Variant` or its dictionary. Defaults to the label.
        flags: dictionary of flags of `recipes/pretrain.py`, names with
            underscores, e.g. `{"beta_2": 0.99}`. They win over the
            experiment's.

    Raises:
        ValueError: for another label, or an unknown variant.

    >>> Arm("soft_cap").variant.softmax.cap
    50.0
    """

    label: str
    variant: Variant | str | dict | None = None
    flags: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.label, str) or not _LABEL.fullmatch(self.label):
            raise ValueError(
                "A label names a directory: letters, digits and any of _.+=-, "
                "a letter or digit first, at most 100; not nan or inf. "
                f"Received: {self.label!r}"
            )
        variant = get(self.variant or self.label)
        object.__setattr__(self, "variant", variant)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Arms that answer one question.

    Args:
        name: str.
        question: str. What is asked, in a sentence or two.
        arms: tuple of `Arm`s.
        rates: learning rates, or a name in `LADDERS`.
        seeds: ints. Defaults to (0,).
        flags: dictionary of flags of all arms.
        why: str. Who asked, or what is compared with what.

    Raises:
        ValueError: for no arms, a label given twice, or rates or seeds that
            `Ladder` refuses.

    Attributes:
        search: the `Ladder` of its rates and seeds.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    rates: tuple[float, ...] | str
    seeds: tuple[int, ...] = (0,)
    flags: dict = dataclasses.field(default_factory=dict)
    why: str = ""

    def __post_init__(self):
        object.__setattr__(self, "arms", tuple(self.arms))
        labels = [arm.label for arm in self.arms]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(
                f"Experiment {self.name!r} needs arms with different labels. "
                f"Received: {labels}"
            )
        ladder = Ladder(self.rates, self.seeds)
        object.__setattr__(self, "rates", ladder.rates)
        object.__setattr__(self, "seeds", ladder.seeds)

    @property
    def search(self):
        return Ladder(self.rates, self.seeds)


# What runs are: flags of `recipes/pretrain.py`. Any experiment can be made in
# any of them; it names the one that it was thought out for.
SETUPS = {
    # 0.6 million parameters: half a minute to two minutes on a CPU core. A
    # short warm-up, or the effect is gone.
    "cpu": {
        **{"num_layers": 3, "num_heads": 4, "hidden_dim": 128},
        **{"sequence_length": 64, "batch_size": 16, "steps": 400},
        **{"warmup_steps": 20, "final": 0.0, "validation_tokens": 65_536},
        **{"weight_decay": 1e-4, "decay": "independent"},
    },
    # 6 layers of width 384: about a minute on a GPU.
    "gpu": {
        **{"size": "10m", "sequence_length": 512, "batch_size": 64},
        **{"steps": 2000, "warmup_steps": 100},
        **{"precision": "mixed_bfloat16"},
    },
    # The paper's 24 blocks of width 1024, on bytes: 300 million parameters.
    "paper": {
        **{"size": "830m", "sequence_length": 512, "batch_size": 32},
        **{"steps": 700, "warmup_steps": 35, "precision": "mixed_bfloat16"},
    },
}
