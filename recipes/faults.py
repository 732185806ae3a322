r"""Breaks training in every way we know, and looks whether it goes on.

Question: after a fault, is anything lost that was saved, is a damaged file
ever taken as good, does training ever begin anew without a word?
Trains a tiny model again and again, each time with a fault at a random time or
place, and starts it once more. Right is what ends with the weights, bit by
bit, of a training that nothing happened to, or what is refused with a message.

    KERAS_BACKEND=torch python recipes/faults.py --out faults.json
    python recipes/faults.py --kinds kill_saving one_of_two --out faults.json
    python recipes/faults.py --kinds bit_flip --repetitions 2

A training takes 1 second on torch and 6 on jax, which compiles it; each of 20
repetitions has two or so.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fault_files import all_damaged
from fault_files import bit_flip
from fault_files import data_changed
from fault_files import data_removed
from fault_files import half_deleted
from fault_files import other_config
from fault_files import other_version
from fault_files import truncated
from fault_runs import EVERY
from fault_runs import SECONDS
from fault_runs import STEPS
from fault_runs import completed
from fault_runs import finish
from fault_runs import last_step
from fault_runs import log
from fault_runs import numbered
from fault_runs import outcome
from fault_runs import poison
from fault_runs import start
from fault_runs import until

import keras_stable as ks

BACKEND = os.environ["KERAS_BACKEND"]
HEARTBEAT, BOUND = 10, 90  # Seconds: of a dead process; for the other to end.


def some_steps(path, rng, pid, most=STEPS - 5):
    """Waits for a random number of steps."""
    step = rng.randrange(1, most)
    until(lambda: last_step(path) >= step, pid)


def resumed(path, reference):
    """How a run goes on that ended where it may."""
    saved = max(completed(path), default=0)
    return outcome(path, reference, last_step(path), saved)


# Faults. Each takes an empty or a half-done run, and the reference.


def kill_training(path, reference, rng):
    pid = start(path)
    some_steps(path, rng, pid)
    time.sleep(rng.uniform(0, 5 * SECONDS))
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    return resumed(path, reference)


def kill_saving(path, reference, rng):
    pid = start(path)
    wanted = rng.randrange(1, 5)

    def saving():
        found = numbered(path)
        half = [p for p in found if not (p / "manifest.json").exists()]
        return bool(half) and int(half[-1].name) >= wanted * EVERY

    until(saving, pid)
    time.sleep(rng.uniform(0, 0.3))
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    return resumed(path, reference)


def kill_first_step(path, reference, rng):
    pid = start(path)
    until(lambda: "BEGINS" in log(path), pid)
    end = time.monotonic() + rng.uniform(0, 2.0)
    until(lambda: time.monotonic() > end or last_step(path) > 0, pid)
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    return resumed(path, reference)


def interrupt(path, reference, rng):
    """SIGTERM or Ctrl-C: saves, and exits with 75; nothing is done twice."""
    pid = start(path)
    some_steps(path, rng, pid)
    os.kill(pid, rng.choice([signal.SIGTERM, signal.SIGINT]))
    code = finish(pid)
    made = last_step(path)
    if code == 0:
        return {"result": "finished before", "lost": 0}
    if code != 75:
        return {"result": f"exit code {code}", "log": log(path)[-2000:]}
    return outcome(path, reference, made, made)


def two_interrupts(path, reference, rng):
    """A second Ctrl-C while the first is being obeyed: it ends at once."""
    pid = start(path)
    until(lambda: "BEGINS" in log(path), pid)
    some_steps(path, rng, pid)
    os.kill(pid, signal.SIGINT)
    until(lambda: "Ctrl-C ends at once" in log(path), pid)
    os.kill(pid, signal.SIGINT)
    code = finish(pid)
    if code not in (0, 75, -signal.SIGINT):
        return {"result": f"exit code {code}", "log": log(path)[-2000:]}
    return resumed(path, reference)


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of some bytes; none where it cannot be mounted."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    mounted = not subprocess.run(mount, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


def limit_files(size):
    """Lets no file grow beyond some bytes: the next best full disk."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def disk_full(path, reference, rng):
    """Full from some step on, and for some steps: training goes on."""
    folder = path / "checkpoints"
    first = rng.randrange(1, 4) * EVERY - rng.randrange(1, 8)
    left = rng.randrange(0, 12_000)  # Less than a checkpoint has.
    with small_disk(folder, 2**22) as mounted:

        def fill(lm):
            if not mounted:
                return limit_files(left)
            with (
                open(folder / "ballast", "wb", buffering=0) as file,
                contextlib.suppress(OSError),
            ):
                while True:
                    file.write(bytes(4096))
            size = (folder / "ballast").stat().st_size
            os.truncate(folder / "ballast", max(size - left, 0))

        def free(lm):
            if not mounted:
                import resource

                return limit_files(resource.RLIM_INFINITY)
            (folder / "ballast").unlink()

        last = first + rng.randrange(10, 30)
        code = finish(start(path, at={first: fill, last: free}))
        said = log(path)
        if code != 0 or "could not be written" not in said:
            return {"result": f"exit code {code}", "log": said[-2000:]}
        weights = json.loads((path / "result.json").read_text())["weights"]
        if weights != reference:
            return {"result": "other weights"}
        # What there is now is good.
        return outcome(path, reference, STEPS, max(completed(path)))


