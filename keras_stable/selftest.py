"""Faults put into a model on purpose: does the monitor find them?"""

import contextlib
import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_stable import taps
from keras_stable.backend import internals
from keras_stable.diagnosis import Diagnosis
from keras_stable.events import Event
from keras_stable.packing import STATISTICS
from keras_stable.packing import VARIABLE_STATISTICS
from keras_stable.watch import watch

# Steps without a fault: detectors are silent in the first 64.
BASELINE = 80
# What data is made of where the model leaves dimensions open.
BATCH, LENGTH = 8, 16
# The least tenfold loss that is a spike by its size alone rises by 0.4.
LEAST_LOSS = 0.05


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one fault.

    `fault` and its `place`; `found`: whether the first event of the detector
    for it names that place; that `event`, or None; `delay`: steps from the
    fault to the event, 0 for the same step, or None.
    """

    fault: str
    place: str
    found: bool
    event: Event | None
    delay: int | None


def selftest(model, x=None, y=None, verbose=1):
    """Shows that the monitor finds faults in this model, and names the place.

    | fault    | what is done                       | what must be found     |
    |----------|------------------------------------|------------------------|
    | `nan`    | W[i, j] = NaN in one layer         | `nonfinite`, the layer |
    | `loss`   | 10 x the loss, in one step         | `spike` of the loss    |
    | `gain`   | 4 x a layer's output (W and b x 4) | `jump`, the layer      |
    | `frozen` | dL/dW = 0 exactly, in the step     | `frozen`, the variable |

    The model trains by its own compiled step, on one batch: 80 steps for the
    detectors' baselines, a few for each fault. Afterwards it is as it was:
    weights, optimizer, metrics, train function; also after an error. An
    optimizer that was not built yet is then built.

    Args:
        model: `keras.Model`, built and compiled.
        x, y: a batch as `fit` takes it, or None to have one made up: ids 0
            and 1 for integers, ones for masks, normal numbers; class ids or
            numbers in [0, 1) for targets.
        verbose: 1 prints a table, 0 nothing.

    Returns:
        List of four `Finding`s.

    Raises:
        ValueError: if the model is not built or compiled, if data cannot be
            made up for it, or its loss is below 0.05 (a tenfold one would be
            no spike) or takes no sample weights.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> [finding.found for finding in selftest(model, verbose=0)]
    [True, True, True, True]
    """
    function = getattr(model, "train_function", None)
    telemetry = watch(model)
    with contextlib.ExitStack() as stack:
        # What was compiled before is as good as it was.
        stack.callback(setattr, model, "train_function", function)
        stack.enter_context(telemetry)
        stack.enter_context(_restored(model))
        findings = _run(model, telemetry, _batch(model, x, y))
    if verbose:
        _print(findings)
    return findings


def _run(model, telemetry, batch):
    variables, slots = model.variables, model.optimizer.variables
    weights, step = _read(variables), 0
    diagnosis = None

    def train(weights, factor=1.0):
        """One step from these weights: its sample and its events."""
        nonlocal diagnosis, step
        # Weights go back before each step, and with them dropout's seeds:
        # the baseline is quiet whatever the learning rate, its schedule or
        # the optimizer are. A tiny rate could not be set under a schedule.
        _write(variables, weights)
        x, y, scale = batch
        scale = keras.tree.map_structure(lambda w: w * factor, scale)
        # Not KerasHub's, which would preprocess once more.
        keras.Model.train_on_batch(model, x, y, scale)
        samples = telemetry.read()
        if not samples:
            raise ValueError(
                f"{type(model).__name__} has a `train_step` of its own that "
                "does not call `compute_loss`, `optimizer.apply` and "
                "`compute_metrics`: there is nothing to measure."
            )
        step += 1
        diagnosis = diagnosis or Diagnosis(telemetry.layouts[True])
        return samples[-1], diagnosis.update(step, samples[-1])

    for _ in range(BASELINE):
        sample, _ = train(weights)
    loss = sample.scalars["loss"]
    if not LEAST_LOSS <= loss < math.inf:
        raise ValueError(
            f"The loss of the batch must be finite and at least {LEAST_LOSS}, "
            f"for ten times it to be a spike. Received: {loss:.3g}. Pass "
            "another `x` and `y`."
        )
    layers = _layers(model, telemetry.layouts[True], sample)
    before = _read(slots), diagnosis.state()
    # An optimizer that accumulates gradients updates in every nth step only.
    (inner, *_) = internals.unwrapped(model.optimizer)
    patience = 5 * (inner.gradient_accumulation_steps or 1)

    def attempt(fault, place, detector, weights, factor=1.0):
        nonlocal step
        _write(slots, before[0])
        diagnosis.restore(before[1])
        step = BASELINE
        while step < BASELINE + patience:
            sample, events = train(weights, factor)
            if factor != 1 and not sample.scalars["loss"] > 5 * loss:
                raise ValueError(
                    f"Sample weights of {factor:.0f} change the loss from "
                    f"{loss:.3g} to {sample.scalars['loss']:.3g} only: the "
                    "self-test needs a loss that takes them, with Keras's "
                    "default reduction."
                )
            factor = 1.0
            for event in events:
                if event.detector == detector:
                    first = f"first in the forward pass: {place}"
                    found = event.series == place
                    found |= first in event.detail.split("; ")
                    delay = event.step - BASELINE - 1
                    return Finding(fault, place, found, event, delay)
        return Finding(fault, place, False, None, None)

    def changed(layer, fault):
        """The weights, those of one layer by `fault(variable, value)`."""
        own = {id(v) for v in layer.trainable_variables}
        return [
            fault(v, np.array(a)) if id(v) in own else a
            for v, a in zip(variables, weights)
        ]

    def poisoned(variable, value):
        if variable is kernel:
            value[tuple(n // 2 for n in value.shape)] = np.nan
        return value

    # Four times what is inside of a softmax is not four times its output, and
    # a relu that TensorFlow fuses with its convolution makes 0 of NaN.
    plain = (None, keras.activations.linear)
    kept = [x for x in layers if getattr(x[0], "activation", None) in plain]
    kept, findings = kept or layers, []
    layer, name, kernel = kept[len(kept) // 4]
    findings += [attempt("nan", name, "nonfinite", changed(layer, poisoned))]
    findings += [attempt("loss", "loss", "spike", weights, 10.0)]
    layer, name, _ = kept[len(kept) // 2]
    louder = changed(layer, lambda variable, value: 4 * value)
    findings += [attempt("gain", name, "jump", louder)]
    _, _, kernel = layers[3 * len(layers) // 4]
    with _frozen(model, kernel):
        findings += [attempt("frozen", kernel.path, "frozen", weights)]
    return findings


def _layers(model, layout, sample):
    """`(layer, name, kernel)` of layers that work, in forward order."""
    chosen, _ = taps.choose(model)
    rms = sample.tensors[:, STATISTICS.index("rms")]
    gradients = sample.variables[:, VARIABLE_STATISTICS.index("gradient_rms")]
    alive = {n for n, r in zip(layout.tensors, rms) if 0 < r < math.inf}
    alive |= {
        n for n, g in zip(layout.variables, gradients) if 0 < g < math.inf
    }
    found = []
    for layer, name in chosen.items():
        # Not embeddings, of whose rows a batch uses few.
        kernels = [
            v
            for v in layer.trainable_variables
            if v.name.endswith("kernel") and v.path in alive
        ]
        leaf = not any(x.weights for x in internals.sublayers(layer))
        if leaf and kernels and name in alive:
            found.append((layer, name, kernels[0]))
    if not found:
        raise ValueError(
            f"{model.name!r} has no layer with a trainable kernel that puts "
            "out and learns anything on this batch."
        )
    return sorted(found, key=lambda x: layout.tensors.index(x[1]))


@contextlib.contextmanager
def _frozen(model, variable):
    """Makes a variable's gradient zero; the step is compiled once more."""
    index = [v.path for v in model.trainable_variables].index(variable.path)
    optimizer, undo = model.optimizer, []

    def wrap(name, at):
        # Around what `watch` wraps, which is given the zeros.
        original = getattr(optimizer, name)

        def apply(*args):
            gradients = list(args[at])
            gradients[index] = ops.zeros_like(gradients[index])
            return original(*args[:at], gradients, *args[at + 1 :])

        undo.append(internals.replace(optimizer, name, apply))

    wrap("stateless_apply", 1)  # jax's step calls this, the others' the next.
    wrap("apply", 0)
    try:
        model.make_train_function(force=True)
        yield
    finally:
        for function in undo:
            function()


