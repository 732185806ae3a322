"""What a `StabilityMonitor` remembers, as values that go into JSON."""

import dataclasses

from keras_stable.backend import internals
from keras_stable.events import Verdict
from keras_stable.packing import Layout


def state_of(monitor):
    """The state after the last step that was looked at.

    Of the steps before it, which a black box would show, nothing is kept: a
    box soon after a resumption begins there.
    """
    diagnosis, layout = monitor._diagnosis, monitor._layout
    return {
        "step": monitor.step,
        "place": list(monitor._place),
        "last": monitor.last,
        "verdict": int(monitor.verdict),
        "worst": int(monitor.worst),
        "alert": [monitor._alert, monitor._calm],
        "budget": monitor._budget.state(),
        "boxes": monitor._chronicle.box.state(),
        "rescue": monitor._rescuer and monitor._rescuer.state(monitor.step),
        "layout": layout and dataclasses.asdict(layout),
        "diagnosis": diagnosis and diagnosis.state(),
        "bytes": monitor._chronicle.position,
    }


def announce(monitor, state):
    """Shows a state before `fit` goes on from it."""
    monitor.step, monitor.last = state["step"], state["last"]
    monitor.worst = Verdict(state["worst"])
    monitor._diagnosis, monitor._kept = None, Verdict(state["verdict"])
    if monitor._rescuer is not None and state.get("rescue") is not None:
        monitor._rescuer.restore(state["rescue"])


def recall(monitor, state):
    """Lets a monitor in `fit` go on from a state; returns its step."""
    announce(monitor, state)
    step, monitor._kept = monitor.step, Verdict.OK
    monitor._place = epoch, batch = state["place"]
    monitor._offsets = {epoch: batch + 1}
    monitor._alert, monitor._calm = state["alert"]
    monitor._lag = step - internals.batches_seen(monitor.model.optimizer)
    monitor._budget.restore(state["budget"])
    if state["diagnosis"] is not None:
        monitor._layout = state["layout"] and Layout(**state["layout"])
        # Another state, in a file, is of another step.
        monitor._resumed = 0
        monitor._diagnose(monitor._layout)
        monitor._diagnosis.restore(state["diagnosis"])
    monitor._chronicle.box.restore(state["boxes"])
    return step


def begin(monitor):
    """Finds where training begins: after `on_train_begin` of all callbacks.

    `BackupAndRestore` may have gone back: then, and after a halt, what the
    detectors remember is of no use.
    """
    state, monitor._state = monitor._state, None
    step = internals.batches_seen(monitor.model.optimizer) + monitor._lag
    if state is not None:
        step = recall(monitor, state)
    halted = monitor.policy != "observe" and monitor.verdict.lost
    if halted or step < monitor.step:
        monitor._diagnosis = None
        monitor._alert = monitor._calm = 0
    monitor.step = monitor._begun = monitor._resumed = step
