"""What a monitor tells of a run: to files, sinks, a function, the terminal."""

import collections
import dataclasses

from keras_stable.blackbox import BlackBox
from keras_stable.blackbox import describe
from keras_stable.health import HealthWriter
from keras_stable.records import SCHEMA
from keras_stable.sinks import Selection
from keras_stable.sinks import flatten

FATAL = ("verdict", "nonfinite")  # Detectors whose events end a run.
TABLES = ("tensors", "heads", "variables")


class Chronicle:
    """All that happened, as it is told.

    Args:
        sinks, on_event: as `StabilityMonitor` has them.

    Attributes:
        events: list of all `Event`s.
        box: `BlackBox` of the last steps.
        file: path of the last black box that was written, or None.
    """

    def __init__(self, sinks, on_event):
        self.sinks, self.on_event = sinks, on_event
        self.events, self.box, self.file = [], BlackBox(), None
        self._selection, self._writer = Selection(), None

    def open(self, path):
        """Opens `health.jsonl` in a directory."""
        self._writer = HealthWriter(path)

    @property
    def position(self):
        """How many bytes `health.jsonl` has; None where there is none."""
        return self._writer and self._writer.position()

    def write(self, kind, **entries):
        if self._writer is not None:
            self._writer.write(kind, **entries)

    def layout(self, layout):
        self.write("layout", schema=SCHEMA, **describe(layout))

    def step(self, step, epoch, batch, sample):
        self.box.append(step, epoch, batch, sample)
        scalars = sample.scalars
        self.write("step", step=step, epoch=epoch, batch=batch, **scalars)
        if sample.tensors is not None:
            tables = {k: getattr(sample, k) for k in TABLES}
            self.write("table", step=step, **tables)

    def found(self, events, verdict, layout, verbose):
        """Tells of a step's events, one line for each detector's.

        Returns:
            Those that stand for their detector's.
        """
        for event in events:
            self.events.append(event)
            self.write("event", **dataclasses.asdict(event))
            if self.on_event is not None:
                self.on_event(event)
        kinds = collections.Counter(event.detector for event in events)
        firsts = []
        for kind, count in kinds.items():
            event = next(e for e in events if e.detector == kind)
            due = self._box(event, layout)
            if verbose and (due or kind in FATAL):
                name = str(verdict) if kind == "verdict" else ""
                what = ": ".join(filter(None, (name, event.detail)))
                more = f" (and {count - 1} like it)" if count > 1 else ""
                print(f"\nStabilityMonitor, step {event.step}: {what}{more}")
            firsts.append(event)
        return firsts

    def _box(self, event, layout):
        """Writes a black box, unless one was lately; whether it was due."""
        due = self.box.due(event)
        if due and self._writer is not None:
            arrays = self.box.arrays(layout)
            self.file = self._writer.black_box(event, arrays)
        return due

    def send(self, step, sample, layout):
        """Gives a full step's numbers to the sinks."""
        if self.sinks:
            scalars = self._selection(flatten(sample, layout))
            for sink in self.sinks:
                sink.write(step, scalars)

    def close(self):
        """Completes the files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close_sinks(self):
        for sink in self.sinks:
            sink.close()
