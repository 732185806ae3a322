"""The monitor: it sees every step, changes nothing, and stops lost runs."""

import json

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable.packing import SCALARS
from keras_stable.packing import STATISTICS
from keras_stable.telemetry import LastValue

BACKEND = keras.backend.backend()
BATCH = 4
# What watching puts on a model and its optimizer meanwhile.
WRAPPED = {
    *("compute_loss", "compute_metrics", "make_train_function", "train_step"),
    *("apply", "stateless_apply", "compute_loss_and_updates"),
    "_make_function",
}


def functional(cls=keras.Model):
    x = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="tanh", name="hidden")(x)
    return cls(x, keras.layers.Dense(2, name="out")(hidden))


def tiny(optimizer=None, loss="mse", cls=keras.Model, **kwargs):
    model = functional(cls)
    model.compile(optimizer or keras.optimizers.Adam(0.01), loss, **kwargs)
    return model


def attending():
    x = keras.Input((5, 4))
    y = keras.layers.MultiHeadAttention(2, 2, name="attention")(x, x)
    model = keras.Model(x, keras.layers.Dense(1, name="out")(y))
    model.compile("adam", "mse")
    return model


def language_model(variant="qk_norm"):
    backbone = ks.StableBackbone(31, 1, 2, 16, variant=variant)
    model = ks.StableCausalLM(backbone)
    model.compile(ks.AdamW(1e-2), weighted_metrics=None)
    return model


def data(batches, seed=0, last=BATCH):
    rng = np.random.default_rng(seed)
    count = (batches - 1) * BATCH + last
    x = rng.normal(size=(count, 3)).astype("float32")
    return x, np.stack([np.sin(x.sum(1)), x[:, 0]], 1).astype("float32")


def fit(model, *callbacks, batches=8, seed=0, last=BATCH, **kwargs):
    """Training on batches that are the same in each epoch."""
    x, y = data(batches, seed, last)
    kwargs = {"verbose": 0, "shuffle": False, **kwargs}
    callbacks = list(callbacks)
    return model.fit(x, y, batch_size=BATCH, callbacks=callbacks, **kwargs)


def losses_of(model, batches, last=BATCH):
    """Mean squared errors of each batch, by numpy."""
    x, y = data(batches, last=last)
    wrong = model.predict(x, verbose=0, batch_size=len(x)) - y
    parts = np.split(wrong, range(BATCH, len(x), BATCH))
    return [np.mean(part.astype("float64") ** 2) for part in parts]


