"""What the monitor may cost: full tables, and the garbage collector."""

import gc
import math
import statistics
import time

from keras_stable.backend import saving

# Steps of one kind in a row, and of these the ones that are not timed:
# dispatch runs ahead of the device by one, and copies lag by one.
BLOCK, SKIP = 5, 2
ROUNDS = 4
SETTLED = 2 * BLOCK * (1 + ROUNDS)
# Detectors over layers want a sample every few hundred steps; more than one
# in ten steps tells little more.
LEAST, MOST = 10, 500


class Budget:
    """Chooses the interval of full tables so that they cost a given share.

    ```
    cost     = median time of a full step / median time of a light step - 1
    interval = ceil(cost / max_overhead), within [10, 500]
    overhead = max(cost, 0) / interval + time of the monitor on the host
               / median time of a light step
    ```

    It measures in 4 rounds of 5 light and 5 full steps, after the first 10
    steps, in which both programs are compiled. What a light step costs more
    than a plain one is not in it: `recipes/overhead.py` measures that.

    After these steps it also takes what is there from Python's garbage
    collector, until `close`: see `_spare`.

    Args:
        every: int, or `"auto"` for a choice.
        max_overhead: float, a share of the time of a step.
    """

    def __init__(self, every, max_overhead):
        self.every = LEAST if every == "auto" else every
        self.max_overhead = max_overhead
        self.fixed = every != "auto"
        self.report = None
        self._times = {True: [], False: []}
        self._host, self._steps, self._last = [], 0, None
        self._spared = None  # Whether something is; None: not asked yet.

    @property
    def settled(self):
        """Whether there is nothing (more) to measure."""
        return self.fixed or self.report is not None

    def full(self, step):
        """Whether step number `step` measures the full table."""
        if self.settled:
            return step % self.every == 0
        if self._steps < 2 * BLOCK:
            # Both programs are compiled, and the first table is there.
            return self._steps % BLOCK == 0
        return (self._steps // BLOCK) % 2 == 1

    def tick(self, host):
        """To be called before each step, with the monitor's own seconds.

        Returns:
            A report as a dictionary, once, when the interval is chosen.
        """
        now, before = time.perf_counter(), self._last
        self._last = now
        step, self._steps = self._steps, self._steps + 1
        if step >= SETTLED and self._spared is None:
            self._spared = self._spare()
        if self.settled or before is None:
            return None
        # The time since the last tick is that of step - 1.
        place = step - 1
        if place >= 2 * BLOCK and place % BLOCK >= SKIP:
            self._times[(place // BLOCK) % 2 == 1].append(now - before)
            self._host.append(host)
        if step < SETTLED:
            return None
        return self._settle()

    def _spare(self):
        """Lets the collector pass over what lives as long as training.

        It visits all objects from time to time, a million of them where torch
        and a compiler are imported, and the device has nothing to do for half
        a second. The samples of every step make that happen once in 200 steps.
        """
        if not gc.isenabled() or gc.get_freeze_count():
            return False  # The user has seen to it.
        gc.collect()  # What is frozen is not freed, such as an old model.
        gc.freeze()
        return True

    def close(self):
        """Gives the collector back what was taken from it."""
        if self._spared:
            gc.unfreeze()
        self._spared = None

    def state(self):
        """What was measured, None if nothing was yet."""
        return self.report

    def restore(self, state):
        """Goes on with the interval that was chosen."""
        if state is not None and not self.fixed:
            self.report, self.every = state, state["every"]

    def _settle(self):
        full, light = (statistics.median(self._times[k]) for k in (True, False))
        cost = max(full / light - 1, 0.0)
        host = statistics.median(self._host) / light
        every = min(max(math.ceil(cost / self.max_overhead), LEAST), MOST)
        # Processes of one model must measure in the same steps.
        self.every, _ = saving.agree_on(lambda: (every, {}))
        self.report = {
            "light_step_seconds": light,
            "full_step_seconds": full,
            "host_share": host,
            "every": self.every,
            "overhead": cost / self.every + host,
        }
        return self.report
