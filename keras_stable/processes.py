"""One process of a sweep: what it may use, what it has claimed, its end."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None

OUTPUT = "output.txt"
CLAIM = ".claim"
# Of a GPU's memory, what runs may have: the rest is for their contexts.
SHARED = 0.9
# Seconds between signs of life; without any, a process elsewhere is dead.
BEAT, DEAD = 10, 120


@dataclasses.dataclass(eq=False)
class Task:
    """One process: what it runs, and how it ended.

    Attributes:
        runs: what it is for, of the caller's.
        command: list of strings, the arguments of Python.
        folders: paths of the directories that it writes, existing; what it
            prints is appended to `output.txt` in the first.
        begun: int. Bytes that were in `output.txt` before.
        exit_code: int, negative for a signal. None while it runs, or if it
            was not started, as another process has one of its folders.
        problem: what the engine has to say of its end, or "".
    """

    runs: tuple
    command: list
    folders: list
    begun: int = 0
    exit_code: int | None = None
    problem: str = ""

    def tail(self, characters=2000):
        """The end of what it printed, without progress bars."""
        try:
            with open(Path(self.folders[0], OUTPUT), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self.begun, size - 8 * characters))
                text = file.read().decode(errors="replace")
        except OSError as error:
            text = str(error)
        lines = (line.rpartition("\r")[2] for line in text.split("\n"))
        text = "\n".join([*lines, *filter(None, [self.problem])])
        return text.strip()[-characters:]


def lock(file):
    """Opens a file that one process alone can have open in this way.

    The kernel gives it up when that process has ended, however that came, and
    those it was handed to.

    Returns:
        File descriptor, or None if another process has it. Where a file system
        knows no locks, there are none.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


@contextlib.contextmanager
def alone(file, what):
    """Keeps other processes out, on this machine and on others.

    The kernel knows who is at work on this machine, and on file systems that
    tell each other; for the others the file holds signs of life.

    Args:
        file: `Path`. Empty while nobody is at work.
        what: word for what is done once at a time, for errors.

    Yields:
        A function to be called often, that gives those signs.

    Raises:
        ValueError: if another process is at work.
    """
    descriptor = lock(file)
    owner = _owner(file)
    who = f"process {owner.get('pid')} on {owner.get('host')}"
    if descriptor is None:
        raise ValueError(
            f"Another {what} is at work on {file.parent}: {who}. Wait for its "
            "end, or stop it."
        )
    try:
        mine = socket.gethostname()
        age = time.time() - owner.get("beat", 0)
        if owner.get("host", mine) != mine and age < DEAD:
            raise ValueError(
                f"A {what} was at work on {file.parent} {age:.0f} s ago: "
                f"{who}. Stop it there first; if it was killed, wait "
                f"{DEAD} s; if this is a copy, delete {file}."
            )
        os.ftruncate(descriptor, 0)
        last = -math.inf

        def beat():
            nonlocal last
            if time.monotonic() - last >= BEAT:
                last = time.monotonic()
                sign = {"host": mine, "pid": os.getpid()}
                sign = json.dumps(sign | {"beat": round(time.time())})
                # As long as the last: nobody reads half of it.
                os.pwrite(descriptor, f"{sign}\n".encode(), 0)

        try:
            beat()
            yield beat
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _owner(file):
    try:
        owner = json.loads(file.read_text())
        return {**owner, "beat": float(owner["beat"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def launch(task, settings):
    """Starts a task's process, or returns None if a folder of it is taken.

    The process has its folders claimed as long as it lives: one that outlived
    its sweep is not joined by a second on the same files.

    Args:
        task: `Task`.
        settings: dictionary, what its environment has otherwise than ours.

    Returns:
        `subprocess.Popen`.
    """
    claims = []
    try:
        for folder in task.folders:
            claims.append(lock(Path(folder, CLAIM)))
            if claims[-1] is None:
                return None
        with open(Path(task.folders[0], OUTPUT), "ab") as output:
            task.begun = output.tell()
            return subprocess.Popen(
                [sys.executable, *task.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **settings},
                pass_fds=claims if fcntl is not None else (),
            )
    finally:
        for claim in claims:
            if claim is not None:
                os.close(claim)


def processor():
    """Eight letters for this machine's kind of processor."""
    text = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("flags", "Features", "model name")
        text += "".join(sorted({s for s in lines if s.startswith(names)}))
    except OSError:
        text += platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def settings_of(threads, share=1.0, device=None, cache=None):
    """The environment of one of several runs that share a machine.

    What the caller's environment sets already stays, but for the device.

    Args:
        threads: int. Threads of the CPU for its arithmetic.
        share: float. Its part of the device: below 1, jax and TensorFlow take
            that part of its memory instead of all.
        device: str or None. The one device of CUDA that it sees; None: all.
        cache: path of a folder for compiled programs, or None.

    Returns:
        Dictionary of strings.
    """
    names = "OMP_NUM_THREADS PJRT_NPROC TF_NUM_INTRAOP_THREADS".split()
    found = {name: str(threads) for name in names}
    if share < 1:
        # From the start: whether it fits does not depend on its neighbours.
        found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{SHARED * share:.3f}"
        found["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    if cache is not None:
        # A CPU's programs are for its own instructions. `keep_programs` has
        # another folder for those of a GPU.
        folder = os.path.join(os.fspath(cache), f"jax-cpu-{processor()}")
        found["JAX_COMPILATION_CACHE_DIR"] = folder
        found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        # The programs of one learning rate are those of another.
        found["JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS"] = "1"
    found = {k: v for k, v in found.items() if k not in os.environ}
    if device is not None:
        found["CUDA_VISIBLE_DEVICES"] = device
    return found
