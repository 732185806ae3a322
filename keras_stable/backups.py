"""Copies of a training's whole state, to go back to while `fit` goes on."""

import json
import os
import threading
from pathlib import Path

import numpy as np

from keras_stable import backend
from keras_stable import training_state
from keras_stable.backend import internals
from keras_stable.backend import saving
from keras_stable.backup_files import Backup
from keras_stable.backup_files import find
from keras_stable.backup_files import name_of
from keras_stable.backup_files import read
from keras_stable.backup_files import write
from keras_stable.choices import check_integer

# Copies that no one has judged yet: the one to be judged next, and the newest.
WAITING = 2
_SEED = "seed/keras"


class Backups:
    """Copies of all that a training is, taken and put back within `fit`.

    A copy holds weights, other variables of the model (statistics, seed
    generators, sigma-Reparam's vectors), those of optimizer and loss scale
    and of metrics, and the seeds of Python, numpy, Keras and torch. Training
    on from one makes, given the same batches, the numbers that it made, bit
    by bit.

    `take` lets the device copy its arrays, which takes a fraction of a step,
    and a thread brings them to where they stay. On jax they are written to
    pinned memory of the host, as much as they are, which XLA keeps for the
    next (of 64 GB, if `XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB` does not say more);
    on torch, until they have left, they take as much of the device's memory.
    TensorFlow waits for its copies.
    Where replicas of `tf.distribute` have moving statistics of their own, all
    get those of the first.

    A copy counts for nothing until it is certified, which one with a NaN or
    an infinity among weights and optimizer's slots never is: it is dropped.
    At most `keep` certified ones are kept, the newest, and two that are not
    yet: the older stays until it is judged, the younger gives way.

    Args:
        model: `keras.Model`, built and compiled.
        directory: if given, each copy is a file there and none stays in
            memory; those of a process before are found again. Of one process.
        keep: int. How many certified ones are kept. Defaults to 3.

    Attributes:
        nbytes: int. Bytes that the copies take up, in memory or as files.

    Raises:
        ValueError: for arguments out of range; for a file in the directory
            that is damaged or none of ours; for several processes, on jax or
            with a directory.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> backups = Backups(model)
    >>> backups.take(step=0, place=0, certified=True)
    >>> x, y = np.ones((4, 3)), np.ones((4, 2))
    >>> before = model.evaluate(x, y, verbose=0)
    >>> _ = model.fit(x, y, verbose=0)
    >>> backups.restore(backups.newest())
    >>> before == model.evaluate(x, y, verbose=0)
    True
    """

    def __init__(self, model, directory=None, keep=3):
        self.keep = check_integer(keep, "`keep`", 1)
        self._model, self._thread = model, None
        several = backend.processes() > 1
        if several and (saving.JAX or directory is not None):
            raise ValueError(
                "Several processes that train one model have no `Backups` on "
                "jax, and none in a directory. Use `Checkpoints`."
            )
        self.directory = None if directory is None else Path(directory)
        self._all = []
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._all = find(self.directory)

    @property
    def nbytes(self):
        return sum(backup.nbytes for backup in self._settled())

    def take(self, step, place, extra=None, certified=False):
        """Begins a copy of the state as it is now.

        On jax, `fit` has to be told before it: between two steps, that is in
        a callback's `on_train_batch_begin` or `on_train_batch_end`.

        Args:
            step: int. Steps made until now; another copy of it is replaced.
            place: int. The place in the data that comes next.
            extra: what else belongs to it, of JSON's values.
            certified: bool. Whether it is good as it is: for the beginning.

        Raises:
            ValueError: for arguments out of range, or `extra` not of JSON.
        """
        step = check_integer(step, "`step`", 0)
        place = check_integer(place, "`place`", 0)
        try:
            extra = json.loads(json.dumps(extra))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`extra` must be of JSON's values. {error}"
            ) from error
        kept = [b for b in self._settled() if b.step != step]
        waiting = sorted(_waiting(kept), key=lambda backup: backup.step)
        if not certified:
            for backup in waiting[WAITING - 1 :]:
                kept.remove(backup)
        self._keep(kept)
        variables = self._variables()
        seeds = training_state.host_seeds()
        try:
            copies = backend.start_copies(list(variables.values()))
        except Exception as error:
            # Most likely of memory: the training is worth more.
            print(f"\nBackups: {_none(step, error)}", flush=True)
            return
        backup = Backup(step, place, extra, certified, seeds=seeds)
        self._keep([*self._all, backup])
        if self.directory is not None:
            backup.path = self.directory / name_of(backup)
        self._thread = threading.Thread(
            target=_finish, args=(backup, list(variables), copies)
        )
        self._thread.start()

    def capture(self):
        """A `Backup` of the state as it is, be it good or not; not kept."""
        variables = self._variables()
        seeds = training_state.host_seeds()
        copies = backend.start_copies(list(variables.values()))
        arrays = dict(zip(variables, backend.finish_copies(copies)))
        return Backup(0, 0, seeds=seeds, arrays=arrays)

    def _variables(self):
        variables = saving.variables_of(self._model, metrics=True)
        return {**variables, _SEED: saving.default_seed()}

    def certify(self, up_to):
        """Says that the copies up to a step are good, but for broken ones.

        A later copy, which may be at work, is not waited for.

        Returns:
            How many it was: not those with a number that is not finite, or
            whose file could not be written.
        """
        waiting = [b for b in _waiting(self._all) if b.step <= up_to]
        if not waiting:
            return 0
        found = [b for b in waiting if b in self._settled()]
        for backup in found:
            backup.certified = True
            if backup.path is not None:
                path = self.directory / name_of(backup)
                os.replace(backup.path, path)
                backup.path = path
        self._keep(self._all)
        return len(found)

    def oldest(self):
        """The oldest certified copy, or None."""
        found = [b for b in self._settled() if b.certified]
        return min(found, key=lambda backup: backup.step, default=None)

    def drop(self, after, certified=False):
        """Forgets what is later than a step and not certified; or all of it."""
        kept = [
            backup
            for backup in self._settled()
            if backup.step <= after or (backup.certified and not certified)
        ]
        self._keep(kept)

    def newest(self, before=None, certified=True):
        """The newest copy, or None.

        Args:
            before: int. Only of steps smaller than this. Defaults to all.
            certified: bool. False: also those that are not certified.
        """
        found = [
            backup
            for backup in self._settled()
            if (before is None or backup.step < before)
            and (backup.certified or not certified)
        ]
        return max(found, key=lambda backup: backup.step, default=None)

    def restore(self, backup):
        """Puts a copy back into model, optimizer, metrics and seeds.

        Between two steps of `fit`, which goes on from there, or outside.
        Copies later than this one stay.

        Raises:
            ValueError: if its file is damaged, or it is of another model; then
                nothing was changed.
        """
        self._settled()
        arrays, where = backup.arrays, f"The backup of step {backup.step}"
        if arrays is None:
            arrays, where = read(backup.path)[1], backup.path
        variables = self._variables()
        _check(arrays, variables, where)
        # Some may not have been there yet.
        self._model.reset_metrics()
        for name, variable in variables.items():
            if name in arrays:
                # A copy: on a CPU, the variable may take the memory itself.
                variable.assign(np.array(arrays[name]))
        internals.forget_counts(self._model.optimizer)
        training_state.set_seeds(backup.seeds)

    def close(self):
        """Waits for the copy at work."""
        self._settled()

    def _settled(self):
        """All copies, none of which is at work or has a fault."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for backup in self._all:
            if backup.fault is not None:
                print(f"\nBackups: {backup.fault}", flush=True)
        self._keep([b for b in self._all if b.fault is None])
        return self._all

    def _keep(self, backups):
        """Keeps these, of the certified ones the newest; deletes others."""
        backups = sorted(backups, key=lambda backup: backup.step)
        good = [backup for backup in backups if backup.certified]
        kept = [b for b in backups if b not in good[: -self.keep]]
        for backup in self._all:
            if backup not in kept and backup.path is not None:
                backup.path.unlink(missing_ok=True)
        self._all = kept


def _waiting(backups):
    return [backup for backup in backups if not backup.certified]


def _finish(backup, names, copies):
    """In a thread of its own: the copy's way to the host, or to its file."""
    try:
        arrays = dict(zip(names, backend.finish_copies(copies)))
        backup.nbytes = sum(array.nbytes for array in arrays.values())
        broken = next(filter(None, (_broken(*x) for x in arrays.items())), None)
        if broken:
            backup.fault = f"none of step {backup.step}: {broken}."
        elif backup.path is None:
            backup.arrays = arrays
        else:
            write(backup, arrays)
    except Exception as error:
        # Of whatever cause, as a full disk.
        backup.fault = _none(backup.step, error)


