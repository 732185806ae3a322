"""How much more a layer puts out than it would at a tenth of the rate.

arXiv 2410.16682 compares output norms of a diverging run with those of one
that converges, and finds QKV, Proj and FC2 more than twice as large by step
1000, FC1 not.
"""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np

from keras_stable.choices import check_choice
from keras_stable.health import Health
from keras_stable.health import read_health

# The paper's names for the linear layers of a block, and ours.
GROUPS = {
    "qkv": ("attention/query", "attention/key", "attention/value"),
    "proj": ("attention/output",),
    "fc1": ("mlp/fc1",),
    "fc2": ("mlp/fc2",),
}
_BLOCK = re.compile(r"block_(\d+)/(.+)")


@dataclasses.dataclass(frozen=True)
class OutputGrowth:
    """Output norms of a run over those of another, block by block.

    Attributes:
        step, reference_step: at which they were recorded.
        ratios: `{group: array (blocks,)}`, of `GROUPS`.
    """

    step: int
    reference_step: int
    ratios: dict

    def largest(self):
        """`{group: ratio}` of the block that has grown most."""
        return {k: float(np.max(v)) for k, v in self.ratios.items()}

    def middle(self):
        """`{group: ratio}`, the median over blocks."""
        return {k: float(np.median(v)) for k, v in self.ratios.items()}


def _health(run):
    return run if isinstance(run, Health) else read_health(Path(run))


def output_norms(run, step=None, statistic="l2"):
    """Norms of what the linear layers of all blocks put out, at one step.

    `"l2"` is the mean over tokens of a token's norm, as in the paper; that of
    "qkv" is of query, key and value together, `sqrt(q^2 + k^2 + v^2)`.

    Args:
        run: path of a run directory, or its `Health`.
        step: the nearest recorded one is taken. Defaults to the last.
        statistic: name of one. Defaults to `"l2"`.

    Returns:
        Tuple of the step and `{group: array (blocks,)}`, see `GROUPS`.

    Raises:
        ValueError: if no tables were recorded, or not of such layers.
    """
    health = _health(run)
    if not health.tables:
        raise ValueError(
            "No tables of layers were recorded, so that nothing is known of "
            "their outputs: run with --every N, of at most as many steps as "
            "there are."
        )
    names = list(health.layout["tensor_statistics"])
    check_choice(statistic, names, "statistic")
    step = max(health.tables) if step is None else step
    # Of two as near, the earlier.
    step = min(sorted(health.tables), key=lambda known: abs(known - step))
    column = health.tables[step]["tensors"][:, names.index(statistic)]
    blocks = {}
    for name, value in zip(health.layout["tensors"], column):
        if found := _BLOCK.fullmatch(name):
            block, layer = int(found[1]), found[2]
            blocks.setdefault(block, {})[layer] = float(value)
    needed = {layer for layers in GROUPS.values() for layer in layers}
    if not blocks or not all(needed <= {*block} for block in blocks.values()):
        raise ValueError(
            "Output norms are of block_0/attention/query and so on. Received "
            f"a record of {', '.join(list(health.layout['tensors'])[:4])}, ..."
        )
    return step, {
        group: np.array(
            [
                math.hypot(*(blocks[i][layer] for layer in layers))
                for i in sorted(blocks)
            ]
        )
        for group, layers in GROUPS.items()
    }


def output_growth(run, reference, step=None, statistic="l2"):
    """Output norms of a run relative to those of a reference.

    ```
    |y_run| / |y_reference|        at the same step, or the nearest recorded
    ```

    The reference is meant to be the same arm with the same seed at a tenth of
    the learning rate, see `reference_of`.

    Args:
        run, reference: paths of run directories, or their `Health`.
        step, statistic: of `output_norms`.

    Returns:
        `OutputGrowth`.

    Raises:
        ValueError: if one has no such tables, or they are of other models.
    """
    step, norms = output_norms(run, step, statistic)
    near, others = output_norms(reference, step, statistic)
    if len(norms["qkv"]) != len(others["qkv"]):
        raise ValueError(
            "The two are models of different depth. Received: "
            f"{len(norms['qkv'])} and {len(others['qkv'])} blocks"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {group: norms[group] / others[group] for group in GROUPS}
    return OutputGrowth(step, near, ratios)


def reference_of(outcome, outcomes, factor=10.0, within=1.5):
    """The outcome of the same label and seed at a tenth of the rate.

    Args:
        outcome: `Outcome`.
        outcomes: `Outcome`s to choose from, stable ones.
        factor: float. Defaults to 10.
        within: float. By how much the rate may differ from that. Defaults to
            1.5, for ladders that do not have it.

    Returns:
        `Outcome`, or None if there is none so near.
    """

    def distance(other):
        rate = outcome.learning_rate / factor
        return abs(math.log(other.learning_rate / rate))

    near = [
        other
        for other in outcomes
        if (other.label, other.seed) == (outcome.label, outcome.seed)
        and other.stable
        and distance(other) <= math.log(within) + 1e-9
    ]
    return min(near, key=distance, default=None)