@contextlib.contextmanager
def _restored(model):
    """Leaves the values of all variables as they were."""
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    groups = model.variables, optimizer.variables, model.metrics_variables
    variables = [v for group in groups for v in group]
    values, steps = _read(variables), model.steps_per_execution
    model.steps_per_execution = 1
    try:
        yield
    finally:
        model.steps_per_execution = steps
        model.reset_metrics()  # Also those made meanwhile.
        _write(variables, values)


def _read(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def _write(variables, values):
    for variable, value in zip(variables, values):
        variable.assign(value)


def _batch(model, x, y):
    """`(x, y, sample_weight)` of one batch, each as the step takes it."""
    rng, weight = np.random.default_rng(0), None
    if x is None:
        x = _inputs(model, rng)
    elif hasattr(model, "preprocess_samples"):
        data = model.preprocess_samples(x, y)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    outputs = _outputs(model, x)
    if y is None:
        y = _targets(model, outputs, rng)
    if weight is None:
        # As many axes as the loss has before it is summed.
        weight = keras.tree.map_structure(
            lambda z: np.ones(
                (z.shape[0], *(1 for _ in z.shape[2:])), "float32"
            ),
            outputs,
        )
    return x, y, weight


def _outputs(model, x):
    """Shapes of the outputs for a batch; nothing is computed."""

    def spec(a):
        dtype = keras.backend.standardize_dtype(a.dtype)
        return keras.KerasTensor(tuple(a.shape), dtype)

    return model.compute_output_spec(keras.tree.map_structure(spec, x))


def _inputs(model, rng):
    def make(spec):
        shape = (BATCH, *(LENGTH if n is None else n for n in spec.shape[1:]))
        dtype = keras.backend.standardize_dtype(spec.dtype)
        if dtype == "bool" or "mask" in spec.name:
            return np.ones(shape, dtype)
        if "int" in dtype:
            return rng.integers(0, 2, shape).astype(dtype)
        # As float32: numpy has no bfloat16.
        return rng.normal(size=shape).astype("float32")

    try:
        spec = getattr(model, "input", None)
        if spec is None:
            (spec,) = model.inputs  # A `Sequential` has only these.
        return keras.tree.map_structure(make, spec)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"No data can be made up for {model.name!r}, which does not tell "
            "the shapes and numeric dtypes of its inputs. Pass `x` and `y`."
        ) from error


