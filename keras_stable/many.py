"""Several small runs in one program, each with the numbers it has alone.

A small model leaves most of an accelerator idle, and compiling takes longer
than training it. Runs of one arm, which differ in seed and learning rate
alone, can share both: their states are stacked, and one program trains all.
"""

import collections
import concurrent.futures
import contextlib
import statistics
import time

import keras
import numpy as np

from keras_stable import backend
from keras_stable.alike import batch_of
from keras_stable.alike import check_models
from keras_stable.alike import check_runs
from keras_stable.backend import internals
from keras_stable.budget import Budget
from keras_stable.events import TrainingHalted
from keras_stable.packing import Sample
from keras_stable.packing import unpack
from keras_stable.watch import watch

# What a program without the runs that have ended must save: this many times
# the seconds in which the last one was compiled.
WORTH = 2.0


def train_many(models, data, monitors, vectorised=None):
    """Trains several models in one program, each as `fit` would alone.

    ```
    for each k, at once:
        models[k].fit(data[k], callbacks=[monitors[k]])
    ```

    Weights, optimizer slots, seeds, losses and what the monitors write are
    those of single runs up to the rounding of float32: sums are taken in
    another order. Learning rates (schedules and their length too), seeds,
    batches and numbers of batches may differ; whatever else makes the program
    must be the same.

    A run that its monitor halts ends there, with the weights it has alone;
    the others go on, in a smaller program once half of the runs have ended
    and compiling it takes less time than it saves. A full table is measured
    when one of the runs is due for it, and recorded of those that are. Of
    monitors with `every="auto"` the cost is measured once, for all.

    Nothing is saved before the end: what is killed begins anew.

    Args:
        models: list of K `StableCausalLM`s, compiled, each with an optimizer
            of its own. All of them are in memory, with their slots.
        data: list of K datasets with a length, as `TokenBatches`, or lists of
            batches; one epoch of each is trained on.
        monitors: list of K `StabilityMonitor`s, equal but for `path` and
            `policy`, `"observe"` or `"halt"`. `every=None` is refused.
        vectorised: bool. Whether the program is batched (`vmap`), or loops
            over the runs. Defaults to None: a loop on a CPU, where it is
            faster.

    Returns:
        List of K: the `TrainingHalted` that ended a run, or None.

    Raises:
        ValueError: if the models cannot share a program, and why; on torch,
            on TensorFlow and with a distribution, where processes are the
            way.

    Example:

    >>> def run(rate, seed):
    ...     lm = StableCausalLM.from_size("1m", 256, seed=seed)
    ...     lm.compile(AdamW(rate))
    ...     data = TokenBatches(tokens, 8, 128, seed=seed)
    ...     return lm, data, StabilityMonitor(f"runs/{rate:g}-{seed}")
    >>> runs = [run(rate, 0) for rate in (1e-3, 1e-2)]   # doctest: +SKIP
    >>> halted = train_many(*zip(*runs))                 # doctest: +SKIP
    """
    models, data, monitors = list(models), list(data), list(monitors)
    check_runs(models, data, monitors)
    return _Group(models, data, monitors, vectorised).train()


def losses_of_many(models, data, vectorised=None):
    """The loss of each batch, for several models in one program.

    Args:
        models: list of K `StableCausalLM`s that differ in their weights.
        data: batches, the same for all, as for `evaluate`.
        vectorised: as in `train_many`.

    Returns:
        float64 array (K, batches). Its mean over equally large batches is
        what `evaluate` calls the loss.

    Raises:
        ValueError: as `train_many`.

    Example:

    >>> losses = losses_of_many([lm], batches)  # doctest: +SKIP
    """
    models = list(models)
    check_models(models)
    batches = (batch_of(models[0], data, i) for i in range(len(data)))
    return backend.losses_of_many(models, batches, vectorised)


class _View:
    """What a monitor takes for the `Watch` of its model: a row of the group's.

    Attributes:
        full, shown, measures, layouts: as of `Watch`.
        samples: deque of those that the monitor has not taken yet.
    """

    def __init__(self, group):
        self.full, self.shown = True, {}
        self.asked, self.samples = collections.deque(), collections.deque()
        self._group = group

    @property
    def layouts(self):
        return self._group.watch.layouts

    @property
    def measures(self):
        return self._group.watch.measures

    def executions(self, keep=0):
        self._group.arrive(keep)
        found = [[sample] for sample in self.samples]
        self.samples.clear()
        return found

    def remove(self):
        pass


class _Share:
    """A monitor's part in the one `Budget` of all.

    Left to themselves they would choose intervals that differ by little, and
    the tables of all would be measured at the steps of each.
    """

    def __init__(self, own, budget):
        self.own, self.host = own, 0.0
        self._budget, self._told = budget, False

    @property
    def report(self):
        return self._budget.report

    def full(self, step):
        return self._budget.full(step)

    def tick(self, host):
        self.host = host
        told, self._told = self._told, self.report is not None
        return None if told else self.report

    def close(self):
        """Nothing: that of all is closed after the last of them."""

    def state(self):
        return self._budget.state()

    def restore(self, state):
        self._budget.restore(state)
        self._told = state is not None


