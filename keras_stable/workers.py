"""Where the processes of a sweep run: on this machine, or on a Ray cluster.

Engines are called by name, see `workers`. An engine starts commands and tells
how they ended; it knows nothing of what they do. Ray is imported when it is
asked for.
"""

import inspect
import math
import os
import signal
import sys
import time

from keras_stable import processes
from keras_stable.choices import check_integer
from keras_stable.choices import check_number
from keras_stable.choices import nearest
from keras_stable.processes import Task
from keras_stable.processes import launch
from keras_stable.processes import settings_of


class LocalWorkers:
    """Processes on this machine, some at once.

    Args:
        slots: int. How many at once. Defaults to one for each device.
        devices: names of CUDA devices, e.g. `["0", "1"]`: slot i has device
            i modulo their number to itself, or shares its memory equally.
            Defaults to none: all processes see what this one sees, and share
            its memory if there are several.
        cache: path of a folder where jax keeps what it compiles for a CPU, or
            None. A run compiles for about ten seconds.

    With one slot a process has all threads of the CPU, otherwise an equal
    part of them.

    Attributes:
        capacity: int, `slots`.
        tasks: list of `Task`s that run.

    Raises:
        ValueError: for slots or devices that are none.

    Example:

    >>> workers = LocalWorkers(slots=2)
    >>> task = Task(("a",), ["-c", "print(6 * 7)"], ["."])   # doctest: +SKIP
    >>> workers.start(task)                                  # doctest: +SKIP
    """

    def __init__(self, slots=None, devices=(), cache=None):
        devices = tuple(str(device).strip() for device in devices)
        if not all(devices) or len({*devices}) < len(devices):
            raise ValueError(
                "`devices` are names of CUDA devices, none twice, e.g. 0,1. "
                f"Received: {','.join(devices)!r}"
            )
        if slots is None:
            slots = len(devices) or 1
        self.capacity = check_integer(slots, "`slots`", 1)
        if devices and slots < len(devices):
            raise ValueError(
                f"{len(devices)} devices need as many slots at least. "
                f"Received: slots={slots}, devices={','.join(devices)!r}"
            )
        devices = devices or (None,)
        threads = max(_cpus() // slots, 1)
        share = 1 / math.ceil(slots / len(devices))
        self._settings = [
            settings_of(threads, share, devices[i % len(devices)], cache)
            for i in range(slots)
        ]
        self._free, self._at_work = [*range(slots)][::-1], {}

    @property
    def tasks(self):
        return [*self._at_work]

    def start(self, task):
        """Starts a task in a free slot; False if its folder is taken."""
        process = launch(task, self._settings[self._free[-1]])
        if process is not None:
            self._at_work[task] = process, self._free.pop()
        return process is not None

    def ended(self):
        """Those that ended since it was last asked, a list of `Task`s."""
        found = []
        for task, (process, slot) in [*self._at_work.items()]:
            task.exit_code = process.poll()
            if task.exit_code is not None:
                del self._at_work[task]
                self._free.append(slot)
                found.append(task)
        return found

    def stop(self):
        """Asks all to save and end: SIGTERM."""
        for process, _ in self._at_work.values():
            process.send_signal(signal.SIGTERM)

    def kill(self):
        """Ends all at once."""
        for process, _ in self._at_work.values():
            process.kill()


def _cpus():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class RayWorkers:
    """Processes on the machines of a Ray cluster that is there already.

    All machines must see the sweep's directory, the recipe and the data under
    the same paths, and have keras_stable installed.

    Args:
        cpus: int. CPUs, and threads, of a process. Defaults to 1.
        gpus: float. GPUs of a process, of which a part is a share of one's
            memory. Defaults to 1 if the cluster has any, otherwise 0.
        cache: as in `LocalWorkers`, on each machine.
        address: of the cluster, see `ray.init`. A Ray that this process has
            begun is used as it is.

    Attributes:
        capacity: int. How many fit into the cluster at once, as it is now.
        tasks: list of `Task`s that run.

    Raises:
        ImportError: if Ray is not installed.
        ValueError: if there is no cluster, or none in which one fits.
    """

    def __init__(self, cpus=1, gpus=None, cache=None, address="auto"):
        self._ray = ray = _ray()
        self._cpus = check_integer(cpus, "`cpus`", 1)
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False)
            except ConnectionError as error:
                raise ValueError(
                    f"There is no Ray cluster at address {address!r}: begin "
                    f"one with `ray start --head`. Ray says: {error}"
                ) from error
        there = ray.cluster_resources()
        if gpus is None:
            gpus = 1 if there.get("GPU") else 0
        check_number(gpus, "`gpus`", low=-1e-9)
        self._gpus = gpus
        if not self.capacity:
            raise ValueError(
                f"A process of {cpus} CPUs and {gpus:g} GPUs does not fit "
                f"into the cluster, which has {there.get('CPU', 0):g} and "
                f"{there.get('GPU', 0):g}."
            )
        # As text: Ray's workers need not import all of this package.
        for module in (processes, sys.modules[__name__]):
            ray.cloudpickle.register_pickle_by_value(module)
        self._remote = ray.remote(_run).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=0
        )
        settings = {"threads": cpus, "share": gpus or 1.0, "cache": cache}
        self._how, self._at_work = (settings, os.getcwd()), {}

    @property
    def capacity(self):
        there = self._ray.cluster_resources()
        fits = there.get("CPU", 0) // self._cpus
        if self._gpus:
            shares = max(math.floor(1 / self._gpus + 1e-6), 1)
            whole = max(self._gpus, 1)
            fits = min(fits, there.get("GPU", 0) // whole * shares)
        return int(fits)

    @property
    def tasks(self):
        return [*self._at_work]

    def start(self, task):
        """Gives a task to the cluster: True."""
        folders = [os.path.abspath(folder) for folder in task.folders]
        task.exit_code = None
        self._at_work[task] = self._remote.remote(
            task.command, folders, *self._how
        )
        return True

    def ended(self):
        """Those that ended since it was last asked, a list of `Task`s."""
        references = [*self._at_work.values()]
        if not references:
            return []
        done, _ = self._ray.wait(
            references, num_returns=len(references), timeout=0
        )
        found = [t for t, ref in self._at_work.items() if ref in done]
        for task in found:
            reference = self._at_work.pop(task)
            try:
                task.exit_code, task.begun = self._ray.get(reference)
            except self._ray.exceptions.TaskCancelledError:
                task.exit_code = -signal.SIGTERM
            except self._ray.exceptions.RayError as error:
                # Of Python there, or of a machine that is gone.
                task.exit_code, task.problem = 1, str(error)
        return found

    def stop(self):
        """Asks all to save and end: SIGTERM."""
        for reference in self._at_work.values():
            self._ray.cancel(reference)

    def kill(self):
        """Ends all at once."""
        for reference in self._at_work.values():
            self._ray.cancel(reference, force=True)


def _ray():
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "The engine 'ray' runs on a Ray cluster, and Ray is not "
            "installed: pip install 'keras-stable[ray]'. The engine 'local' "
            "needs nothing."
        ) from error
    return ray


def _run(command, folders, settings, where):
    """On a machine of the cluster: runs a command, and ends it if told so."""
    os.chdir(where)
    task = Task((), command, folders)
    process = launch(task, settings_of(**settings))
    if process is None:
        return None, 0
    try:
        while process.poll() is None:
            time.sleep(0.1)
    except KeyboardInterrupt:  # Cancelled.
        process.terminate()
        process.wait()
    return process.returncode, task.begun


ENGINES = {"local": LocalWorkers, "ray": RayWorkers}


def workers(engine="local", **options):
    """The engine of a name, made with those options that are not None.

    Args:
        engine: name in `ENGINES`.
        **options: of that engine.

    Raises:
        ValueError: for an unknown engine, or an option of another one.

    >>> workers("local", slots=2, gpus=None).capacity
    2
    """
    if engine not in ENGINES:
        raise nearest(engine, ENGINES, "engine")
    kind = ENGINES[engine]
    options = {k: v for k, v in options.items() if v is not None}
    allowed = inspect.signature(kind).parameters
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"{name!r} is no option of the engine {engine!r}, which "
                f"takes {', '.join(allowed)}. Leave it out."
            )
    return kind(**options)
