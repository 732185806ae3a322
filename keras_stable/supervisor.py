"""Runs a sweep: keeps its workers busy with what it wants next."""

import collections
import contextlib
import os
import signal
import sys
import threading
import time

from keras_stable.processes import CLAIM
from keras_stable.processes import Task
from keras_stable.resumption import INTERRUPTED
from keras_stable.resumption import SIGNALS
from keras_stable.sweep_tables import Display
from keras_stable.sweep_tables import write_sweep_table

# How often a run is begun again that others interrupt.
INTERRUPTIONS = 3


class SweepInterrupted(SystemExit):
    """A sweep was ended by SIGTERM or Ctrl-C, after its runs had saved.

    Not caught, it ends Python with exit code 75.
    """

    def __init__(self):
        super().__init__(INTERRUPTED)


def run_sweep(sweep, workers, command, batch=1, display=None, seconds=0.5):
    """Runs what a sweep wants until it wants nothing more.

    It may be killed at any time, and be called again: runs that have a result
    stay, those that had begun go on from what they saved, or begin anew. A
    run that ends without a result is tried `ATTEMPTS` times in all, and then
    counts as failed. SIGTERM and Ctrl-C are handed on to the runs, which save
    and end; a second Ctrl-C ends all at once.

    Args:
        sweep: `Sweep`.
        workers: what `workers()` returns.
        command: function of a list of `PlannedRun`s of one arm that returns
            the arguments of a Python that makes them, and goes on with them
            if they had begun.
        batch: int. How many runs a command is given at most. Defaults to 1.
        display: `Display`. Defaults to one on standard output.
        seconds: float. How often it looks what has ended.

    Returns:
        The rows of `sweep_table`, which are written to the directory too.

    Raises:
        ValueError: if another sweep is at work on the directory, or if it
            holds runs of something else.
        SweepInterrupted: after SIGTERM or Ctrl-C.
    """
    display = display or Display(sys.stdout)
    interrupted, told = collections.Counter(), []
    with sweep.lock() as beat, _signals(workers, told):
        try:
            waiting, taken, asked = [], [None], False
            while True:
                beat()
                ended = workers.ended()
                for task in ended:
                    _settle(sweep, task, display, interrupted, told)
                if told and not asked:
                    waiting, taken, asked = [], [], True
                    workers.stop()
                # A cluster may have grown since.
                room = waiting and len(workers.tasks) < workers.capacity
                if not told and (ended or taken or room):
                    waiting, taken = _fill(
                        sweep, workers, command, batch, display
                    )
                if not workers.tasks and not waiting:
                    break
                running = [run for task in workers.tasks for run in task.runs]
                display.update(sweep, running, len(waiting))
                time.sleep(seconds)
        except BaseException:
            workers.stop()
            raise
        rows = write_sweep_table(sweep)
    if told:
        raise SweepInterrupted
    return rows


def _fill(sweep, workers, command, batch, display):
    """Starts what there is room for.

    Returns:
        The runs that wait, and those of them that another process has.
    """
    busy = {run for task in workers.tasks for run in task.runs}
    waiting = [run for run in sweep.wanted() if run not in busy]
    taken = []
    while len(workers.tasks) + len(taken) < workers.capacity:
        todo = [run for run in waiting if run not in taken]
        if not todo:
            break
        runs = [run for run in todo if run.label == todo[0].label][:batch]
        folders = [sweep.path / run.folder for run in runs]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        task = Task(tuple(runs), command(runs), folders)
        if workers.start(task):
            waiting = [run for run in waiting if run not in runs]
        else:
            # By one that outlived its sweep, and has its part of the machine.
            taken += runs
            display.once(
                f"{runs[0].folder} is at work in a process of a sweep before: "
                "its end is waited for."
            )
    return waiting, taken


def _settle(sweep, task, display, interrupted, told):
    """Notes how a task ended."""
    for run in task.runs:
        if sweep.status(run) == "ended":
            sweep.forgive(run)
            (sweep.path / run.folder / CLAIM).unlink(missing_ok=True)
        elif told or task.exit_code is None:
            continue
        elif task.exit_code == INTERRUPTED and (
            interrupted[run] < INTERRUPTIONS
        ):
            interrupted[run] += 1
            continue
        else:
            sweep.fail(run, task.exit_code, task.tail())
        display.ended(sweep, run)


@contextlib.contextmanager
def _signals(workers, told):
    """Appends signals to `told`; at the second, all end at once."""

    def handle(number, frame):
        told.append(number)
        if len(told) > 1:
            workers.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            os.write(2, b"\nThe runs save and end. Ctrl-C ends at once.\n")

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {n: signal.signal(n, handle) for n in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
