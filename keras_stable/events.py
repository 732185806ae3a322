"""What a detector is and says: `Detector`, `Event` and `Verdict`.

A detector is fed with `update(step, value)` and answers with an `Event` or
None; those over many series take an array and answer with a list. Its
`state()` goes into JSON; after `restore(state)` it goes on as if nothing had
been interrupted. A value that is not finite never enters a baseline, so that
one NaN does not blind a detector for the steps after it. Pure numpy.
"""

import collections
import dataclasses
import enum
import numbers

import numpy as np

MIN_WARMUP = 64  # Steps before any baseline is believed.


class Verdict(enum.IntEnum):
    """The state of a run, in the order of severity.

    A run that never learned (`STALLED`) has lost less than one whose attention
    sees single keys or is far beyond its cap (`COLLAPSED`), or that lost what
    it had learned: `lost` is True from `COLLAPSED` on.
    """

    OK = 0
    WARN = 1
    SPIKE_RECOVERED = 2
    SPIKE_SLOW = 3
    STALLED = 4
    COLLAPSED = 5
    LEVEL_SHIFT = 6
    DIVERGED = 7
    NONFINITE = 8

    def __str__(self):
        return self.name

    def __format__(self, spec):
        return format(self.name, spec)

    @property
    def lost(self):
        """Whether going on is a waste: what `policy="halt"` stops on."""
        return self >= Verdict.COLLAPSED


@dataclasses.dataclass(frozen=True)
class Event:
    """What a detector found.

    `step` at which it was found, `onset`: the first step of it, name of the
    `detector` and of the `series`, its `value`, and `detail`: a sentence.
    """

    step: int
    onset: int
    detector: str
    series: str
    value: float
    detail: str


class TrainingHalted(RuntimeError):
    """Training was stopped by the monitor, because it is lost.

    Attributes:
        verdict: `Verdict`.
        step: int, at which it was reached.
        event: `Event` that led to it.
        black_box: path of the file with the steps before it, or None.
    """

    def __init__(self, verdict, step, event, black_box=None):
        self.verdict, self.step, self.event = verdict, step, event
        self.black_box = black_box
        advice = "lower the learning rate"
        if verdict is Verdict.NONFINITE:
            advice = "look at the layer that is named, its weights and batch"
        elif verdict is Verdict.COLLAPSED:
            advice += " or bound attention logits, as variant='qk_norm' does"
        where = f" The steps before it: {black_box}." if black_box else ""
        super().__init__(
            f"Training is lost: {verdict} at step {step}, since step "
            f"{event.onset}: {event.detail}.{where} Go back to a checkpoint "
            f"from before step {event.onset} and {advice}, or watch on with "
            "policy='observe'."
        )


def check(what, value, low, above=False):
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not (value > low if above else value >= low):
        bound = "greater than" if above else "at least"
        raise ValueError(f"`{what}` must be {bound} {low}. Received: {value!r}")
    return value


def median_of(values):
    # Over the last axis. Faster than `np.median`, and quiet about NaN.
    middle = values.shape[-1] // 2
    values = np.sort(values)
    return (values[..., middle] + values[..., ~middle]) / 2


def robust(values):
    values = np.array(values, "float64")
    median = median_of(values)
    deviation = np.abs(values - median[..., None])
    return median, 1.4826 * median_of(deviation)


def _to_plain(value):
    if isinstance(value, Detector):
        return value.state()
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.where(np.isnan(value), None, value).tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    sequence = isinstance(value, (collections.deque, list))
    return list(value) if sequence else value


def _from_plain(now, value):
    if isinstance(now, Detector):
        now.restore(value)
        return now
    if isinstance(now, dict):
        return {k: _from_plain(now.get(k), item) for k, item in value.items()}
    if isinstance(now, np.ndarray):
        array = np.array(value, now.dtype)  # None becomes NaN.
        if array.shape != now.shape:
            raise ValueError(
                "The state is of other series or another window: restore it "
                "into a detector made with the same arguments. Received: "
                f"shape {array.shape}, expected {now.shape}"
            )
        return array
    if isinstance(now, collections.deque):
        return collections.deque(value, now.maxlen)
    if isinstance(now, Verdict):
        return Verdict(value)
    return list(value) if isinstance(value, list) else value


class Detector:
    """What all share: `state()` and `restore()` of `_remembers`."""

    _remembers = ()

    def state(self):
        """All that it remembers, as values that go into JSON."""
        return {key: _to_plain(getattr(self, key)) for key in self._remembers}

    def restore(self, state):
        """Goes on from a `state()` of a detector with the same arguments."""
        if set(state) != set(self._remembers):
            raise ValueError(
                f"This is no state of {type(self).__name__}, which has "
                f"{sorted(self._remembers)}. Received: {sorted(state)}"
            )
        for key in self._remembers:
            setattr(self, key, _from_plain(getattr(self, key), state[key]))


class ManySeries(Detector):
    def __init__(self, names):
        if isinstance(names, str):
            raise ValueError(f"`names` must be a list. Received: {names!r}")
        self.names = tuple(names)

    def vector(self, values):
        values = np.asarray(values, "float64")
        if values.shape != (len(self.names),):
            raise ValueError(
                f"{type(self).__name__} watches {len(self.names)} series, in "
                f"the order of `names`. Received: shape {values.shape}"
            )
        return values
