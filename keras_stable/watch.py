"""Measuring any Keras model as it trains, without touching its code.

`watch` wraps the calls of chosen layers, the loss, the optimizer's update and
the making of the train function: each on the one object, each undone. What
they find leaves the compiled step in its logs, as one vector (`packing`).
"""

import collections
import functools
import weakref

import keras

from keras_stable import backend
from keras_stable import packing
from keras_stable import taps
from keras_stable import telemetry
from keras_stable import updates
from keras_stable.backend import internals
from keras_stable.guard import GuardedStep

KEY = "keras_stable_telemetry"


# The last `Watch` of a model, by the model's id. A model keeps its watch alive
# and not this.
_watched = weakref.WeakValueDictionary()


def watch(
    model, include=None, exclude=None, inputs=False, guard=None, tables=True
):
    """Measures each training step of a model, until it is told not to.

    Works for any built and compiled Keras model: `fit` and `train_on_batch`
    go on as before. Outputs, weights, their number, files and configurations
    stay what they were.

    By default it measures what every layer that owns a matrix puts out
    (linear layers, convolutions, embeddings), the residual stream (the output
    of each block, and of `Add` layers), attention logits, gradients and
    updates: see `STATISTICS`, `HEAD_STATISTICS`, `VARIABLE_STATISTICS`.

    Args:
        model: `keras.Model`, built and compiled.
        include: regular expression, searched in layers' paths: which layers'
            outputs are measured, of whatever class. Defaults to the above.
        exclude: regular expression: which of these are not.
        inputs: bool. Whether the inputs of these layers are measured too.
        guard: `Guard`, which leaves out steps that do not keep to it, or None.
        tables: bool. False: scalars alone are measured, and `full` stays
            False. So it must be where each process of torch, or replica of
            `tf.distribute`, sees a part of the batch: scalars are of the whole
            there, if our `AdamW` merges the gradients.

    Returns:
        A `Watch`. It is a context manager; `remove()` ends it as well, and so
        does watching the model anew.

    Raises:
        ValueError: if the model is not built or compiled, an expression is
            none or finds no layer; later, when it begins to train, if it
            cannot be measured there.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> with watch(model) as telemetry:
    ...     _ = model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
    >>> telemetry.read()[-1].tensors.shape
    (1, 6)
    """
    before = _watched.get(id(model))
    if before is not None:
        before.remove()
    new = Watch(model, include, exclude, inputs, guard, tables)
    _watched[id(model)] = new
    return new


