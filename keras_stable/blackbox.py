"""The steps before an event, kept so that they can be looked at after it."""

import collections
import dataclasses

import numpy as np

from keras_stable.packing import HEAD_STATISTICS
from keras_stable.packing import STATISTICS
from keras_stable.packing import VARIABLE_STATISTICS


def describe(layout):
    """A `Layout` as a dictionary, with the names of the tables' columns."""
    return {
        **dataclasses.asdict(layout),
        "tensor_statistics": STATISTICS,
        "head_statistics": HEAD_STATISTICS,
        "variable_statistics": VARIABLE_STATISTICS,
    }


class BlackBox:
    """The last 64 steps: where they were in the data, and all they measured.

    Args:
        length: int. Steps kept.
    """

    def __init__(self, length=64):
        self.length = length
        self._steps = collections.deque(maxlen=length)
        self._last = {}

    def append(self, step, epoch, batch, sample):
        self._steps.append((step, epoch, batch, sample))

    def due(self, event):
        """Whether an event is worth a box: the last of its kind is over."""
        before = self._last.get(event.detector, -self.length)
        if event.step - before < self.length:
            return False
        self._last[event.detector] = event.step
        return True

    def state(self):
        """The last step with a box of each kind; the steps are not kept."""
        return dict(self._last)

    def restore(self, state):
        self._last = dict(state)

    def arrays(self, layout):
        """All of it as arrays by name, ready for `np.savez`.

        `step`, `epoch`, `batch` and each scalar: (steps,); of the steps with
        full tables, if any: `table_step`, `tensors` (tables, L, 6),
        `variables` (tables, V, 4), `heads/NAME` (tables, 3, N), and the names
        of rows and columns.
        """
        steps, epochs, batches, samples = zip(*self._steps)
        arrays = {"step": steps, "epoch": epochs, "batch": batches}
        for name, value in samples[-1].scalars.items():
            if isinstance(value, float):
                arrays[name] = [s.scalars[name] for s in samples]
        tables = [
            (step, sample)
            for step, sample in zip(steps, samples)
            if sample.tensors is not None
        ]
        if tables:
            arrays["table_step"] = [step for step, _ in tables]
            arrays["tensors"] = [s.tensors for _, s in tables]
            arrays["variables"] = [s.variables for _, s in tables]
            arrays["tensor_names"] = layout.tensors
            arrays["variable_names"] = layout.variables
            arrays["tensor_statistics"] = STATISTICS
            arrays["variable_statistics"] = VARIABLE_STATISTICS
            arrays["head_statistics"] = HEAD_STATISTICS
            for i, name in enumerate(layout.heads):
                arrays[f"heads/{name}"] = [s.heads[i] for _, s in tables]
        return {name: np.array(value) for name, value in arrays.items()}
