"""Losses of single steps from what Keras reports, where nothing is measured."""

import math
import threading

from keras_stable.packing import Sample


class ReportedLosses:
    """The logs of batches, taken in any order, as losses of steps.

    Of several steps in one execution it is the last one's or their mean.
    """

    def __init__(self):
        self._logs, self._lock = {}, threading.Lock()
        self.begin(None, 1)

    def begin(self, steps, size):
        """Begins an epoch of so many steps, None if that is not known.

        Of them `size` are in one execution, but for the last.
        """
        self._most, self._size = steps or math.inf, size
        self._last = (0, 0.0)

    def take(self, batch, logs):
        # Perhaps in another thread, and not in the order of batches.
        with self._lock:
            self._logs[batch] = dict(logs)

    def executions(self):
        """A list of samples for each execution; None for a step unknown.

        One whose logs came before those of an earlier one waits for it.
        """
        executions = []
        with self._lock:
            batches = sorted(self._logs)
        for batch in batches:
            before, mean = self._last
            if batch - before >= self._size:
                break
            with self._lock:
                logs = self._logs.pop(batch)
            # The last of several in one execution may not be there.
            count = min(batch + 1, self._most)
            loss = float(logs["loss"])
            self._last = (count, loss)
            if "batch_loss" in logs:
                loss = float(logs["batch_loss"])
            elif math.isfinite(loss):
                # `loss` is the mean since the epoch began.
                loss = (count * loss - before * mean) / (count - before)
            unknown = [None] * (count - before - 1)
            executions.append([*unknown, Sample({"loss": loss})])
        return executions
