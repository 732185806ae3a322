"""From what a step measured to what is wrong: every detector, in one place."""

import copy
import dataclasses
import math
import warnings

import numpy as np

from keras_stable.detectors import Collapse
from keras_stable.detectors import collapsed
from keras_stable.events import Event
from keras_stable.json_files import WRONG
from keras_stable.judge import Judge
from keras_stable.layerwise import Frozen
from keras_stable.layerwise import Growth
from keras_stable.layerwise import Jump
from keras_stable.layerwise import Staleness
from keras_stable.packing import HEAD_STATISTICS
from keras_stable.packing import STATISTICS
from keras_stable.packing import VARIABLE_STATISTICS
from keras_stable.records import read_json
from keras_stable.records import write_json

# Maximum attention logits at which QK-Clip (Kimi K2) and Megatron act.
MOST_LOGIT = 100.0
# Updates in a row that loss scaling may skip: its search takes 16 to come
# down from 2**16 to 1.
MOST_SKIPS = 20
# The scalars that decide about a run.
JUDGED = ("loss", "gradient_norm", "update_norm")


class Diagnosis:
    """The verdict about a run, and events that name the place.

    Every step goes to the `Judge`: loss, gradient norm, update norm. Full
    tables go to the detectors over layers: `Jump` of log2(rms), `Growth` of
    log2 of rms, abs_max and largest logit, `Collapse` of the entropies and
    logits of all heads, `Staleness` of the first and the last matrix, `Frozen`
    of all variables. Those, and non-finite activations that leave the loss
    finite, are warnings; the `Judge` finds a run lost, or a collapse that
    lasts.

    Args:
        layout: `Layout` of the full tables; None if there are none.
        warmup: int. Steps of the learning rate's warm-up.
        largest: float or list of floats, one an activation: the largest
            number of its dtype. Defaults to that of float32.
    """

    def __init__(self, layout=None, warmup=0, largest=3.4e38):
        self.judge = Judge(warmup)
        self.warmup = max(64, warmup)
        self.skips = 0
        self.bad = False  # Whether the last step had a bad activation.
        self.collapse = Collapse()
        self.layers = {}
        if layout is None:
            return
        # An input is another layer's output: it would be named twice.
        self.outputs = [
            i
            for i, name in enumerate(layout.tensors)
            if not name.endswith("/input")
        ]
        names = [layout.tensors[i] for i in self.outputs]
        # The first and the last matrix: StableAdamW's case is the embedding,
        # and inner layers exceed its limit in healthy runs.
        variables = layout.variables
        matrices = [
            i
            for i, path in enumerate(variables)
            if path.endswith(("kernel", "embeddings"))
        ]
        self.ends = sorted({*matrices[:1], *matrices[-1:]})
        largest = np.broadcast_to(largest, (len(layout.tensors),))
        largest = np.log2(largest[self.outputs]) - 3
        growing = [f"{name} {s}" for s in ("rms", "abs_max") for name in names]
        growing += [f"{name} max_logit" for name in layout.heads]
        limits = [math.nan] * len(names) + list(largest)
        limits += [math.log2(MOST_LOGIT)] * len(layout.heads)
        self.layers = {
            "jump": Jump(names, warmup=warmup),
            "growth": Growth(growing, limits, warmup=warmup),
            "staleness": Staleness([variables[i] for i in self.ends]),
            "frozen": Frozen(layout.variables),
        }

    @property
    def verdict(self):
        return self.judge.verdict

    @property
    def calm(self):
        """Whether a state as it is now is one to go back to."""
        return self.judge.calm and self.collapse.since is None

    def update(self, step, sample):
        """Takes a `Sample` and returns the list of its `Event`s."""
        scalars = sample.scalars
        if scalars.get("guarded"):
            # What was measured is of an update that was not made.
            return self.judge.update(step, {})
        skipped = bool(scalars.get("skipped"))
        self.skips = self.skips + 1 if skipped else 0
        values = {
            name: scalars[name]
            for name in JUDGED
            if name in scalars
        }
        hopeless = self.skips >= MOST_SKIPS
        events = self.judge.update(step, values, skipped and not hopeless)
        events = [_placed(event, scalars) for event in events]
        events += self._activations(step, scalars, events)
        if sample.tensors is not None:
            events += self._tables(step, sample)
        return events

    def _activations(self, step, scalars, found):
        name = scalars.get("first_nonfinite")
        # One event for all steps in a row.
        new, self.bad = not self.bad, name is not None
        if name is None or any(e.detector == "nonfinite" for e in found):
            return []
        count = scalars["nonfinite"]
        detail = f"{name} is not finite, the first of {count:.0f} activations"
        event = Event(step, step, "nonfinite", name, count, detail)
        self.judge.warn(event)
        return [event] if new else []

    def _tables(self, step, sample):
        with np.errstate(divide="ignore", invalid="ignore"):
            # Layers whose entries are bad have no scale.
            table = sample.tensors[self.outputs].astype("float64")
            table[table[:, STATISTICS.index("nonfinite")] > 0] = np.nan
            rms = np.log2(table[:, STATISTICS.index("rms")])
            abs_max = np.log2(table[:, STATISTICS.index("abs_max")])
            logits = [max(heads[0].max(), 1e-6) for heads in sample.heads]
            logits = np.log2(np.array(logits, "float64"))
        values = {
            "jump": rms,
            "growth": np.concatenate([rms, abs_max, logits]),
        }
        if sample.scalars["updated"] and step > self.warmup:
            table = sample.variables
            stale = table[:, VARIABLE_STATISTICS.index("staleness")]
            values["staleness"] = stale[self.ends]
            gradients = VARIABLE_STATISTICS.index("gradient_rms")
            values["frozen"] = table[:, gradients]
        events = []
        for name, value in values.items():
            events += self.layers[name].update(step, value)
        none = np.zeros((len(HEAD_STATISTICS), 0))
        heads = np.concatenate([none, *sample.heads], axis=1)
        share = collapsed(**dict(zip(HEAD_STATISTICS, heads, strict=True)))
        event = self.collapse.update(step, share)
        events += [event] if event else []
        for event in events:
            self.judge.warn(event)
        self.judge.watch_collapse(step, self.collapse)
        return events

    def state(self):
        """All that it remembers, as values that go into JSON."""
        return {
            "judge": self.judge.state(),
            "skips": self.skips,
            "bad": self.bad,
            "collapse": self.collapse.state(),
            **{name: x.state() for name, x in self.layers.items()},
        }

    def restore(self, state):
        """Goes on from a `state()`."""
        self.judge.restore(state["judge"])
        self.skips, self.bad = int(state["skips"]), bool(state["bad"])
        self.collapse.restore(state["collapse"])
        for name, detector in self.layers.items():
            detector.restore(state[name])

    def save(self, file, step):
        """Writes its state after a step."""
        state = {"step": step, "diagnosis": self.state()}
        write_json(file, state, indent=None)

    def load(self, file, step):
        """Goes on from what `save` wrote, unless after a later step.

        A state that it cannot go on from is left out, with a warning.
        """
        trial = copy.deepcopy(self)
        try:
            saved = read_json(file)
            if saved["step"] > step:
                return
            trial.restore(saved["diagnosis"])
            trial._rehearse(step)
        except (*WRONG, OSError) as error:
            warnings.warn(
                f"{file} is damaged, or of another model or version: the "
                f"detectors begin anew. {type(error).__name__}: {error}",
                stacklevel=2,
            )
            return
        self.restore(saved["diagnosis"])

    def _rehearse(self, step):
        """Goes on by some steps, to see that a state holds what it should."""
        for _, onset, why in self.judge.findings(step):
            Event(step, int(onset), "", "", math.nan, "" + why)
        values = [3.0, math.nan, 1e4, *[2.0] * 40]
        for step, value in enumerate(values, step + 1):
            self.judge.update(step, dict.fromkeys(JUDGED, value))
            self.collapse.update(step, value)
            for detector in self.layers.values():
                detector.update(step, [value] * len(detector.names))


def _placed(event, scalars):
    """A non-finite event with the place in forward and backward pass."""
    if event.detector != "nonfinite":
        return event
    first = scalars.get("first_nonfinite")
    clean = scalars.get("clean_gradient")
    places = []
    if first is not None:
        places.append(f"first in the forward pass: {first}")
    elif "first_nonfinite" in scalars:
        places.append("no activation that was looked at is bad")
    if clean is not None:
        places.append(f"shallowest clean gradient: {clean}")
    detail = "; ".join([event.detail, *places])
    return dataclasses.replace(event, detail=detail)
