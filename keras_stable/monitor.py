"""The callback: telemetry, detectors, verdict, action, records."""

import collections
import contextlib
import math
import time
from pathlib import Path

import keras

from keras_stable import backend
from keras_stable import memory
from keras_stable.backend import internals
from keras_stable.blackbox import BlackBox
from keras_stable.budget import Budget
from keras_stable.choices import check_choice
from keras_stable.choices import check_expression
from keras_stable.choices import check_number
from keras_stable.chronicle import FATAL
from keras_stable.chronicle import Chronicle
from keras_stable.diagnosis import Diagnosis
from keras_stable.events import Event
from keras_stable.events import TrainingHalted
from keras_stable.events import Verdict
from keras_stable.records import cut
from keras_stable.reported import ReportedLosses
from keras_stable.rescue import Rescue
from keras_stable.rescuer import Rescuer
from keras_stable.selftest import selftest
from keras_stable.sinks import Summary
from keras_stable.watch import watch as watch_model

POLICIES = ("observe", "halt", "guard", "recover")
AT_WORK = "_stability_monitor"  # Attribute of a model while it is in `fit`.
ALERT = 200  # Steps with full tables after a warning.
SAVE_SECONDS = 30  # Between savings of the detectors' state.


class StabilityMonitor(keras.callbacks.Callback):
    """Measures every linear layer as `fit` trains, and reaches a verdict.

    Works for any Keras model with any optimizer, inside the compiled step.
    Every step it reads the true loss, norms of gradient and update, counts of
    non-finite numbers and the largest attention logit, one step late; every
    `every` steps the full table of `watch`. What it finds goes to `path`
    (see `records`), to the progress bar and to `History`: `verdict` as a
    number, see `Verdict`; `gradient_norm` and, with attention, `max_logit`.

    Training is not changed: float32 weights on CPU are bit-equal with the
    monitor and without.

    Put it first among the callbacks, so that a lost run is stopped before
    others save it at the end of an epoch. `policy="halt"` raises
    `TrainingHalted` instead of setting `stop_training`, after which Keras's
    own callbacks would save the broken weights and delete their backups.

    Args:
        path: directory for the records, or None for none. An existing one is
            continued.
        policy: `"observe"` records; `"halt"` raises `TrainingHalted` at most
            two steps after the verdict is `COLLAPSED`, `LEVEL_SHIFT`,
            `DIVERGED` or `NONFINITE`; `"guard"` also leaves single bad
            updates out, and lowers the learning rate for a while if they are
            many; `"recover"` also goes back to a good state instead of
            halting, a few times: see `Rescue`. Defaults to `"observe"`.
        every: steps between full tables. `"auto"` measures what one costs,
            keeps to `max_overhead`, and after a warning looks at 200 steps in
            a row, once in 1000 steps. An integer is kept to. None measures
            nothing: the compiled program is the plain one, and only the loss
            is judged. In several processes of torch and under `tf.distribute`
            "auto" has scalars of the whole batch alone; integers are refused.
        watch, exclude: regular expressions for layers: see `watch`.
        inputs: bool. Whether inputs of layers are measured too.
        max_overhead: share of a step's time that tables may cost, on average.
        warmup_steps: int, 64 at least. Steps in which losses may rise: see
            `Judge`. Defaults to those of the learning rate's schedule.
        rescue: `Rescue`, the numbers of the last two policies.
        data: for `"recover"`, the batches that `fit` is given, if they can be
            had by their number: see `Feed`. None: after a rewind `fit` goes
            on with the batches that come next; none of those since is
            trained on again, and the guard leaves out what is passed over.
        autopsy: bool. Whether the cause is looked for, when a run is lost, by
            training on the same batches again: see `Cause`. Needs `data`.
        sinks: `TensorBoard`, `WeightsAndBiases` or others with `write(step,
            scalars)` and `close()`.
        on_event: function of an `Event`, called as each is found.
        verbose: 1 prints events, one a detector in 64 steps; 0 nothing.

    Attributes:
        verdict, worst: `Verdict`, now and the most severe so far.
        events: list of all `Event`s.
        step: int, the last that was looked at, from 1.
        last: dictionary, the numbers of that step.
        overhead: what it measured of its own cost, or None; see `Budget`.
        position: number of the next batch in the data.
        undone: steps of `fit` that rewinds took back: `fit` must be called
            again, with the batches from `position` on, to make them good.

    Raises:
        ValueError: at construction, for a value out of range.
        OSError: in `fit` before the first step, if `path` cannot be written.

    >>> monitor = StabilityMonitor("runs/a", "halt")  # doctest: +SKIP
    >>> model.fit(x, y, callbacks=[monitor])          # doctest: +SKIP
    """

    # Its work is done in the main thread, before each step; what Keras may
    # call from other threads only takes a number down.
    async_safe = True
    selftest = staticmethod(selftest)
    # Another takes its place where one program trains several models.
    _begin_watch = staticmethod(watch_model)

    def __init__(
        self,
        path=None,
        policy="observe",
        every="auto",
        watch=None,
        exclude=None,
        inputs=False,
        max_overhead=0.02,
        warmup_steps=None,
        rescue=Rescue(),
        data=None,
        autopsy=False,
        sinks=(),
        on_event=None,
        verbose=1,
    ):
        super().__init__()
        check_choice(policy, POLICIES, "policy")
        whole = isinstance(every, int) and not isinstance(every, bool)
        if every not in ("auto", None) and not (whole and every > 0):
            raise ValueError(
                "`every` must be a positive integer, 'auto', or None for no "
                f"telemetry. Received: {every!r}"
            )
        check_number(max_overhead, "`max_overhead`", low=0)
        if warmup_steps is not None:
            check_number(warmup_steps, "`warmup_steps`", low=-1)
        for name, text in (("watch", watch), ("exclude", exclude)):
            check_expression(text, name)
        self.path, self.policy, self.every = path, policy, every
        self._chronicle, self.verbose = Chronicle(sinks, on_event), verbose
        self._what = {"include": watch, "exclude": exclude, "inputs": inputs}
        self._rescuer = Rescuer.of(policy, rescue, data, autopsy, every)
        if self._rescuer is not None:
            self._what["guard"] = self._rescuer.guard
        self._budget, self._tables = Budget(every, max_overhead), False
        self._watch = self._diagnosis = self._names = None
        self._places = None  # Of steps in the data, while `fit` goes on.
        # Full tables until one step; no more for a warning until another.
        self._alert = self._calm = 0
        self._lag = 0  # Of the optimizer's count: what loss scaling skipped.
        self._reported, self._warmup_steps = ReportedLosses(), warmup_steps
        self.step, self.last = 0, {}
        self.worst = self._kept = Verdict.OK
        self._lost = self._state = None  # Event for which it must go back.
        self._place, self._offsets, self._saved = (0, -1), {}, -math.inf

    @property
    def verdict(self):
        return self._diagnosis.verdict if self._diagnosis else self._kept

    @property
    def events(self):
        return self._chronicle.events

    @property
    def overhead(self):
        return self._budget.report

    @property
    def position(self):
        return self.place_of(self.step + 1)

    def place_of(self, step):
        """Number of the batch of a step, the next one's at most."""
        return self._rescuer.place_of(step) if self._rescuer else step - 1

    @property
    def undone(self):
        return self._rescuer.undone if self._rescuer else 0

    def on_train_begin(self, logs=None):
        model = self.model
        for monitor in (self, vars(model).get(AT_WORK, self)):
            if monitor._places is not None:  # Left by an interrupted `fit`.
                with contextlib.suppress(TrainingHalted, ValueError):
                    monitor._take(keep=0)
                monitor.close()
        self._release = internals.replace(model, AT_WORK, self)
        self._size = getattr(model, "steps_per_execution", 1)
        self._places, self._layout = collections.deque(), None
        self._begun = self._lost = None
        with self._ending_on_error():
            if self.path is not None and backend.is_writer():
                self._chronicle.open(self.path)
            if self.every is not None:
                part = self.every == "auto" and backend.sees_a_part(model)
                what = {**self._what, "tables": not part}
                self._watch = self._begin_watch(model, **what)
                self._tables = not part
                model.make_train_function()

    def on_epoch_begin(self, epoch, logs=None):
        if self._begun is None:
            with self._ending_on_error():
                memory.begin(self)
                if not self._tables:
                    self._diagnose(None)
                if self._rescuer is not None:
                    self._rescuer.begin(self._model, self._begun, self.path)
        # A resumed `fit` goes on within an epoch.
        self._offset = self._offsets.pop(epoch, 0)
        self._epoch = epoch
        self._reported.begin(self.params.get("steps"), self._size)
        self._summary = Summary()

    def on_train_batch_begin(self, batch, logs=None):
        with self._ending_on_error():
            host = self._take(keep=1)
            if self._rescuer is not None:
                host += self._rescuer.before_step(self)
            if self._tables:
                steps = range(self._begun, self._begun + self._size)
                full = any(map(self._budget.full, steps))
                # Detectors are made of what the first table holds.
                full = full or not (self._layout or self._places)
                self._watch.full = full or self._begun < self._alert
            if self._watch is not None:
                self._watch.shown = {"verdict": float(self.verdict)}
        self._places.append((self._epoch, self._offset + batch))
        self._begun += self._size
        report = self._budget.tick(host) if self._tables else None
        if report is not None:
            self._chronicle.write("overhead", step=self.step, **report)

    def on_train_batch_end(self, batch, logs=None):
        if self.every is None:
            self._reported.take(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        with self._ending_on_error():
            self._take(keep=0)
            if self._lost is not None:
                self._rescuer.save(self)
            self._begun = self.step  # The last execution may be a part.
            if self._rescuer is not None:
                self._rescuer.settle(self.step)
            self._lag = self.step - internals.batches_seen(self.model.optimizer)
            if logs is not None:
                logs.update(self._summary.logs())
            if time.monotonic() - self._saved > SAVE_SECONDS:
                # A file of some 100 KB: not after each of many short epochs.
                self._save()

    def on_train_end(self, logs=None):
        self._save()
        self.close()

    def get_state(self, step):
        """All that it remembers after a step of `fit`, as JSON's values."""
        with self._ending_on_error():
            end = time.monotonic() + 60  # Logs may be on their way.
            while self.step < step and time.monotonic() < end:
                self._take(keep=0)
        return memory.state_of(self)

    def set_state(self, state):
        """Lets the next `fit` go on from a state; later records are deleted."""
        self._state = state
        memory.announce(self, state)
        if self.path is not None and backend.is_writer():
            cut(self.path, state["step"], state["bytes"])

    @contextlib.contextmanager
    def _ending_on_error(self):
        """Leaves the model as it was, also if the user interrupts."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _take(self, keep):
        """Takes in steps that are done; returns seconds spent, not waited."""
        begin = time.perf_counter()
        if self._watch is None:
            executions, waited = self._reported.executions(), 0.0
        else:
            executions = self._watch.executions(keep)
            waited = time.perf_counter() - begin
        for samples in executions:
            epoch, batch = self._places.popleft()
            for i, sample in enumerate(samples):
                self.step += 1
                if sample is not None:
                    self._look(self.step, epoch, batch + i, sample)
        if self._watch is not None and not self._watch.measures:
            raise ValueError(
                f"{type(self._model).__name__} has a `train_step` of its own "
                "that does not call `compute_loss`, `optimizer.apply` and "
                "`compute_metrics`: there is nothing to measure. Monitor with "
                "`every=None`, which judges the loss alone."
            )
        return time.perf_counter() - begin - waited

    def _look(self, step, epoch, batch, sample):
        full = sample.tensors is not None
        if full and self._watch.layouts[True] != self._layout:
            self._layout = self._watch.layouts[True]
            self._chronicle.layout(self._layout)
            self._diagnose(self._layout)
        scalars = self.last = sample.scalars
        self._place = epoch, batch
        self._chronicle.step(step, epoch, batch, sample)
        if self._lost is not None:
            return  # It will be taken back.
        before = self.verdict
        events = self._diagnosis.update(step, sample)
        if self._rescuer is not None:
            events += self._rescuer.look(step, scalars, self._diagnosis)
        self._summary.add({**scalars, "verdict": float(self.verdict)})
        self.worst = max(self.worst, self.verdict)
        for event in self._tell(events):
            self._attend(event)
        if self.verdict != before:
            self._tell_verdict(step)
        if full:
            self._chronicle.send(step, sample, self._layout)
        if self.policy != "observe" and self.verdict.lost:
            # The first of the last step that has any; none if it was lost when
            # another monitor saved it. This one does not: the last is better.
            saved = Event(step, step, "verdict", "loss", math.nan, "as saved")
            fatal = [e for e in self.events if e.detector in FATAL] or [saved]
            self._lost = next(e for e in fatal if e.step == fatal[-1].step)
            if self._rescuer is None:
                self._halt()

    def _halt(self):
        lost, file = self._lost, self._chronicle.file
        raise TrainingHalted(self.verdict, lost.step, lost, file)

    def _begin_anew(self, state):
        """Detectors as they were; None: as if nothing had been seen."""
        if state is None:
            self._names, self._resumed = None, 0
            self._diagnose(self._layout)
        else:
            self._diagnosis.restore(state)

    def _tell(self, events):
        about = self.verdict, self._layout, self.verbose
        return self._chronicle.found(events, *about)

    def _tell_verdict(self, step):
        self._chronicle.write("verdict", step=step, verdict=str(self.verdict))

    def _diagnose(self, layout):
        """Detectors for this layout: those at work, or saved ones, or new."""
        names = layout and (layout.tensors, layout.heads, layout.variables)
        if self._diagnosis is not None and names == self._names:
            return
        self._names = names
        warmup = self._warmup_steps
        if warmup is None:
            warmup = internals.warmup_steps(self._model.optimizer)
        self._diagnosis = Diagnosis(layout, warmup)
        self._chronicle.box = BlackBox()
        file = self.path and Path(self.path) / "monitor.json"
        if file and file.exists() and self._resumed:
            self._diagnosis.load(file, self._resumed)

    def _attend(self, event):
        """Looks closely for a while, if it may."""
        fatal = event.detector in FATAL
        if self.every == "auto" and (fatal or event.step >= self._calm):
            # A run that warns all the time is not looked at all the time.
            self._alert = self._begun + ALERT
            self._calm = event.step + 5 * ALERT

    def _save(self):
        if self._chronicle.position is not None and self._diagnosis is not None:
            file = Path(self.path) / "monitor.json"
            self._diagnosis.save(file, self.step)
            self._saved = time.monotonic()

    def close(self):
        """Leaves the model as it was, and the files complete."""
        if self._places is not None:
            self._chronicle.close_sinks()
            self._places = None
            self._release()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._budget.close()
        self._chronicle.close()