class Watch:
    """A model whose training steps are measured; made by `watch`.

    Attributes:
        full: bool. Whether the next step measures the full table; otherwise
            it measures the scalars alone. Each has its own compiled program.
        layouts: dictionary from `full` to the `Layout` of what was traced.
        paths: names of the layers chosen.
        shown: dictionary of numbers that are added to each step's logs.
        measures: bool. False once a step came out without measurements: the
            model's own `train_step` passes by what is observed.
        feed: function without arguments that returns a batch, or None. The
            next steps train on what it returns, and pass over what `fit`
            brings them.
    """

    def __init__(
        self,
        model,
        include=None,
        exclude=None,
        inputs=False,
        guard=None,
        tables=True,
    ):
        _check(model)
        self._guarded = None if guard is None else GuardedStep(guard, {})
        self.full, self.inputs, self._tables = tables, inputs, tables
        self.layouts, self._programs, self._store = {}, {}, {}
        self._traced, self._optimizer = packing.Traced(), None
        self.measures = True
        self.shown, self.feed, self._fed = {}, None, {}
        self._pending, self._seen = collections.deque(maxlen=1000), {}
        self._model, self._undo = model, []
        chosen, scopes = taps.choose(model, include, exclude)
        self.paths = list(chosen.values())
        for layer, path in scopes.items():
            self._wrap(layer, taps.scope(path))
        for layer, path in chosen.items():
            self._wrap(layer, taps.measured(path))
        for layer in scopes:
            for child in internals.sublayers(layer):
                if isinstance(child, keras.layers.Softmax):
                    self._wrap(child, taps.softmax(taps.cap_of(layer)))
        for layer in {**scopes, **chosen}:
            if internals.is_rematerialized(layer):
                undo = internals.escaping_remat(layer, telemetry.escaping)
                self._undo.append(undo)
        self._make = model.make_train_function
        self._patch(model, "compute_loss", self._compute_loss)
        self._patch(model, "compute_metrics", self._compute_metrics)
        self._patch(model, "make_train_function", self._make_train_function)
        self._undo.append(backend.carry(model, self._carry))
        self._undo.append(backend.each_step(model, self._collect))
        # What was traced before knows nothing of this.
        model.train_function = None

    def _patch(self, owner, name, wrapper):
        original = getattr(owner, name)
        wrapped = functools.partial(wrapper, original)
        wrapped = functools.update_wrapper(wrapped, original)
        self._undo.append(internals.replace(owner, name, wrapped))

    def _wrap(self, layer, wrapper):
        quantized = getattr(layer, "quantization_mode", None) is not None
        self._patch(layer, "quantized_call" if quantized else "call", wrapper)

    def remove(self):
        """Leaves the model as it was. Doing it twice is fine."""
        if self._undo:
            for undo in reversed(self._undo):
                undo()
            self._undo = []
            self._model.train_function = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.remove()

    def read(self):
        """What the steps since the last reading measured, in their order.

        Waits for the device.

        Returns:
            List of `Sample`s.
        """
        return [s for samples in self.executions() for s in samples]

    def executions(self, keep=0):
        """The same, a list for each execution: several steps, if compiled so.

        The last `keep` executions are left for the next reading: the device
        may be at work on them.
        """
        found = []
        for vectors_of in self.arrays(keep):
            samples = []
            for full, vectors in vectors_of:
                if vectors.ndim == 1:
                    vectors = vectors[None]
                else:
                    vectors = self._new(full, vectors)
                layout = self.layouts[full]
                samples += [packing.unpack(v, layout, full) for v in vectors]
            found.append(samples)
        return found

    def arrays(self, keep=0):
        """What they measured as it came, `(full, array)` a compiled step."""
        while len(self._pending) > keep:
            handles = self._pending.popleft()
            yield [(full, backend.finish_read(x)) for full, x in handles]

    def _new(self, full, ring):
        """The rows of several steps that were not read yet."""
        *rows, (count, *_) = ring
        begin, self._seen[full] = self._seen.get(full, 0), int(count)
        return [rows[i % len(rows)] for i in range(begin, int(count))]

    # Around the model's own methods, which each of these is given first.

    def _compute_loss(self, original, *args, **kwargs):
        loss = original(*args, **kwargs)
        recorder = telemetry.recorder()
        if recorder is not None and recorder.open:
            recorder.open = False
            self._traced.forward = self._summarize(recorder, loss)
        return loss

    def _summarize(self, recorder, loss):
        def reached(records):
            firsts = (keras.tree.flatten(r.value)[0] for r in records)
            return [
                record
                for record, value in zip(records, firsts)
                if backend.reachable(value, loss)
            ]

        tensors, heads = reached(recorder.tensors), reached(recorder.heads)
        values, layout = packing.forward(recorder.full, tensors, heads, loss)
        names = {r.name for r in (*recorder.tensors, *recorder.heads)}
        names -= {*layout.tensors, *layout.heads}
        layout.unreachable = sorted(names)
        self._traced.layout = layout
        return values

    def _carry(self, y_pred):
        forward, self._traced.forward = self._traced.forward, None
        return y_pred if forward is None else packing.Carried(y_pred, forward)

    def _before(self, *args):
        recorder = telemetry.recorder()
        if recorder is None:
            return None
        found = updates.before(self._optimizer, recorder.full, *args)
        forward = self._traced.forward  # On jax, on its way out of the trace.
        if forward is not None and backend.sees_a_part(self._model):
            forward, squares = packing.of_all(forward, found["squares"])
            found["squares"], self._traced.forward = squares, forward
        if self._guarded is not None and forward is not None:
            loss = forward["loss"]
            found["left_out"] = self._decide(found, loss)
        return found

    def _decide(self, found, loss):
        norm = updates.gradient_norm(found, self._traced.layout.tensors)
        scaled = hasattr(self._optimizer, "dynamic_scale")
        return self._guarded.decide(loss, norm, scaled)

    def _after(self, found, *args):
        recorder = telemetry.recorder()
        if found is not None:
            self._traced.found = updates.after(
                self._optimizer,
                recorder.full,
                found,
                *args,
                guarded=self._guarded is not None,
            )

    def _compute_metrics(self, original, x, y, y_pred, *args, **kwargs):
        forward, self._traced.forward = self._traced.forward, None
        if isinstance(y_pred, packing.Carried):
            y_pred, forward = y_pred
        logs = original(x, y, y_pred, *args, **kwargs)
        found, self._traced.found = self._traced.found, None
        if forward is None or found is None:
            return logs
        full, layout = telemetry.recorder().full, self._traced.layout
        left_out = None
        if self._guarded is not None:
            left_out = self._guarded.left_out
            if left_out is None:
                left_out = self._decide(found, forward["loss"])
            self._guarded.put_back()
            logs = {**logs, **self._model.get_metrics_result()}
        scalars, table, layout.variables = updates.summarize(
            self._optimizer, full, found, layout.tensors, left_out
        )
        packed, largest = packing.pack(full, forward, scalars, table)
        self.layouts[full] = layout
        steps = self._model.steps_per_execution
        shown = {"gradient_norm": scalars[0]}
        if layout.heads:
            shown["max_logit"] = largest
        return {
            **logs,
            **shown,
            KEY: backend.gather(packed, steps, self._store),
        }

    def _make_train_function(self, original, force=False):
        model = self._model
        if model.train_function is not None and not force:
            return
        backend.check_observable(model, self._tables)
        if model.optimizer is not self._optimizer:
            # The first time, or compiled anew.
            self._optimizer = model.optimizer
            self._undo.append(
                backend.observe_updates(
                    model.optimizer, self._before, self._after
                )
            )
            if self._guarded is not None:
                self._undo.append(self._guarded.slow(model.optimizer))
        # Both at once: for a distribution Keras asks weights where they lie,
        # and on jax they have no values while an epoch goes on.
        kinds = (False, True) if self._tables else (False,)
        self._programs = {full: self._program() for full in kinds}
        model.train_function = self._run

    def _program(self):
        """A train function, of full or of light steps: as `full` says then."""
        model = self._model
        train_step = type(model).train_step.__get__(model)
        regions = {}

        # Each program needs a function of its own: jax takes two bound
        # methods for one, and would reuse what it traced of the first.
        def step(*args, **kwargs):
            recorder = telemetry.Recorder(
                self.full, self.inputs, regions=regions
            )
            self._traced.layout = packing.Layout()
            # Of models too that do not queue their own numbers.
            with telemetry.recording(recorder), backend.queueing():
                return train_step(*args, **kwargs)

        if self._guarded is not None:
            step = self._guarded.program(model, step)
        self._undo.append(internals.replace(model, "train_step", step))
        self._make(force=True)
        return model.train_function

    def _run(self, *args):
        self._pending.append([])
        try:
            if self.feed is not None:
                steps = self._model.steps_per_execution
                args = backend.replace_batches(
                    args, self.feed, steps, self._fed
                )
            if self._guarded is not None:
                args = self._guarded.give(args)
            result = self._programs[self.full](*args)
        except StopIteration:
            # The data ended.
            self._pending.pop()
            raise
        except BaseException:
            self._pending.pop()
            self.remove()
            raise
        logs = result[0] if isinstance(result, tuple) else result
        self._collect(logs)
        self.measures = bool(self._pending[-1])
        if isinstance(logs, dict):
            logs.update(self.shown)
        return result

    def _collect(self, logs):
        packed = logs.pop(KEY, None) if isinstance(logs, dict) else None
        if packed is not None:
            handle = (self.full, backend.start_read(packed))
            self._pending[-1].append(handle)


def _check(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`watch` takes a `keras.Model`. Received: {type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built: its layers have no "
            "weights yet. Call it on a batch, or `model.build(shape)`, first."
        )
    if not model.compiled:
        raise ValueError(
            f"The model {model.name!r} is not compiled: there are no training "
            "steps to measure. Call `model.compile(optimizer, loss)` first."
        )
