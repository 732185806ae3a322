"""Runs one sweep of stand-ins to the end, and one that is killed on its way.

    python killed_sweeps.py FOLDER KILLS

Imports once and forks each attempt into a process group of its own. Every
other time the sweep alone is killed, so that its runs outlive it. Prints the
number of attempts that were killed before their end; then the exit codes of
one that got a Ctrl-C, as a terminal sends it to the whole group, and of one
that got several, as its runs did not end.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import keras_stable as ks

STAND_IN = str(Path(__file__).with_name("stand_in.py"))


def sweep_in(path, labels=("strong", "weak", "shaky")):
    arms = [ks.Arm(label, "baseline") for label in labels]
    rates = (2e-3, 4e-3, 8e-3, 2e-2, 4e-2)
    return ks.Sweep(path, arms, ks.Ladder(rates, (0, 1)))


def attempt(path, seconds="0.2", **labels):
    """Forks a process that works on the sweep; returns its id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    code = 1
    try:
        sweep = sweep_in(path, **labels)

        def command(runs):
            (run,) = runs
            rate, seed = f"{run.learning_rate:g}", str(run.seed)
            folder = str(sweep.path / run.folder)
            return [STAND_IN, seconds, folder, run.label, rate, seed]

        with open(os.devnull, "w") as nowhere:
            display = ks.Display(nowhere)
            workers = ks.workers("local", slots=2)
            ks.run_sweep(sweep, workers, command, 1, display, 0.02)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    finally:
        os._exit(code)


def ended(path):
    sweep = sweep_in(path)
    return sum(len(sweep.outcomes(label)) for label in sweep.arms)


def kill(path, number, random):
    """Kills an attempt a moment after it ended a run; whether it was alive."""
    before, child = ended(path), attempt(path)
    while ended(path) <= before:
        time.sleep(0.01)
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
    time.sleep(random.uniform(0, 0.3))
    (os.kill if number % 2 else os.killpg)(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def interrupt(path, label, again):
    """How an attempt ends: its exit code, negative for a signal."""
    child = attempt(path, "600", labels=(label,))
    while len([*path.rglob("health.jsonl")]) < 2:
        time.sleep(0.01)
    os.killpg(child, signal.SIGINT)
    while again:
        time.sleep(0.1)
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        os.kill(child, signal.SIGINT)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    whole = attempt(folder / "whole")
    generator = random.Random(0)
    hit = [kill(folder / "killed", i, generator) for i in range(kills)]
    last = attempt(folder / "killed")
    for child in (whole, last):
        assert os.waitpid(child, 0)[1] == 0
    print(sum(hit))
    print(interrupt(folder / "once", "strong", False))
    print(interrupt(folder / "twice", "stubborn", True))
