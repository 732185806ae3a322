"""Checkpoints of training, and going on from them."""

import math
import os
import signal
import threading
from pathlib import Path

import keras

from keras_stable import backend
from keras_stable import snapshots
from keras_stable import training_state
from keras_stable.backend import internals
from keras_stable.backend import saving
from keras_stable.choices import check_integer
from keras_stable.records import read_json
from keras_stable.records import write_json

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(SystemExit):
    """Training was ended by SIGTERM or Ctrl-C, after a checkpoint.

    Not caught, it ends Python with exit code 75.

    Attributes:
        step: int, the last that was made.
        saved: int, step of the newest checkpoint, or None.
    """

    def __init__(self, step, saved):
        super().__init__(INTERRUPTED)
        self.step, self.saved = step, saved


class CheckpointError(RuntimeError):
    """Of the checkpoints that were completed, none is good any more."""


class Checkpoints(keras.callbacks.Callback):
    """Saves the state of training, so that it can go on after any end.

    A checkpoint holds weights, optimizer slots, iterations and loss scale,
    seed generators, sigma-Reparam's vectors, the position in the data, the
    monitor and its detectors, and the seeds of Python, numpy and Keras.
    Training that goes on from one makes, in float32 on as many CPU devices,
    the numbers it would have made, bit by bit. Orbax writes the arrays in the
    background, all processes their own shards, and reads them for whatever
    devices and mesh there are then.

    A checkpoint is healthy or it is not made: while a weight or slot is not
    finite, or the monitor's verdict is lost, nothing is saved and nothing
    deleted. It counts once its manifest is there, the last thing to be
    written, with the SHA-256 of each file. `restore` reads the newest for
    which all of that holds, and tells why it passed over others.

    SIGTERM and Ctrl-C save when the step at work is done, and then raise
    `TrainingInterrupted`, which ends Python with exit code 75; a second Ctrl-C
    ends it at once. A full disk does not end training: it is told, and earlier
    checkpoints stay.

    Keras's own `OrbaxCheckpoint` is not used: it saves neither the position in
    the data nor a monitor, waits for the device at every step, saves what is
    not finite, and is silent when the last save failed.

    Args:
        directory: of the checkpoints alone. All processes must see it.
        every: int. Steps between checkpoints; another is made at the end of
            `fit`. Defaults to 500. None: one when it is told to stop, and no
            other.
        keep_last: int. How many are kept. Defaults to 3.
        keep_every: int. Those at its multiples are kept too. Defaults to
            None: of old ones, none.
        data: the `TokenBatches` or `MixedBatches` that `fit` is given.
        monitor: the `StabilityMonitor`, which comes before it in the list.
        config: dictionary of JSON values: a checkpoint of another is refused.
            Weights' shapes and the optimizer's settings are always compared.

    Attributes:
        step, epoch: int. Batches trained on, and the epoch of the next.
        saved: int or None. Step of the newest good checkpoint.

    Raises:
        ValueError: for arguments out of range.

    Example:

    >>> checkpoints = Checkpoints("run/checkpoints", data=data)
    >>> step = checkpoints.restore(lm)                        # doctest: +SKIP
    >>> lm.fit(                                               # doctest: +SKIP
    ...     data.repeat()[: 1000 - step], callbacks=[checkpoints]
    ... )
    """

    # As the monitor: other threads only take a number down.
    async_safe = True

    def __init__(
        self,
        directory,
        every=500,
        keep_last=3,
        keep_every=None,
        data=None,
        monitor=None,
        config=None,
    ):
        super().__init__()
        self.directory = Path(directory)
        if every is not None:
            check_integer(every, "`every`", 1)
        self.every = every
        self.keep_last = check_integer(keep_last, "`keep_last`", 1)
        if keep_every is not None:
            check_integer(keep_every, "`keep_every`", 1)
        self.keep_every = keep_every
        self.data, self.monitor, self.config = data, monitor, config
        self.step, self.epoch, self.saved = None, 0, None
        self._orbax = self._thread = self._signal = self._seeds = None
        self._handlers, self._lock = {}, threading.Lock()
        self._epoch_begun = self._tried = self._batches = 0

    # Going on.

    def restore(self, model):
        """Loads the newest good checkpoint, before `fit`.

        Args:
            model: built and compiled as when it was saved.

        Returns:
            int, the steps made until then; 0 if none was ever completed.

        Raises:
            CheckpointError: if some were completed, and none is good.
            ValueError: if it is of another model, optimizer, `config`, text
                or version of keras_stable; the message says what differs.
        """
        step, bad = saving.agree_on(self._newest)
        if step >= 0:
            self._load(model, step)
        elif snapshots.was_completed(self.directory):
            reasons = "; ".join(f"step {s}: {r}" for s, r in bad.items())
            raise CheckpointError(
                f"No checkpoint in {self.directory} can be used"
                f"{': ' + reasons if bad else ''}. Put a copy of one there, "
                "or begin anew in another directory."
            )
        self.step = max(step, 0)
        return self.step

    def _newest(self):
        """The step of the newest good one, or -1, and what others lack."""
        bad = {}
        for step in reversed(snapshots.steps(self.directory)):
            reason = snapshots.verify(self.directory, step)
            if reason is None:
                for other, reason in bad.items():
                    print(f"Checkpoint of step {other} passed over: {reason}.")
                    snapshots.set_aside(self.directory, other)
                return step, bad
            bad[step] = reason
        return -1, bad

    def _load(self, model, step):
        path = snapshots.folder(self.directory, step)
        state = read_json(path / snapshots.STATE)
        variables = saving.variables_of(model)
        training_state.check(state, model, variables, self.config, path)
        if self.data is not None:
            self.data.set_state(state["data"])
        arrays = saving.load_arrays(
            self._checkpointer(), path / snapshots.ARRAYS, variables
        )
        for name, variable in variables.items():
            variable.assign(arrays[name])
        if self.monitor is not None and state["monitor"] is not None:
            self.monitor.set_state(state["monitor"])
        self._seeds = state["seeds"]
        self.epoch, self.saved = state["epoch"], step

    def _checkpointer(self):
        """Orbax's, made when it is needed: its import takes a second."""
        if self._orbax is None:
            self._orbax = saving.checkpointer()
        return self._orbax

    # What `fit` calls.

    def on_train_begin(self, logs=None):
        if self.every is not None:
            # Is it installed? Said before the first step.
            self._checkpointer()
        self._begun = None
        self._signal = None
        if threading.current_thread() is threading.main_thread():
            # jax takes SIGTERM itself, and tells the other processes.
            for number in SIGNALS[: 1 if saving.takes_sigterm() else 2]:
                self._handlers[number] = signal.getsignal(number)
                signal.signal(number, self._on_signal)

    def on_epoch_begin(self, epoch, logs=None):
        if self._begun is None:
            if self.step is None:
                self.step = internals.batches_seen(self.model.optimizer)
            self._begun = self._tried = self.step
            if self.data is not None:
                self._data_begun = self.data.get_state()["step"]
        self._epoch_begun, self._batches, self.epoch = self.step, 0, epoch

    def on_train_batch_begin(self, batch, logs=None):
        self.step = self._epoch_begun + batch
        if self._seeds is not None:
            # Not before: to build a model may draw numbers.
            training_state.set_seeds(self._seeds)
            self._seeds = None
        told = self._signal is not None
        self._act(saving.agreed_to_stop(self.step, self._begun, told))

    def on_train_batch_end(self, batch, logs=None):
        # The last of several in one execution may not be there.
        most = self.params.get("steps") or math.inf
        with self._lock:
            self._batches = max(self._batches, min(batch + 1, most))

    def on_epoch_end(self, epoch, logs=None):
        self.step = self._epoch_begun + self._batches
        self.epoch = epoch + 1
        # Several processes agree between two steps.
        self._act(self._signal is not None and backend.processes() == 1)

    def on_train_end(self, logs=None):
        if self.every is not None and self._tried < self.step:
            self.save()
        self.close()

    def close(self):
        """Waits for what is being written, and leaves signals as they were.

        For a `fit` that ended with an exception; otherwise it is done.
        """
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self._wait()

    def _on_signal(self, number, frame):
        self._signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nSaving after this step. Ctrl-C ends at once.\n")
        if saving.takes_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)

    def _act(self, stop):
        every = self.every or math.inf
        due = self.step // every > self._tried // every
        if self._tried < self.step and (due or stop):
            self.save()
        if not stop:
            return
        self.close()
        if self.monitor is not None:
            self.monitor.close()
        self._tell(
            f"Interrupted after step {self.step}; the newest checkpoint is of "
            f"step {self.saved}, in {self.directory}."
        )
        raise TrainingInterrupted(self.step, self.saved)

    # Saving.

    def save(self):
        """Saves the state now, during `fit`, unless it is not healthy."""
        self._wait()
        self._tried = step = self.step
        variables = saving.variables_of(self.model)
        monitor = self.monitor and self.monitor.get_state(step)
        verdict = self.monitor and self.monitor.verdict
        broken = saving.not_finite(variables)
        if broken or (verdict is not None and verdict.lost):
            why = f"{broken[0]} is not finite" if broken else f"it is {verdict}"
            self._tell(
                f"No checkpoint of step {step}: {why}. The newest is of step "
                f"{self.saved}."
            )
            return
        data = None
        if self.data is not None:
            done = self._data_begun + step - self._begun
            if self.monitor is not None and self.monitor.undone:
                # It went back, and on at another place.
                done = self.monitor.place_of(step + 1)
            data = self.data.get_state(done)
        state = {
            "step": step,
            "epoch": self.epoch,
            "verdict": None if verdict is None else str(verdict),
            "data": data,
            "monitor": monitor,
            **training_state.capture(self.model, variables, self.config),
        }
        path = snapshots.folder(self.directory, step)
        try:
            if backend.is_writer():
                snapshots.remove(self.directory, step)
                path.mkdir(parents=True)
                write_json(path / snapshots.STATE, state, indent=None)
            if saving.JAX or backend.is_writer():
                # On jax each process saves its shards; on torch all are equal.
                arrays = path / snapshots.ARRAYS
                saving.save_arrays(self._checkpointer(), arrays, variables)
        except Exception as error:
            # Of Orbax, whatever the cause: the training is worth more.
            self._failed(step, error)
            return
        self._thread = threading.Thread(target=self._finish, args=(step,))
        self._thread.start()

    def _finish(self, step):
        """In a thread of its own: files are complete, then the manifest."""
        try:
            self._orbax.wait_until_finished()
            if backend.is_writer():
                snapshots.seal(self.directory, step)
        except Exception as error:
            self._failed(step, error)
            return
        self.saved = step
        if backend.is_writer():
            snapshots.prune(
                self.directory, step, self.keep_last, self.keep_every
            )

    def _failed(self, step, error):
        if backend.is_writer():
            snapshots.remove(self.directory, step)
        line = str(error).strip().partition("\n")[0]
        self._tell(
            f"The checkpoint of step {step} could not be written: {line} "
            f"Training goes on; the newest is of step {self.saved}."
        )

    def _wait(self):
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _tell(self, text):
        if backend.is_writer():
            print(f"\nCheckpoints: {text}", flush=True)
