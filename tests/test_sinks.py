"""Sinks: what is sent is what was measured, and not too much of it."""

import sys
import types

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable.packing import Layout
from keras_stable.packing import Sample
from keras_stable.sinks import MOST_SERIES
from keras_stable.sinks import Selection
from keras_stable.sinks import flatten

LAYOUT = Layout(tensors=["fc"], heads={"attention": 2}, variables=["fc/kernel"])


def a_sample():
    return Sample(
        {"loss": 2.5, "first_nonfinite": None},
        np.arange(6.0)[None],
        [np.array([[1.0, 9.0], [2.0, 1.0], [0.25, 0.5]])],
        np.array([[0.1, 0.2, 0.3, np.nan]]),
    )


def test_series_have_names_and_the_worst_head():
    scalars, layers = flatten(a_sample(), LAYOUT)
    assert scalars == {"monitor/loss": 2.5}
    assert layers["fc/rms"] == 1.0 and layers["fc/nonfinite"] == 5.0
    assert layers["attention/max_logit"] == 9.0
    assert layers["fc/kernel/update_rms"] == 0.2
    assert len(layers) == 6 + 3 + 4


def test_names_are_distinct():
    # A layer that is watched and an attention core of the same name.
    layout = Layout(tensors=["a"], heads={"a": 2}, variables=["a"])
    _, layers = flatten(a_sample(), layout)
    assert len(layers) == 6 + 3 + 4


def test_the_worst_layers_are_chosen_and_stay():
    select = Selection(most=10)
    scalars = {"monitor/loss": 1.0, "monitor/max_logit": 2.0}
    layers = {f"{i:03}/rms": 1.0 + i for i in range(50)}
    first = select((scalars, layers))
    assert set(scalars) <= set(first) and len(first) == 10
    # Growth counts, not size; then the order of names.
    assert {n for n in first if n not in scalars} == set(list(layers)[:8])
    grown = {name: value * 100 for name, value in layers.items()}
    second = select((scalars, grown))
    assert set(second) == set(first) and second["000/rms"] == 100.0


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e9, -1e9])
def test_the_worst_come_first(value):
    select = Selection(most=3)
    select.first = {f"{i}/mean": 1.0 for i in range(9)}
    layers = {f"{i}/mean": 1.0 for i in range(9)}
    layers["7/mean"], layers["5/mean"] = value, 3.0
    found = select(({"monitor/loss": 1.0}, layers))
    assert list(found) == ["monitor/loss", "5/mean", "7/mean"]


def test_more_scalars_than_room():
    select = Selection(most=1)
    assert select(({"a": 1.0, "b": 2.0}, {"c": 3.0})) == {"a": 1.0, "b": 2.0}


def test_two_hundred_at_most():
    select = Selection()
    layers = {f"{i}/rms": 1.0 for i in range(3 * MOST_SERIES)}
    for _ in range(3):
        assert len(select(({"loss": 1.0}, layers))) == MOST_SERIES == 200


def test_tensorboard_files_are_readable(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    sink = ks.TensorBoard(tmp_path / "logs")
    written = {5: 1.5, 6: 2.5, 100: float("inf")}
    for step, value in written.items():
        sink.write(step, {"fc/rms": value, "monitor/loss": -value})
    sink.close()
    events = reader.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    for tag, sign in (("fc/rms", 1), ("monitor/loss", -1)):
        assert values_of(events, tag) == {
            step: sign * value for step, value in written.items()
        }


def values_of(events, tag):
    """Scalars by step."""
    make_ndarray = pytest.importorskip("tensorboard.util.tensor_util")
    return {
        event.step: float(make_ndarray.make_ndarray(event.tensor_proto))
        for event in events.Tensors(tag)
    }


class FakeRun:
    def __init__(self):
        self.logged = []

    def log(self, values):
        self.logged.append(values)


def fake_wandb(monkeypatch, run):
    module = types.ModuleType("wandb")
    module.run = run
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_weights_and_biases_gets_the_current_run(monkeypatch):
    run = FakeRun()
    fake_wandb(monkeypatch, run)
    sink = ks.WeightsAndBiases()
    sink.write(3, {"fc/rms": 1.0})
    sink.write(9, {"fc/rms": 2.0})
    sink.close()
    assert run.logged == [
        {"fc/rms": 1.0, "monitor/step": 3},
        {"fc/rms": 2.0, "monitor/step": 9},
    ]


def test_weights_and_biases_gets_a_given_run():
    # Without the package.
    run = FakeRun()
    ks.WeightsAndBiases(run).write(1, {"a": 1.0})
    assert run.logged == [{"a": 1.0, "monitor/step": 1}]


def test_weights_and_biases_wants_a_run(monkeypatch):
    fake_wandb(monkeypatch, None)
    with pytest.raises(ValueError, match="no Weights & Biases run"):
        ks.WeightsAndBiases()


@pytest.mark.parametrize(
    "make, module, package",
    [
        (lambda: ks.TensorBoard("logs"), "tensorboard.summary", "tensorboard"),
        (lambda: ks.WeightsAndBiases(), "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, make, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        make()


class Recording:
    def __init__(self):
        self.written, self.closed = {}, 0

    def write(self, step, scalars):
        self.written[step] = scalars

    def close(self):
        self.closed += 1


def test_a_monitor_sends_its_tables(tmp_path):
    layers = [keras.Input((3,)), keras.layers.Dense(2, name="out")]
    model = keras.Sequential(layers, name="sequential")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = np.ones((24, 3), "float32"), np.zeros((24, 2), "float32")
    sink = Recording()
    monitor = ks.StabilityMonitor(
        tmp_path, every=2, sinks=[sink], warmup_steps=0
    )
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[monitor])
    health = ks.read_health(tmp_path)
    assert list(sink.written) == list(health.tables)
    losses = dict(zip(*health.series("loss")))
    steps, rms = health.table("tensors", "sequential/out", "rms")
    for step, value in zip(steps, rms):
        sent = sink.written[step]
        assert sent["monitor/loss"] == losses[step]
        assert sent["sequential/out/rms"] == pytest.approx(value, rel=1e-4)
