"""Backups: what is put back trains on as it did, bit by bit, within `fit`."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_stable as ks
from keras_stable.backend import saving
from keras_stable.backups import Backups
from keras_stable.feed import Feed
from keras_stable.watch import watch

BACKEND = keras.backend.backend()
TOKENS = np.random.default_rng(0).integers(0, 32, 2000)


class Batches(keras.utils.PyDataset):
    """A list of batches, as `fit` takes it."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.batches[number]


def pairs(count, seed=0, rows=4):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(rows, 5)).astype("float32"),
            rng.normal(size=(rows, 3)).astype("float32"),
        )
        for _ in range(count)
    ]


def tiny(optimizer=None, metrics=("mae",), **compile):
    inputs = keras.Input((5,))
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3)(x)
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(x))
    optimizer = optimizer or ks.AdamW(1e-2)
    model.compile(optimizer, "mse", metrics=list(metrics), **compile)
    return model


def language_model(variant="sigma_reparam"):
    backbone = ks.StableBackbone(32, 1, 2, 16, variant=variant, dropout=0.1)
    lm = ks.StableCausalLM(backbone)
    lm.compile(ks.AdamW(ks.WarmupSchedule(1e-2, 4)))
    return lm


def values(model):
    """All that a model is, as arrays of their own."""
    variables = saving.variables_of(model, metrics=True)
    variables = [*variables.values(), saving.default_seed()]
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


class At(keras.callbacks.Callback):
    """Calls functions at the beginning of steps, counted from 0."""

    def __init__(self, **actions):
        super().__init__()
        self.actions, self.step = actions, 0

    def on_train_batch_begin(self, batch, logs=None):
        action = self.actions.get(f"at_{self.step}")
        self.step += 1
        if action is not None:
            action()


def and_back(model, data, steps=9):
    """`fit` that takes a copy at 3, goes back at 6, and is there anew at 9.

    Returns what it was the first time, and the second.
    """
    backups, feed = Backups(model), Feed(data)
    first, second = [], []
    with watch(model) as observed:
        observed.full = False
        observed.feed = lambda: feed.next()[1]

        def back():
            first.extend(values(model))
            backup = backups.newest(certified=False)
            assert backup.place == 3
            backups.restore(backup)
            feed.seek(backup.place)

        at = At(
            at_3=lambda: backups.take(3, feed.position),
            at_6=back,
            at_9=lambda: second.extend(values(model)),
        )
        model.fit(data, callbacks=[at], verbose=0)
    assert feed.position == 7
    return first, second


MODELS = {
    "adamw": lambda: tiny(),
    "adam": lambda: tiny(keras.optimizers.Adam(1e-2, clipnorm=1.0)),
    "momentum": lambda: tiny(keras.optimizers.SGD(1e-2, momentum=0.9)),
    "accumulation": lambda: tiny(
        ks.AdamW(1e-2, gradient_accumulation_steps=4)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_on_as_it_did(name):
    model = MODELS[name]()
    first, second = and_back(model, Batches(pairs(10)))
    same(second, first)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    model = tiny(keras.optimizers.Adam(1e-2))
    assert hasattr(model.optimizer, "inner_optimizer")
    first, second = and_back(model, Batches(pairs(10)))
    same(second, first)


def test_spectral_vectors_and_dropout_of_a_language_model():
    data = ks.TokenBatches(TOKENS, 4, 8, vocabulary_size=32)
    first, second = and_back(language_model(), data.repeat()[:10])
    same(second, first)


def test_bfloat16_weights():
    keras.config.set_dtype_policy("bfloat16")
    model = tiny(keras.optimizers.SGD(1e-2, momentum=0.9))
    assert model.trainable_variables[0].dtype == "bfloat16"
    first, second = and_back(model, Batches(pairs(10)))
    same(second, first)
