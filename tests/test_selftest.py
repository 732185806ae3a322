"""The self-test: faults it puts in are found, and nothing of it stays."""

import doctest
import warnings

import keras
import keras_hub
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import selftest as module
from keras_stable.layerwise import Jump
from keras_stable.selftest import selftest


def stable_lm():
    backbone = ks.StableBackbone(31, 1, 2, 16, variant="qk_norm")
    model = ks.StableCausalLM(backbone)
    model.compile(ks.AdamW(1e-3), weighted_metrics=None)
    return model


def hub_lm():
    """GPT-2 of KerasHub, and a learning rate that no baseline would stand."""
    backbone = keras_hub.models.GPT2Backbone(29, 1, 2, 16, 32, dropout=0.0)
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    rate = keras.optimizers.schedules.CosineDecay(0.1, 100)
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def conv_net():
    L = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Conv2D(6, 3, activation="relu"),
            L.BatchNormalization(),
            L.Conv2D(6, 3, padding="same"),
            L.Dropout(0.2),
            L.GlobalAveragePooling2D(),
            L.Dense(5, activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        "categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


MODELS = {"ours": stable_lm, "hub": hub_lm, "conv": conv_net}


def values(model):
    groups = model.variables, model.optimizer.variables
    return {
        f"{i} {v.path}": np.array(keras.ops.convert_to_numpy(v))
        for i, group in enumerate(groups)
        for v in group
    }


def batch_of(model):
    rng = np.random.default_rng(1)
    x = module._inputs(model, rng)
    return x, module._targets(model, module._outputs(model, x), rng)


# What `watch` and the self-test put on a model and its optimizer meanwhile.
WRAPPED = {
    *("compute_loss", "compute_metrics", "make_train_function", "train_step"),
    *("apply", "stateless_apply"),
}


# XLA compiles each model's step twice, for some ten seconds.
SLOW = [pytest.mark.slow] if keras.backend.backend() == "jax" else []


@pytest.mark.parametrize(
    "name", ["ours", "conv", pytest.param("hub", marks=SLOW)]
)
def test_every_fault_is_found_and_nothing_stays(name, capsys):
    model = MODELS[name]()
    model.optimizer.build(model.trainable_variables)
    before = values(model)

    findings = ks.StabilityMonitor.selftest(model)

    assert [f.fault for f in findings] == ["nan", "loss", "gain", "frozen"]
    assert all(f.found for f in findings), findings
    assert [f.delay for f in findings] == [0, 0, 0, 2]
    nan, loss, gain, frozen = findings
    assert "changed by +2.0 octaves" in gain.event.detail
    assert frozen.event.series == frozen.place
    table = capsys.readouterr().out
    assert all(f.place in table for f in findings) and "NO" not in table

    after = values(model)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(before[path], after[path], path)
    assert not WRAPPED & {*vars(model), *vars(model.optimizer)}
    assert model.train_function is None


def tiny(loss="mse", **kwargs):
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="out")(hidden))
    model.compile("sgd", loss, **kwargs)
    return model


def test_training_goes_on_as_before():
    model, other = tiny(), tiny()
    other.set_weights(model.get_weights())
    x, y = batch_of(model)
    for one in (model, other):
        one.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"])
        one.train_on_batch(x, y)
    function = model.train_function
    metrics = [float(v) for v in model.metrics_variables]
    attributes = set(vars(model)), set(vars(model.optimizer))
    assert all(f.found for f in selftest(model, verbose=0))
    assert [float(v) for v in model.metrics_variables] == metrics
    assert (set(vars(model)), set(vars(model.optimizer))) == attributes
    # What was compiled before goes on, unobserved.
    assert model.train_function is function
    logs = [m.train_on_batch(x, y, return_dict=True) for m in (model, other)]
    assert logs[0] == logs[1] and "gradient_norm" not in logs[0]
    for a, b in zip(values(model).values(), values(other).values()):
        np.testing.assert_array_equal(a, b)


def test_a_broken_detector_is_told(monkeypatch, capsys):
    monkeypatch.setattr(Jump, "update", lambda self, step, values: [])
    findings = selftest(tiny())
    assert [f.found for f in findings] == [True, True, False, True]
    assert findings[2].event is None and findings[2].delay is None
    assert "NO" in capsys.readouterr().out


def test_a_wrong_name_is_told(monkeypatch):
    original = Jump.update

    def update(self, step, values):
        return original(self, step, np.roll(values, 1))

    monkeypatch.setattr(Jump, "update", update)
    gain = selftest(tiny(), verbose=0)[2]
    assert not gain.found
    assert gain.place != gain.event.series


def test_nothing_stays_after_an_error(monkeypatch):
    model = tiny()
    x, y = batch_of(model)
    model.train_on_batch(x, y)
    before, function = values(model), model.train_function

    def update(self, step, values):
        if step > module.BASELINE:
            raise RuntimeError("broken")
        return []

    monkeypatch.setattr(Jump, "update", update)
    with pytest.raises(RuntimeError, match="broken"):
        selftest(model)
    for path, value in values(model).items():
        np.testing.assert_array_equal(before[path], value, path)
    assert model.train_function is function
    assert np.isfinite(model.train_on_batch(x, y))


def test_gradient_accumulation():
    model = tiny()
    optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=3)
    model.compile(optimizer, "mse")
    findings = selftest(model, verbose=0)
    assert all(f.found for f in findings)
    assert findings[3].delay > 2


def test_data_of_the_users():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Subclassed()
    x, y = np.ones((4, 3), "float32"), np.full((4, 2), 9.0, "float32")
    model(x)
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="Pass `x` and `y`"):
        selftest(model, verbose=0)
    assert all(f.found for f in selftest(model, x, y, verbose=0))


def test_what_cannot_be_tested_is_said():
    def untold(y, y_pred):
        return 0.0 * keras.ops.mean(y_pred, axis=-1)

    with pytest.raises(ValueError, match="at least 0.05"):
        selftest(tiny(untold))
    averaged = keras.losses.MeanSquaredError("mean_with_sample_weight")
    with pytest.raises(ValueError, match="takes them"):
        selftest(tiny(averaged))
    with pytest.raises(ValueError, match="not compiled"):
        model = tiny()
        selftest(keras.Model(model.input, model.output))


def test_example():
    with warnings.catch_warnings():
        assert not doctest.testmod(module).failed
