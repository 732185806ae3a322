"""Saves a run while it trains: what the `Rungs` decides is done here."""

import collections
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

from keras_stable import autopsy
from keras_stable import backend
from keras_stable import json_files
from keras_stable.backend import saving
from keras_stable.backups import Backups
from keras_stable.events import Event
from keras_stable.events import Verdict
from keras_stable.feed import Feed
from keras_stable.guard import Guard
from keras_stable.rescue import WINDOW
from keras_stable.rescue import Rescue
from keras_stable.rescue import Rungs

LEDGER = "skipped.jsonl"


class Prepared(NamedTuple):
    """One step: its place in the data, its limits, and what was found."""

    place: int
    limits: tuple
    found: tuple = (math.nan, math.nan)
    guarded: bool = False


class Rescuer:
    """The guard, the backups and the data of one run.

    Args:
        rescue: `Rescue`.
        recovers: bool. Whether a lost run is rewound.
        data: what `Feed` takes, or None: then nothing is trained on again,
            and what must be passed over is left out by the guard, as it comes.
        autopsy: bool. Whether the cause is looked for.

    Attributes:
        guard: `Guard` of the compiled step.
        place: number of the next batch in the data.
        undone: updates that rewinds took back and `fit` did not make again.
    """

    def __init__(self, rescue, recovers, data, autopsy):
        self.rescue, self.recovers, self.autopsy = rescue, recovers, autopsy
        self.guard, self.rungs = Guard(), Rungs(rescue, recovers)
        self.feed = None if data is None else Feed(data)
        self.model = self.backups = None
        self.place = 0 if self.feed is None else self.feed.position
        self.undone = self._backed_up = 0
        self._dropping = 0  # Places below it are left out.
        self._batches = collections.deque()
        # The last steps, by their numbers.
        self.seen, self._prepared = {}, {}

    @classmethod
    def of(cls, policy, rescue, data, autopsy, every):
        """Of a monitor with these arguments; None if it does not intervene.

        Raises:
            ValueError: for arguments that do not go together.
        """
        if not isinstance(rescue, Rescue):
            raise ValueError(
                "`rescue` must be a `Rescue`, e.g. Rescue(back_off=0.9). "
                f"Received: {rescue!r}"
            )
        intervenes = policy in ("guard", "recover")
        if autopsy and not intervenes:
            raise ValueError(
                "`autopsy=True` tries batches without training on them, which "
                f"takes policy='guard' or 'recover'. Received: {policy!r}"
            )
        if autopsy and data is None:
            raise ValueError(
                "`autopsy=True` trains on batches again: give them as `data`, "
                "see `Feed`."
            )
        if data is not None and policy != "recover" and not autopsy:
            raise ValueError(
                "`data` is for policy='recover' and for `autopsy=True`. "
                f"Received: policy={policy!r}"
            )
        if not intervenes:
            return None
        if every is None:
            raise ValueError(
                f"policy={policy!r} decides inside the compiled step, from its "
                "numbers, and `every=None` measures none: give a number of "
                "steps, or 'auto'."
            )
        return cls(rescue, policy == "recover", data, autopsy)

    def begin(self, model, step, path):
        """In `fit`, before its first step.

        Args:
            model: that trains.
            step: the last that was made.
            path: of the run's directory, or None.
        """
        new, self.model = self.model is not model, model
        self._ledger = path and Path(path) / LEDGER
        if self.feed is not None and backend.replicas() > 1:
            raise ValueError(
                "Under `tf.distribute`, batches cannot be taken from `data`. "
                "Give none: after a rewind `fit` goes on with the batches "
                "that come next."
            )
        if self.feed is not None:
            # Where `fit` begins.
            self.place = getattr(self.feed.data, "first_step", self.place)
            self.feed.seek(self.place)
            if self._ledger and self._ledger.exists():
                self._read()
        if new and (self.recovers or self.autopsy):
            rescue = self.rescue
            self.backups = Backups(model, rescue.directory, rescue.keep)
            # Of a process before: what was after this is another course.
            self.backups.drop(after=step, certified=True)
            self.backups.take(step, self.place, certified=True)
            self._backed_up = step

    def _read(self):
        """Ranges that this run passed over before it was resumed."""
        known = [(r["first"], r["last"]) for r in self.feed.ledger]
        for line in self._ledger.read_text().splitlines():
            record = json_files.parse(line, self._ledger)
            if (record["first"], record["last"]) not in known:
                self.feed.skip(record["first"], record["last"])

    # In a monitor's `fit`.

    def before_step(self, monitor):
        """Before a step is launched: goes back, or copies, or neither.

        Returns:
            The seconds that it took.
        """
        begin, step = time.perf_counter(), monitor._begun
        due = self.is_due(step)
        if due or monitor._lost is not None:
            monitor._take(keep=0)
        if monitor._lost is not None:
            self.save(monitor)
        elif due:
            self.back_up(step, monitor._diagnosis)
        self.prepare(step + 1, monitor._size, monitor._diagnosis)
        monitor._watch.feed = self.next_batch if self.feeds else None
        return time.perf_counter() - begin

    def save(self, monitor):
        """Goes back to a good state, or ends the training.

        Raises:
            TrainingHalted: if there is none, or it went back too often.
        """
        lost = monitor._lost
        if self.autopsy:
            event = self.examine(monitor._watch, monitor.step, lost)
            detail = f"{lost.detail}; {event.detail}"
            monitor._lost = dataclasses.replace(lost, detail=detail)
            monitor._tell([event])
        found = self.rewind(monitor.step, lost.onset)
        if found is None:
            monitor._halt()
        monitor._lost, (event, state) = None, found
        # The steps before it are in the black box until then.
        monitor._tell([event])
        monitor._begin_anew(state)
        monitor._tell_verdict(monitor.step)

    # Before each step.

    @property
    def feeds(self):
        """Whether batches come from the data here, and not from `fit`."""
        # Only then: as long as nothing happens, nothing is different.
        return self.feed is not None and bool(self.feed.ledger)

    def prepare(self, step, size, diagnosis):
        """Before steps number `step` to `step + size - 1` are launched."""
        guard, limits = self.guard, (math.inf, math.inf)
        if diagnosis is not None:
            limits = self.rungs.limits(step, diagnosis.judge)
        for number in range(step, step + size):
            if self.feeds:
                self.place, batch = self.feed.next()
                self._batches.append(batch)
            self._prepared[number] = Prepared(self.place, limits)
            self.place += 1
        guard.loss, guard.gradient_norm = limits
        if self._prepared[step].place < self._dropping:
            guard.loss = -math.inf
        guard.rate = self.rungs.rate(step)

    def settle(self, step):
        """At an epoch's end: a step after it may be prepared in vain."""
        if step + 1 in self._prepared:
            self.place = self._prepared[step + 1].place
            self._prepared.clear()
            self._batches.clear()
            if self.feed is not None:
                self.feed.seek(self.place)

    def next_batch(self):
        return self._batches.popleft()

    def is_due(self, step):
        """Whether the state after a step is to be copied."""
        every = self.rescue.every
        return (
            self.backups is not None
            and step // every > self._backed_up // every
        )

    def back_up(self, step, diagnosis):
        """Copies the state after `step`, which was looked at."""
        self._backed_up = step
        if diagnosis.calm and self.rungs.unwell < step:
            self.backups.take(step, self.place, diagnosis.state())

    # After each step.

    def look(self, step, scalars, diagnosis):
        """Takes in a step; returns its events."""
        one = self._prepared.pop(step)
        found = scalars["loss"], scalars["gradient_norm"]
        guarded = bool(scalars["guarded"])
        self.seen[step] = one._replace(found=found, guarded=guarded)
        self.seen.pop(step - WINDOW, None)
        if one.place < self._dropping:
            self.undone += 1
            return []
        events, lost = self.rungs.update(step, scalars, diagnosis.calm)
        if lost:
            loss = scalars["loss"]
            finite = math.isfinite(loss + scalars["gradient_norm"])
            verdict = Verdict.DIVERGED if finite else Verdict.NONFINITE
            why = "leaving out updates does not help"
            diagnosis.judge.lose(verdict, step, self.rungs.onset, why)
            events += diagnosis.judge.update(step, {})
        if self.backups is not None:
            # Of those that are too new to count, one bad step spoils all.
            if self.rungs.unwell == step:
                self.backups.drop(after=step - self.rescue.certify)
            self.backups.certify(up_to=step - self.rescue.certify)
        return events

    # When all is lost.

    def examine(self, telemetry, step, lost):
        """An `Event` that tells the `Cause` of another."""
        cause, detail = autopsy.examine(self, telemetry, lost.onset)
        detail = f"{cause}: {detail}"
        return Event(step, lost.onset, "autopsy", cause, math.nan, detail)

    def rewind(self, step, onset):
        """Goes back to a good state.

        Args:
            step: the last that was made, and looked at.
            onset: the first step of what is wrong.

        Returns:
            `(event, state of the diagnosis)`, or None: there is nothing left
            but to halt.
        """
        if not self.recovers or not self.rungs.may_rewind(step):
            return None
        backup = self.backups.newest(before=onset - self.rescue.margin)
        backup = self._agreed(backup or self.backups.oldest())
        if backup is None or backup.step >= onset:
            return None
        last = self.seen[onset].place if onset in self.seen else self.place - 1
        first, end = backup.place, last + self.rescue.skip + 1
        if self.feed is None:
            self._dropping = end = max(end, self.place)
        else:
            self.feed.skip(first, end - 1)
            self._record(self.feed.ledger[-1])
            self.feed.seek(end)
            self.place = end
        self.backups.restore(backup)
        self.backups.drop(after=backup.step)
        self._prepared = {}
        self.undone += step - backup.step
        self._backed_up = step
        self.rungs.rewind(step, backup.step)
        detail = (
            f"back to the state after step {backup.step}; batches {first} to "
            f"{end - 1} of the data are passed over"
        )
        value = float(backup.step)
        event = Event(step, onset, "rewind", "weights", value, detail)
        return event, backup.extra

    def _agreed(self, backup):
        """Of several processes none goes back to another state."""
        mine = -1 if backup is None else backup.step
        step, _ = saving.agree_on(lambda: (mine, {}))
        if step != mine:
            raise RuntimeError(
                f"The first process would go back to its copy of step {step}, "
                f"and this one to that of step {mine}: its memory is short."
            )
        return backup

    def _record(self, entry):
        if self._ledger and backend.is_writer():
            with open(self._ledger, "a") as file:
                file.write(json.dumps(entry) + "\n")

    # For a checkpoint.

    def place_of(self, step):
        """Number of the batch of a step that was prepared, or the next."""
        one = self._prepared.get(step) or self.seen.get(step)
        return one.place if one else self.place

    def state(self, step):
        """As it is after a step."""
        return {
            "rungs": self.rungs.state(),
            "place": self.place_of(step + 1),
            "undone": self.undone,
            "dropping": self._dropping,
            "feed": self.feed and self.feed.state(),
        }

    def restore(self, state):
        self.rungs.restore(state["rungs"])
        self.place, self.undone = state["place"], state["undone"]
        self._dropping = state["dropping"]
        if self.feed is not None and state["feed"] is not None:
            self.feed.restore(state["feed"])
            self.feed.seek(self.place)