class _Group:
    """The runs while they are trained.

    Attributes:
        rows: list of the runs that the program holds, in its order.
        alive: those of them that have not ended.
        watch: `Watch` of the first model, which measures all.
    """

    def __init__(self, models, data, monitors, vectorised):
        self._models, self._data, self._monitors = models, data, monitors
        self._lengths = [len(x) for x in data]
        self._halted = [None] * len(models)
        self._views = [_View(self) for _ in models]
        self.rows = self.alive = list(range(len(models)))
        sample = batch_of(models[0], data[0], 0)
        most = max(self._lengths)
        self._stack = backend.Stack(models, sample, most, vectorised)
        self._arriving = collections.deque()
        self._compiled, self._compiling = set(), 0.0
        self._times = collections.deque(maxlen=16)
        first = monitors[0]
        self._budget = Budget(first.every, first._budget.max_overhead)

    def train(self):
        with contextlib.ExitStack() as undo:
            undo.callback(self._release)
            undo.callback(self._budget.close)
            self._install(undo)
            self._feed = undo.enter_context(
                concurrent.futures.ThreadPoolExecutor(1)
            )
            for run in self.alive:
                self._monitors[run].on_train_begin()
                self._monitors[run].on_epoch_begin(0)
            self._stack.begin()
            batch, ahead = 0, self._prepare(0)
            while self._begin(batch):
                ahead = self._step(batch, ahead)
                batch += 1
        return self._halted

    def _install(self, undo):
        model, first = self._models[0], self._monitors[0]
        undo.callback(self._stack.install())
        self.watch = undo.enter_context(watch(model, **first._what))
        model.make_train_function()
        for monitor, view, run, length in zip(
            self._monitors, self._views, self._models, self._lengths
        ):
            undo.callback(monitor.close)
            begin = _always(view)
            undo.callback(internals.replace(monitor, "_begin_watch", begin))
            if not monitor._budget.fixed:
                monitor._budget = _Share(monitor._budget, self._budget)
                undo.callback(_give_back, monitor)
            monitor.set_params({"epochs": 1, "steps": length})
            monitor.set_model(run)

    # One step after the other.

    def _begin(self, batch):
        """Whether there is another step, once the monitors agree to it."""
        for run in list(self.alive):
            monitor = self._monitors[run]
            try:
                if batch < self._lengths[run]:
                    monitor.on_train_batch_begin(batch)
                else:
                    self._end(run)
                    monitor.on_epoch_end(0, {})
                    monitor.on_train_end()
            except TrainingHalted as halted:
                self._halted[run] = halted
                self._end(run)
        shares = [self._monitors[run]._budget for run in self.alive]
        self._budget.tick(sum(getattr(x, "host", 0.0) for x in shares))
        if not self.alive:
            return False
        left = max(self._lengths[run] for run in self.alive) - batch
        if self._pays_to_shrink(left):
            self._stack.keep([self.rows.index(run) for run in self.alive])
            self.rows, self._compiling = list(self.alive), 0.0
        return True

    def _end(self, run):
        """Gives a model what was learned, at the end of its run."""
        if run in self.alive:
            self.alive = [other for other in self.alive if other != run]
            self._stack.release(self.rows.index(run), self._models[run])

    def _step(self, batch, ahead):
        """Makes a step, and the batches of the next meanwhile."""
        views = [self._views[run] for run in self.alive]
        for view in views:
            view.asked.append(view.full)
        self.watch.full = any(view.full for view in views)
        batches = {**dict.fromkeys(self.rows), **ahead.result()}
        # Rows of runs that have ended are computed, and read by nobody.
        filler = batches[self.alive[0]]
        stacked = [batches[run] or filler for run in self.rows]
        ahead = self._prepare(batch + 1)
        program = (self.watch.full, len(self.rows))
        begin = time.perf_counter()
        self._stack.step(keras.tree.map_structure(_stacked, *stacked))
        seconds = time.perf_counter() - begin
        self._arriving.append((list(self.rows), list(self.alive)))
        if program not in self._compiled:
            self._compiled.add(program)
            self._compiling += seconds
            self._times.clear()
        self._times.append(time.perf_counter())
        return ahead

    def _prepare(self, batch):
        runs = [run for run in self.alive if batch < self._lengths[run]]
        return self._feed.submit(
            lambda: {
                run: batch_of(self._models[run], self._data[run], batch)
                for run in runs
            }
        )

    def arrive(self, keep):
        """Hands out what was measured, but for the last `keep` steps."""
        for ((full, vectors),) in self.watch.arrays(keep):
            rows, alive = self._arriving.popleft()
            for run in alive:
                view, layout = self._views[run], self.watch.layouts[full]
                sample = unpack(vectors[rows.index(run)], layout, full)
                asked = view.asked.popleft()
                if full and not asked:
                    # Another run was due for a table.
                    sample = Sample(sample.scalars)
                view.samples.append(sample)

    def _pays_to_shrink(self, left):
        """Whether a program without the runs that have ended saves time."""
        if 2 * len(self.alive) > len(self.rows) or len(self._times) < 2:
            return False
        times = np.diff(self._times)
        ended = 1 - len(self.alive) / len(self.rows)
        saved = left * statistics.median(times) * ended
        return saved > WORTH * self._compiling

    def _release(self):
        for run in list(self.alive):
            self._end(run)


def _always(view):
    return lambda model, **what: view


def _stacked(*rows):
    return np.stack([np.asarray(row) for row in rows])


def _give_back(monitor):
    share = monitor._budget
    monitor._budget = share.own
    share.own.restore(share.state())
