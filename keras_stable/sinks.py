"""Where a monitor sends its numbers beside its own records: off by default.

A sink is anything with `write(step, scalars)` and `close()`, which ends each
`fit`: another one may write again.
"""

import importlib
import math

from keras_stable.packing import HEAD_STATISTICS
from keras_stable.packing import STATISTICS
from keras_stable.packing import VARIABLE_STATISTICS

# More series than a dashboard can show, and than a service likes to be sent.
MOST_SERIES = 200


class TensorBoard:
    """Writes TensorBoard event files, without TensorFlow.

    Args:
        path: the log directory.

    Raises:
        ImportError: if the package `tensorboard` is not installed.

    Example:

    >>> sink = TensorBoard("logs/run")            # doctest: +SKIP
    >>> monitor = StabilityMonitor(sinks=[sink])  # doctest: +SKIP
    """

    def __init__(self, path):
        self._package = _package("tensorboard.summary", "tensorboard")
        self._path, self._writer = str(path), None

    def write(self, step, scalars):
        if self._writer is None:
            self._writer = self._package.Writer(self._path)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self):
        """Completes the file; writing again begins another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """Logs to a Weights & Biases run.

    Args:
        run: what `wandb.init()` returned. Defaults to the current run.

    Raises:
        ImportError: if the package `wandb` is not installed.
        ValueError: if there is no run.
    """

    def __init__(self, run=None):
        self._run = run or _package("wandb", "wandb").run
        if self._run is None:
            raise ValueError(
                "There is no Weights & Biases run. Call `wandb.init()` first, "
                "or give what it returned."
            )

    def write(self, step, scalars):
        # Another logger may be ahead: W&B drops steps that go backwards.
        self._run.log({**scalars, "monitor/step": step})

    def close(self):
        """Leaves the run open: it is its owner's to finish."""


def _package(module, name):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This sink needs the package {name}: pip install {name}"
        ) from error


def flatten(sample, layout):
    """A full `Sample` as `{series: number}`, e.g. `"block_0/fc1/rms"`."""
    scalars = {
        f"monitor/{name}": value
        for name, value in sample.scalars.items()
        if isinstance(value, float)
    }
    parts = (
        (layout.tensors, STATISTICS, sample.tensors),
        (layout.variables, VARIABLE_STATISTICS, sample.variables),
        (layout.heads, HEAD_STATISTICS, [h.max(-1) for h in sample.heads]),
    )
    layers = {
        f"{name}/{statistic}": float(value)
        for names, statistics, table in parts
        for name, row in zip(names, table)
        for statistic, value in zip(statistics, row)
    }
    return scalars, layers


class Summary:
    """What an epoch adds to `History`: a few numbers, however many its steps.

    Largest `verdict` and `max_logit`, mean of `gradient_norm`; of those that
    are finite.
    """

    def __init__(self):
        self._found = {}

    def add(self, scalars):
        """Takes in a step."""
        for name in ("verdict", "max_logit", "gradient_norm"):
            value = float(scalars.get(name, math.nan))
            if math.isfinite(value):
                count, total, most = self._found.get(name, (0, 0.0, value))
                found = count + 1, total + value, max(most, value)
                self._found[name] = found

    def logs(self):
        """Dictionary of floats, of what there was."""
        return {
            name: total / count if name == "gradient_norm" else most
            for name, (count, total, most) in self._found.items()
        }


class Selection:
    """Keeps a dashboard readable: at most so many series, the worst layers'.

    A layer's series is chosen when it has grown most since it was first seen,
    and stays chosen; numbers of the whole step always are.
    """

    def __init__(self, most=MOST_SERIES):
        self.most = most
        self.chosen, self.first = set(), {}

    def __call__(self, flat):
        scalars, layers = flat
        for name, value in layers.items():
            self.first.setdefault(name, abs(value))

        def growth(name):
            value = abs(layers[name])
            # Not finite is worse than any growth.
            if not math.isfinite(value):
                return math.inf
            return value / max(self.first[name], 1e-12)

        free = self.most - len(scalars) - len(self.chosen)
        new = sorted(set(layers) - self.chosen, key=lambda n: (-growth(n), n))
        self.chosen.update(new[: max(free, 0)])
        return {**scalars, **{n: layers[n] for n in layers if n in self.chosen}}