def values(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def monitor_of(path=None, **kwargs):
    kwargs = {"every": 1, "verbose": 0, **kwargs}
    return ks.StabilityMonitor(path, **kwargs)


def untouched(model):
    """Whether nothing of a monitor is left on a model."""
    layers = model._flatten_layers(include_self=False)
    wrapped = [x for x in layers if "call" in vars(x)]
    left = WRAPPED & {*vars(model), *vars(model.optimizer)}
    return not wrapped and not left


class At(keras.callbacks.Callback):
    """Does something after one step, counted from 1, and counts steps."""

    def __init__(self, step=None, action=None):
        super().__init__()
        self.at, self.action, self.steps = step, action, 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == self.at:
            self.action(self.model)


def interrupt(model):
    raise KeyboardInterrupt


def set_weight(model, value):
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
    kernel = model.get_layer("hidden").kernel
    kernel.assign(np.full(kernel.shape, value, "float32"))


def poison(model):
    set_weight(model, np.nan)


# It changes nothing.


def train(make, monitor, steps):
    keras.utils.set_random_seed(3)
    model = make()
    callbacks = [] if monitor is None else [monitor]
    if make is language_model:
        ids = np.random.default_rng(0).integers(0, 31, (2 * steps, 8))
        x, y = {"token_ids": ids[:, :-1]}, ids[:, 1:]
        model.fit(x, y, batch_size=2, verbose=0, callbacks=callbacks)
    else:
        fit(model, *callbacks, batches=steps, shuffle=True)
    return values(model)


PLAIN = {}  # What training without a monitor comes to.
# Compiled three times, it takes as long as all others.
SLOW = [pytest.mark.slow] if BACKEND != "torch" else []


@pytest.mark.parametrize(
    "make, every",
    [
        (tiny, "auto"),
        (tiny, 1),
        pytest.param(language_model, "auto", marks=SLOW),
        (language_model, 1),
    ],
)
def test_training_is_bit_equal(make, every):
    monitor = monitor_of(every=every)
    observed = train(make, monitor, 100)
    assert monitor.step == 100
    if make not in PLAIN:
        PLAIN[make] = train(make, None, 100)
    for a, b in zip(PLAIN[make], observed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_none_leaves_the_program_alone(tmp_path):
    model, found = tiny(), []

    def look(model):
        found.append((untouched(model), model.train_function))

    monitor, plain = monitor_of(tmp_path, every=None), tiny()
    fit(plain)
    history = fit(model, monitor, At(3, look)).history
    ((clean, function),) = found
    assert clean and function is model.train_function
    assert set(history) == {"loss", "verdict"}
    fit(model)
    assert model.train_function is function
    assert set(vars(model)) == set(vars(plain))
    health = ks.read_health(tmp_path)
    assert not health.tables and not health.layout
    assert [set(r) for r in health.steps] == [
        {"step", "epoch", "batch", "loss"}
    ] * 8


# It sees every step.


def check_positions(health, epochs, batches):
    rows = [(r["step"], r["epoch"], r["batch"]) for r in health.steps]
    places = [(e, b) for e in range(epochs) for b in range(batches)]
    assert rows == [(i + 1, *place) for i, place in enumerate(places)]


def test_records_of_every_step(tmp_path):
    model = tiny(keras.optimizers.SGD(0.0))
    monitor = monitor_of(tmp_path, every=3)
    fit(model, monitor, epochs=2, last=2)
    health = ks.read_health(tmp_path)
    check_positions(health, 2, 8)
    expected = losses_of(model, 8, last=2)
    np.testing.assert_allclose(health.series("loss")[1], expected * 2, 1e-5)
    assert set(health.steps[0]) == {"step", "epoch", "batch", *SCALARS}
    assert np.isnan(health.series("max_logit")[1]).all()
    assert list(health.tables) == [1, 4, 7, 10, 13, 16]
    assert health.layout["tensors"] == ["hidden", "out"]
    assert health.layout["variables"] == [v.path for v in model.weights]
    assert health.layout["heads"] == health.layout["labels"] == {}
    steps, rms = health.table("tensors", "out", "rms")
    assert steps.tolist() == list(health.tables)
    x, _ = data(8, last=2)
    outputs = model.predict(x, verbose=0)
    batches = np.split(outputs, range(BATCH, len(x), BATCH))
    expected = [np.sqrt(np.mean(batches[(s - 1) % 8] ** 2)) for s in steps]
    np.testing.assert_allclose(rms, expected, rtol=1e-3)
    _, rms = health.table("variables", "hidden/kernel", "weight_rms")
    kernel = model.get_layer("hidden").kernel
    expected = np.sqrt(np.mean(keras.ops.convert_to_numpy(kernel) ** 2))
    np.testing.assert_allclose(rms, expected, rtol=1e-3)
    assert set(health.series("update_norm")[1]) == {0.0}
    # A second `fit`, with new weights and the same monitor, goes on.
    fit(model, monitor, batches=5)
    health = ks.read_health(tmp_path)
    assert [r["step"] for r in health.steps] == list(range(1, 22))
    assert [r["batch"] for r in health.steps[16:]] == list(range(5))
    assert monitor.step == 21 and monitor.last["loss"] == pytest.approx(
        health.steps[-1]["loss"]
    )
    assert 19 in health.tables and 22 not in health.tables
    assert untouched(model)


def test_heads_are_recorded_and_logged(tmp_path):
    model = attending()
    x = np.random.default_rng(0).normal(size=(16, 5, 4)).astype("float32")
    y = x.sum(-1, keepdims=True)
    monitor = monitor_of(tmp_path)
    history = model.fit(
        x,
        y,
        batch_size=4,
        verbose=0,
        epochs=2,
        validation_data=(x, y),
        callbacks=[monitor],
    ).history
    names = {"loss", "gradient_norm", "max_logit", "verdict"}
    assert set(history) == {*names, "val_loss"}
    health = ks.read_health(tmp_path)
    # Validation is not recorded.
    check_positions(health, 2, 4)
    (name,) = health.layout["heads"]
    _, heads = health.table("heads", name, "max_logit")
    assert heads.shape == (8, 2)
    _, largest = health.series("max_logit")
    np.testing.assert_allclose(heads.max(1), largest, rtol=1e-4)
    largest = largest.reshape(2, 4).max(1)
    np.testing.assert_allclose(history["max_logit"], largest)
    norms = health.series("gradient_norm")[1].reshape(2, 4).mean(1)
    np.testing.assert_allclose(history["gradient_norm"], norms)
    assert history["verdict"] == [0.0, 0.0]


class Logs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.train, self.test = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.train.append(dict(logs))

    def on_test_batch_end(self, batch, logs=None):
        self.test.append(dict(logs))


def test_logs_of_batches_and_the_progress_bar(capsys):
    logs = Logs()
    fit(
        tiny(),
        monitor_of(every=3),
        logs,
        verbose=1,
        validation_data=data(2),
    )
    assert len(logs.train) == 8
    for line in logs.train:
        assert set(line) == {"loss", "gradient_norm", "verdict"}
        assert line["verdict"] == 0 and line["gradient_norm"] > 0
    assert all(set(line) == {"loss"} for line in logs.test)
    shown = capsys.readouterr().out
    assert "gradient_norm: " in shown and "verdict: 0" in shown
    assert "val_loss: " in shown and "val_gradient" not in shown
    assert "keras_stable" not in shown


class WithBatchLoss(keras.Model):
    """Reports the loss of the last batch, as `StableCausalLM` does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batch_loss = LastValue(name="batch_loss")

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.batch_loss.update_state(loss)
        return loss


@pytest.mark.parametrize("cls", [keras.Model, WithBatchLoss])
def test_losses_without_telemetry(tmp_path, cls):
    model = tiny(keras.optimizers.SGD(0.0), cls=cls)
    history = fit(model, monitor_of(tmp_path, every=None), epochs=2).history
    assert ("batch_loss" in history) == (cls is WithBatchLoss)
    health = ks.read_health(tmp_path)
    check_positions(health, 2, 8)
    expected = losses_of(model, 8) * 2
    np.testing.assert_allclose(health.series("loss")[1], expected, rtol=1e-4)


several = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras has no steps_per_execution on torch"
)


@several
def test_several_steps_in_one_execution(tmp_path):
    model = tiny(keras.optimizers.SGD(0.0), steps_per_execution=3)
    fit(model, monitor_of(tmp_path, every=5), epochs=2)
    health = ks.read_health(tmp_path)
    check_positions(health, 2, 8)
    expected = losses_of(model, 8) * 2
    np.testing.assert_allclose(health.series("loss")[1], expected, rtol=1e-5)
    # An execution has tables if one of its steps should.
    assert list(health.tables) == [1, 2, 3, 4, 5, 6, 9, 10, 11, 15, 16]


@several
def test_several_steps_without_telemetry(tmp_path):
    model = tiny(keras.optimizers.SGD(0.0), steps_per_execution=3)
    monitor = monitor_of(tmp_path, every=None)
    fit(model, monitor, epochs=2)
    assert monitor.step == 16
    health = ks.read_health(tmp_path)
    assert [r["step"] for r in health.steps] == [3, 6, 8, 11, 14, 16]
    parts = np.split(np.array(losses_of(model, 8)), [3, 6])
    means = [part.mean() for part in parts]
    np.testing.assert_allclose(health.series("loss")[1], means * 2, rtol=1e-4)


# It goes on where it stopped.


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(name, epochs, seed):
        keras.utils.set_random_seed(seed)
        model = tiny()
        backup = keras.callbacks.BackupAndRestore(
            tmp_path / f"{name}-backup", delete_checkpoint=False
        )
        monitor = monitor_of(tmp_path / name, every=2)
        fit(model, monitor, backup, batches=20, epochs=epochs)
        assert monitor.step == 20 * epochs
        return ks.read_health(tmp_path / name)

    whole = run("whole", 5, seed=1)
    run("parts", 2, seed=1)
    parts = run("parts", 5, seed=2)
    check_positions(parts, 5, 20)
    assert str(parts.steps) == str(whole.steps)  # NaN is not NaN.
    assert list(parts.tables) == list(whole.tables)
    states = [
        json.loads((tmp_path / name / "monitor.json").read_text())
        for name in ("whole", "parts")
    ]
    assert states[0] == states[1] and states[0]["step"] == 100
    assert states[0]["diagnosis"]["judge"]["seen"] == 100


def test_a_state_of_another_model_is_left_with_a_warning(tmp_path):
    fit(tiny(), monitor_of(tmp_path))
    x = keras.Input((3,))
    other = keras.Model(x, keras.layers.Dense(2, name="only")(x))
    other.compile("adam", "mse")
    fit(other)
    monitor = monitor_of(tmp_path)
    with pytest.warns(UserWarning, match="detectors begin anew"):
        fit(other, monitor)
    assert monitor.step == 16 and monitor._diagnosis.judge.seen == 8


def test_a_second_model_begins_anew():
    monitor = monitor_of()
    for _ in range(2):
        fit(tiny(), monitor)
        assert monitor.step == 8 and monitor._diagnosis.judge.seen == 8


# It stops lost runs.


def halted(model, *callbacks, **kwargs):
    with pytest.raises(ks.TrainingHalted) as caught:
        fit(model, *callbacks, **kwargs)
    return caught.value


def test_halt(tmp_path):
    model = tiny()
    weights = model.get_weights()
    monitor = monitor_of(tmp_path, every=4, policy="halt")
    theirs = At(9, poison)
    error = halted(model, monitor, theirs, batches=50)
    # Step 10 is bad, and it is found when step 11 is done.
    assert theirs.steps <= 12
    assert error.verdict is monitor.verdict is monitor.worst
    assert error.verdict is ks.Verdict.NONFINITE and error.step == 10
    assert error.event in monitor.events and error.event.step == 10
    assert "first in the forward pass: hidden" in error.event.detail
    assert "NONFINITE at step 10, since step 10: loss is nan" in str(error)
    assert str(error.black_box) in str(error)
    with np.load(error.black_box) as box:
        assert box["step"].tolist() == list(range(1, 11))
        assert box["epoch"].tolist() == [0] * 10
        assert box["batch"].tolist() == list(range(10))
        assert np.isnan(box["loss"]).tolist() == [False] * 9 + [True]
        assert box["table_step"].tolist() == [1, 5, 9]
        assert box["tensors"].shape == (3, 2, 6)
        assert box["variables"].shape == (3, 4, 4)
        assert box["tensor_names"].tolist() == ["hidden", "out"]
        assert box["tensor_statistics"].tolist() == list(STATISTICS)
        assert "hidden/kernel" in box["variable_names"]
    health = ks.read_health(tmp_path)
    assert [r["step"] for r in health.steps] == list(range(1, 11))
    assert str(health.events) == str(monitor.events)
    assert [v["verdict"] for v in health.verdicts] == ["NONFINITE"]
    assert error.black_box in health.black_boxes
    # The model is left as it was, and goes on once it is repaired.
    assert untouched(model) and model.train_function is None
    model.set_weights(weights)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    history = fit(model, monitor).history
    assert np.isfinite(history["loss"]).all() and history["verdict"] == [0.0]
    assert untouched(model)


def test_halt_where_attention_has_collapsed(tmp_path):
    model = attending()
    query = model.get_layer("attention").query_dense.kernel
    query.assign(1e5 * query.value)
    monitor = monitor_of(tmp_path, every=10, policy="halt")
    x = np.random.default_rng(0).normal(size=(4, 5, 4)).astype("float32")
    how = {"batch_size": 4, "epochs": 250, "verbose": 0}
    with pytest.raises(ks.TrainingHalted) as caught:
        model.fit(x, x.sum(-1, keepdims=True), callbacks=[monitor], **how)
    error = caught.value
    # A table every ten steps, of which the first after step 64 counts.
    assert (error.step, error.event.onset) == (172, 71)
    assert error.verdict is ks.Verdict.COLLAPSED
    assert "COLLAPSED at step 172, since step 71: most attention" in str(error)
    assert "bound attention logits" in str(error)


@pytest.mark.parametrize("variant", ["soft_cap", "baseline"])
def test_halt_where_attention_is_far_beyond_its_cap(tmp_path, variant):
    model = language_model(variant)
    (query,) = (w for w in model.weights if w.path.endswith("query/kernel"))
    query.assign(1e7 * query.value)
    monitor = monitor_of(tmp_path, every=10, policy="halt")
    x = {"token_ids": np.arange(36).reshape(4, 9) % 31}
    how = {"batch_size": 4, "epochs": 250, "verbose": 0}
    with pytest.raises(ks.TrainingHalted) as caught:
        model.fit(x, x["token_ids"], callbacks=[monitor], **how)
    assert caught.value.verdict is ks.Verdict.COLLAPSED
    assert (caught.value.step, caught.value.event.onset) == (172, 71)
    health = ks.read_health(tmp_path)
    (name,) = health.layout["heads"]
    entropies = health.table("heads", name, "entropy")[1]
    # Of the very same logits those without a cap leave a single key.
    assert np.all(entropies < 0.01) == (variant == "baseline")


def test_halt_in_the_last_step_of_an_epoch_and_without_telemetry(tmp_path):
    good = tmp_path / "good.weights.h5"
    for every in (1, None):
        model = tiny()
        monitor = monitor_of(every=every, policy="halt")
        checkpoint = keras.callbacks.ModelCheckpoint(
            good, save_weights_only=True
        )
        # Bad in step 16, the last of the second epoch.
        error = halted(model, monitor, checkpoint, At(15, poison), epochs=4)
        assert error.step == 16 and error.black_box is None
        model.load_weights(good)
        assert all(np.isfinite(v).all() for v in values(model))


def test_observing_goes_on(capsys):
    found = []
    monitor = monitor_of(on_event=found.append, verbose=1)
    steps = At(3, poison)
    history = fit(tiny(), monitor, steps, epochs=2).history
    assert steps.steps == 16 and found == monitor.events
    assert history["verdict"] == [float(ks.Verdict.NONFINITE)] * 2
    # One event each for all steps in a row, told once.
    assert [(e.detector, e.series, e.step) for e in found][:1] == [
        ("nonfinite", "loss", 4)
    ]
    assert len({(e.detector, e.series) for e in found}) == len(found)
    shown = capsys.readouterr().out
    assert shown.count("StabilityMonitor, step 4: loss is nan") == 1
    assert shown.count("NONFINITE") == 1


def test_a_run_that_was_saved_as_lost_halts_with_an_event(tmp_path):
    model = tiny()
    fit(model, monitor_of(tmp_path), At(3, poison))
    error = halted(model, monitor_of(tmp_path, policy="halt"))
    assert error.step == 9 and error.verdict is ks.Verdict.NONFINITE


def test_an_error_in_the_users_function_leaves_the_model():
    def broken(event):
        raise RuntimeError("theirs")

    model = tiny()
    with pytest.raises(RuntimeError, match="theirs"):
        fit(model, monitor_of(on_event=broken), At(3, poison))
    assert untouched(model)


# Beside others.


def test_a_backup_survives_a_halt_and_training_goes_back(tmp_path):
    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    model = tiny()
    monitor = monitor_of(tmp_path / "run", policy="halt")
    halted(model, monitor, backup(), At(20, poison), epochs=4)
    assert (tmp_path / "backup").exists()
    # The same objects, in the same process.
    steps = At()
    history = fit(model, monitor, backup(), steps, epochs=4)
    assert steps.steps == 16 and history.epoch == [2, 3]
    assert monitor.step == 32 and not monitor.verdict.lost
    assert not (tmp_path / "backup").exists()
    health = ks.read_health(tmp_path / "run")
    check_positions(health, 4, 8)
    assert np.isfinite(health.series("loss")[1]).all()


def test_other_callbacks_get_what_they_need(tmp_path):
    logs = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    stop = keras.callbacks.EarlyStopping(
        "verdict", mode="min", patience=2, baseline=-1.0
    )
    theirs = At()
    history = fit(tiny(), monitor_of(), stop, logs, theirs, epochs=6).history
    assert len(history["loss"]) == 2 and theirs.steps == 16
    header, *rows = (tmp_path / "log.csv").read_text().splitlines()
    assert header.startswith("epoch,gradient_norm,loss,verdict")
    assert len(rows) == 2
    model, terminate = tiny(), keras.callbacks.TerminateOnNaN()
    steps = At(3, poison)
    fit(model, monitor_of(), terminate, steps, epochs=2)
    assert steps.steps == 4 and untouched(model)


def test_beside_tensorboard(tmp_path):
    pytest.importorskip("tensorflow")
    board = keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False)
    monitor = monitor_of(sinks=[ks.TensorBoard(tmp_path / "sink")])
    model = tiny()
    for _ in range(2):
        fit(model, monitor, board)
    assert list((tmp_path / "board" / "train").glob("*tfevents*"))
    # One file for each `fit`.
    assert len(list((tmp_path / "sink").glob("*tfevents*"))) == 2


def check_after_interrupt(model, monitor, path, seen):
    fit(model, monitor, batches=3)
    assert untouched(model)
    health = ks.read_health(path)
    assert [r["step"] for r in health.steps] == list(range(1, seen + 4))
    # The next one is not observed, and not in the way.
    logs = Logs()
    fit(model, logs, batches=3)
    assert set(logs.train[0]) == {"loss"}
    assert len(ks.read_health(path).steps) == seen + 3


def test_interrupted_between_steps(tmp_path):
    model, monitor = tiny(), monitor_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(model, monitor, At(5, interrupt))
    check_after_interrupt(model, monitor, tmp_path, 5)


def test_interrupted_in_a_step(tmp_path):
    armed = []

    def loss(y, y_pred):
        if armed:
            armed.clear()
            raise KeyboardInterrupt
        return keras.losses.mean_squared_error(y, y_pred)

    model = tiny(loss=loss, run_eagerly=True)
    monitor = monitor_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(model, monitor, At(3, lambda model: armed.append(1)))
    assert untouched(model)
    check_after_interrupt(model, monitor, tmp_path, 3)


def test_a_model_interrupted_and_left_can_be_trained(tmp_path):
    model = tiny()
    with pytest.raises(KeyboardInterrupt):
        fit(model, monitor_of(tmp_path), At(5, interrupt))
    # By another monitor, which does not know of the first.
    fit(model, monitor_of(tmp_path))
    health = ks.read_health(tmp_path)
    assert [r["step"] for r in health.steps][-8:] == list(range(6, 14))


# Precision and accumulation.


def scaled(initial_scale):
    keras.config.set_dtype_policy("mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.01), initial_scale=initial_scale
    )
    return tiny(optimizer)


def test_overflow_by_loss_scaling_is_routine(tmp_path):
    model, monitor = scaled(2.0**22), monitor_of(tmp_path)
    fit(model, monitor, epochs=3)
    health = ks.read_health(tmp_path)
    _, skipped = health.series("skipped")
    # Too large for all batches, for some, and for none.
    assert skipped[:4].all() and not skipped[-8:].any()
    _, norms = health.series("gradient_norm")
    assert (np.isfinite(norms) == (skipped == 0)).all()
    _, updates = health.series("update_norm")
    assert ((updates > 0) == (skipped == 0)).all()
    assert monitor.worst is ks.Verdict.OK and not monitor.events
    # The optimizer does not count steps that were skipped.
    fit(model, monitor)
    assert monitor.step == 32


def test_the_loss_scale_is_that_of_the_gradients(tmp_path):
    fit(scaled(2.0**22), monitor_of(tmp_path))
    health = ks.read_health(tmp_path)
    skipped = health.series("skipped")[1]
    before = np.cumsum(skipped) - skipped
    assert (health.series("loss_scale")[1] == 2.0**22 / 2.0**before).all()


def test_loss_scaling_by_keras(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = tiny()
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    fit(model, monitor_of(tmp_path))
    health = ks.read_health(tmp_path)
    assert health.series("loss_scale")[1].tolist() == [2.0**15] * 8
    assert health.series("skipped")[1].tolist() == [0.0] * 8
    norms = health.series("gradient_norm")[1]
    assert (0.01 < norms).all() and (norms < 10).all()


def test_twenty_skips_in_a_row_are_not(tmp_path):
    # Another 2^30 above the largest number of float16.
    monitor = monitor_of(tmp_path, policy="halt")
    error = halted(scaled(2.0**60), monitor, epochs=9)
    assert error.step == 20 and error.verdict is ks.Verdict.NONFINITE
    assert error.event.series == "gradient_norm"


def test_gradient_accumulation(tmp_path):
    model = tiny(keras.optimizers.Adam(0.01, gradient_accumulation_steps=3))
    monitor = monitor_of(tmp_path)
    fit(model, monitor, batches=120)
    health = ks.read_health(tmp_path)
    _, norms = health.series("update_norm")
    updated = np.arange(1, 121) % 3 == 0
    assert ((norms > 0) == updated).all()
    assert (health.series("updated")[1] == updated).all()
    assert not monitor.events and monitor.worst is ks.Verdict.OK


# Bad use is told before training.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"policy": "rewind"}, "policy"),
        ({"policy": None}, "policy"),
        *(
            ({"every": every}, "`every` must be a positive integer")
            for every in (0, -1, 2.5, True, False, "x", "10")
        ),
        *(
            ({"max_overhead": value}, "max_overhead")
            for value in (0, -0.1, "x", None, float("nan"))
        ),
        *(
            ({"warmup_steps": value}, "warmup_steps")
            for value in (-1, "x", True)
        ),
        ({"watch": "("}, "watch"),
        ({"exclude": "*"}, "exclude"),
        ({"watch": 3}, "watch"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ks.StabilityMonitor(**arguments)


def test_bad_use_in_fit(tmp_path):
    model, steps = tiny(), At()
    with pytest.raises(ValueError, match="nowhere"):
        fit(model, monitor_of(watch="nowhere"), steps)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        fit(model, monitor_of(tmp_path / "file"), steps)
    (tmp_path / "health.jsonl").write_text('{"theirs": 1}\n')
    with pytest.raises(FileExistsError, match="not a record of schema"):
        fit(model, monitor_of(tmp_path), steps)
    assert steps.steps == 0 and untouched(model)
    assert (tmp_path / "health.jsonl").read_text() == '{"theirs": 1}\n'
    fit(model, steps)
    assert steps.steps == 8


def test_a_model_must_be_built_and_compiled():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Subclassed()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="not built"):
        ks.watch(model)
    with pytest.raises(ValueError, match="not compiled"):
        ks.watch(functional())
    with pytest.raises(ValueError, match="takes a `keras.Model`"):
        ks.watch(keras.layers.Dense(2))
    monitor = monitor_of()
    if BACKEND == "tensorflow":
        # Elsewhere `fit` builds it before callbacks are called.
        with pytest.raises(ValueError, match="not built"):
            fit(model, monitor)
        model(data(1)[0])
    fit(model, monitor)
    assert monitor.step == 8


class Bypassing(keras.Model):
    def train_step(self, *args):
        logs = {"loss": keras.ops.ones(())}
        return (logs, args[0]) if BACKEND == "jax" else logs


def test_a_train_step_that_cannot_be_measured():
    model = tiny(cls=Bypassing)
    message = "Bypassing has a `train_step` of its own.*every=None"
    with pytest.raises(ValueError, match=message):
        fit(model, monitor_of())
    assert untouched(model)
    monitor = monitor_of(every=None)
    fit(model, monitor)
    assert monitor.last == {"loss": pytest.approx(1.0)}