def not_finite(path, reference, rng):
    """A NaN in a weight or slot: no such state is ever saved."""
    step = rng.randrange(12, STEPS - 2)
    finish(start(path, at={step: lambda lm: poison(lm, rng)}))
    if "not finite" not in log(path) and "NONFINITE" not in log(path):
        return {"result": "no message", "log": log(path)[-2000:]}
    saved = max(completed(path))
    if saved > step:
        return {"result": f"saved {saved} after NaN in {step}"}
    return outcome(path, reference, step, step // EVERY * EVERY)


def pair(path):
    """Starts two processes that train together; returns their ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [start(path, join=(address, 2, i, HEARTBEAT)) for i in range(2)]


def outcome_of_pair(path, reference, made, saved):
    """As `outcome`, for two processes."""
    size = len(log(path))
    codes = [finish(pid) for pid in pair(path)]
    if codes != [0, 0]:
        said = log(path)[size:]
        return {"result": f"exit codes {codes}", "log": said[-3000:]}
    found = json.loads((path / "result.json").read_text())
    if found["begin"] < saved or found["weights"] != reference:
        return {"result": "other weights", "begin": found["begin"]}
    return {"result": "resumed", "lost": max(made - found["begin"], 0)}


def one_of_two(path, reference, rng):
    """One of two processes is killed: the other ends, and both go on."""
    pids = pair(path)
    some_steps(path, rng, pids[0])
    victim = rng.randrange(2)
    os.kill(pids[victim], signal.SIGKILL)
    begin = time.monotonic()
    finish(pids[victim])
    code = finish(pids[1 - victim], BOUND)
    seconds = round(time.monotonic() - begin, 1)
    done = (path / "result.json").exists()  # The kill came too late.
    if code is None or (code == 0 and not done):
        return {"result": f"the other: {code}", "log": log(path)[-2000:]}
    made, saved = last_step(path), max(completed(path), default=0)
    row = outcome_of_pair(path, reference, made, saved)
    return {**row, "seconds": seconds}


def interrupt_two(path, reference, rng):
    """One of two is sent a signal: both save the same step and exit with 75."""
    pids = pair(path)
    some_steps(path, rng, pids[0], STEPS // 2)
    number = rng.choice([signal.SIGTERM, signal.SIGINT])
    os.kill(pids[rng.randrange(2)], number)
    codes = [finish(pid) for pid in pids]
    if codes == [0, 0]:
        return {"result": "finished before", "lost": 0}
    if codes != [75, 75]:
        return {"result": f"exit codes {codes}", "log": log(path)[-3000:]}
    made = last_step(path)
    return outcome_of_pair(path, reference, made, made)


KINDS = {
    # Name: (function, whether the run is half done).
    "kill_training": (kill_training, False),
    "kill_saving": (kill_saving, False),
    "kill_first_step": (kill_first_step, False),
    "interrupt": (interrupt, False),
    "two_interrupts": (two_interrupts, False),
    "disk_full": (disk_full, False),
    "not_finite": (not_finite, False),
    "truncated": (truncated, True),
    "bit_flip": (bit_flip, True),
    "half_deleted": (half_deleted, True),
    "all_damaged": (all_damaged, True),
    "other_config": (other_config, True),
    "other_version": (other_version, True),
    "data_changed": (data_changed, True),
    "data_removed": (data_removed, True),
    "one_of_two": (one_of_two, False),
    "interrupt_two": (interrupt_two, False),
}
PAIRS = ("one_of_two", "interrupt_two")  # Of two processes that train as one.


def new_run(path):
    path.mkdir(parents=True)
    text = "To be, or not to be: that is the question.\n" * 200
    (path / "text.txt").write_text(text)
    return path


def half_done(path, seed):
    """A run that was killed, with three checkpoints and some steps more."""
    pid = start(new_run(path))
    until(lambda: STEPS - EVERY in completed(path), pid)
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    return path


def reference_of(path, joined):
    """Digest of the weights of a run without faults."""
    new_run(path)
    pids = pair(path) if joined else [start(path)]
    codes = [finish(pid) for pid in pids]
    if any(codes):
        sys.exit(f"faults: training without a fault failed:\n{log(path)}")
    return json.loads((path / "result.json").read_text())["weights"]


def table(rows):
    """Results by kind, as Markdown."""
    lines = [
        "| fault | backend | repetitions | resumed | refused | wrong "
        "| most steps lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["kind"], row["backend"]) for row in rows):
        of = [row for row in rows if (row["kind"], row["backend"]) == key]
        resumed = sum(r["result"] in ("resumed", "finished before") for r in of)
        refused = sum(row["result"] == "refused" for row in of)
        lost = [row["lost"] for row in of if "lost" in row]
        lines.append(
            f"| `{key[0]}` | {key[1]} | {len(of)} | {resumed} | {refused} | "
            f"{len(of) - resumed - refused} | {max(lost) if lost else ''} |"
        )
    return "\n".join(lines)


def write(file, rows):
    """Adds rows to a file, in place of those of the same kind and backend."""
    kept = []
    if file.exists():
        new = {(row["kind"], row["backend"]) for row in rows}
        kept = json.loads(file.read_text())["rows"]
        kept = [r for r in kept if (r["kind"], r["backend"]) not in new]
    record = {"every": EVERY, "steps": STEPS, "versions": ks.versions()}
    head = json.dumps(record)[:-1]
    lines = ",\n".join(json.dumps(row) for row in [*kept, *rows])
    file.write_text(f'{head}, "rows": [\n{lines}\n]}}\n')


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = BACKEND != "tensorflow"
    kinds = [k for k in KINDS if several or k not in PAIRS]
    parser.add_argument("--kinds", nargs="+", default=kinds)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file, to which results are added")
    args = parser.parse_args(arguments)
    for kind in args.kinds:
        ks.check_choice(kind, list(KINDS), "kind")
    rows, references = [], {}
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        for kind in args.kinds:
            fault, begun = KINDS[kind]
            joined = kind in PAIRS
            if joined not in references:
                name = root / f"reference-{joined}"
                references[joined] = reference_of(name, joined)
            base = root / "half"
            if begun and not base.exists():
                half_done(base, args.seed)
            begin = time.monotonic()
            for i in range(args.repetitions):
                path = root / f"{kind}-{i}"
                if begun:
                    shutil.copytree(base, path)
                else:
                    new_run(path)
                rng = random.Random(f"{args.seed}-{kind}-{i}")
                row = fault(path, references[joined], rng)
                row = {"kind": kind, "backend": BACKEND, "repetition": i, **row}
                rows.append(row)
                shutil.rmtree(path)
            minutes = (time.monotonic() - begin) / 60
            found = [r["result"] for r in rows if r["kind"] == kind]
            print(
                f"{kind}: {minutes:.1f} min, {sorted(set(found))}", flush=True
            )
            if args.out:
                write(Path(args.out), rows)
    print(table(rows))
    right = {"resumed", "refused", "finished before"}
    wrong = [row for row in rows if row["result"] not in right]
    for row in wrong:
        print(json.dumps(row, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