def _none(step, error):
    line = str(error).strip().partition("\n")[0]
    return f"none of step {step}: {line or type(error).__name__}"


def _broken(name, array):
    """What is wrong with an array, if it is not finite.

    Metrics may be what they like: nothing is computed from them.
    """
    if "float" in str(array.dtype) and not name.startswith("metrics/"):
        with np.errstate(all="ignore"):
            # In one pass, which another thread hardly feels. One bad number
            # makes the sum one; large ones may, and are looked at.
            sound = np.isfinite(array.sum()) or np.isfinite(array).all()
        if not sound:
            return f"{name} is not finite"
    return None


def _check(arrays, variables, where):
    """Raises unless arrays are those of a model's variables."""

    def kinds(items):
        # Metrics may be built later. Keras counts in int32 or int64.
        return {
            name: f"{x.dtype if 'float' in str(x.dtype) else 'int'} "
            f"{list(x.shape)}"
            for name, x in items.items()
            if not name.startswith("metrics/")
        }

    theirs, ours = kinds(arrays), kinds(variables)
    names = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
    if names:
        name = names[0]
        raise ValueError(
            f"{where} is of another model or optimizer: {name} is "
            f"{theirs.get(name)} there and {ours.get(name)} here, and "
            f"{len(names) - 1} more."
        )