def _targets(model, outputs, rng):
    """Class ids where the loss is sparse, else numbers in [0, 1)."""
    flat, losses = keras.tree.flatten(outputs), keras.tree.flatten(model.loss)
    if len(losses) == 1:
        losses *= len(flat)
    alike = not isinstance(model.loss, dict) or isinstance(outputs, dict)
    if not alike or len(losses) != len(flat) or None in losses:
        raise ValueError(
            "No targets can be made up for the loss of "
            f"{model.name!r}. Received: loss={model.loss!r}. Pass `x` and `y`."
        )
    made = []
    for loss, output in zip(losses, flat):
        names = (loss, getattr(loss, "name", ""), getattr(loss, "__name__", ""))
        kinds = " ".join(c.__name__ for c in type(loss).__mro__)
        if "sparse" in f"{names} {kinds}".lower():
            classes = min(2, output.shape[-1])
            y = rng.integers(0, classes, output.shape[:-1]).astype("int32")
        else:
            y = rng.random(tuple(output.shape)).astype("float32")
        made.append(y)
    return keras.tree.pack_sequence_as(outputs, made)


def _print(findings):
    width = max(len(finding.place) for finding in findings)
    print(f"fault   {'place':{width}}  found  delay  event")
    for f in findings:
        found, delay = "yes" if f.found else "NO", f.delay
        delay, event = "-" if delay is None else delay, f.event
        print(
            f"{f.fault:6}  {f.place:{width}}  {found:5}  {delay:>5}  "
            f"{event.detail if event else 'none'}"
        )
