"""A hundred faults at random places and steps: is the place named?

Injected into models that train, in the compiled step, with the full table in
every step. Right is: for a NaN, the event's "first in the forward pass"; for
a gain of four and for a dead layer, the series of the first `jump`.
"""

import collections

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable.diagnosis import Diagnosis

WARMUP = 72  # Steps before the faults; detectors are silent for 64.
LATEST = 2  # A fault comes after up to as many more.
PATIENCE = 6
KINDS = {"nan": "nonfinite", "gain": "jump", "dead": "jump"}


def language_model():
    """Three blocks with q/k norms, on ids with some structure."""
    backbone = ks.StableBackbone(23, 3, 2, 16, variant="qk_norm")
    model = ks.StableCausalLM(backbone)
    model.compile(ks.AdamW(1e-3), weighted_metrics=None)
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(8):
        ids = (rng.integers(0, 23, (4, 1)) + np.arange(13) * 3) % 23
        ids = ids.astype("int32")
        mask = np.ones((4, 12), "int32")
        x = {"token_ids": ids[:, :-1], "padding_mask": mask}
        batches.append((x, ids[:, 1:]))
    embedding = backbone.token_embedding
    # Series: the variables that its output is made of, the first a matrix.
    places = {
        embedding.path: [embedding.embeddings],
        f"{embedding.path}/head": [embedding.reverse_embeddings],
    }
    names = ("query", "key", "value", "output", "fc1", "fc2")
    for layer in model._flatten_layers():
        if layer.name in names:
            places[layer.path] = layer.trainable_variables
    return model, batches, places


def image_model():
    """A plain functional model: convolutions, a skip, an MLP."""
    L = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(6, 3, padding="same", activation="gelu", name="stem")(inputs)
    y = L.Conv2D(12, 3, padding="same", activation="gelu", name="wide")(x)
    y = L.Conv2D(6, 3, padding="same", name="narrow")(y)
    x = L.Add(name="skip")([x, y])
    x = L.GlobalAveragePooling2D()(L.LayerNormalization()(x))
    x = L.Dense(16, activation="gelu", name="fc1")(L.Dropout(0.1)(x))
    x = L.Dense(5, name="head")(L.Dense(16, name="fc2")(x))
    model = keras.Model(inputs, x)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(8):
        y = rng.integers(0, 5, 16).astype("int32")
        x = rng.normal(size=(16, 8, 8, 3)) + y[:, None, None, None] / 2
        batches.append((x.astype("float32"), y))
    names = ("stem", "wide", "narrow", "fc1", "fc2", "head")
    places = {n: model.get_layer(n).trainable_variables for n in names}
    return model, batches, places


class Training:
    """A model in training that can go back to where its baseline ends."""

    def __init__(self, model, batches):
        self.model, self.batches = model, batches
        self.watch = ks.watch(model)
        self.step, self.diagnosis = 0, None
        for _ in range(WARMUP):
            self.run()
        self.variables = [*model.variables, *model.optimizer.variables]
        self.values = [
            np.array(keras.ops.convert_to_numpy(v)) for v in self.variables
        ]
        self.state = self.diagnosis.state()

    def back(self):
        for variable, value in zip(self.variables, self.values):
            variable.assign(value)
        self.diagnosis.restore(self.state)
        self.step = WARMUP

    def run(self):
        x, y = self.batches[self.step % len(self.batches)]
        self.model.train_on_batch(x, y)
        self.step += 1
        (sample,) = self.watch.read()
        if self.diagnosis is None:
            self.diagnosis = Diagnosis(self.watch.layouts[True])
        return self.diagnosis.update(self.step, sample)


def inject(kind, variables, rng):
    for variable in variables:
        value = np.array(keras.ops.convert_to_numpy(variable))
        if kind == "nan" and variable is variables[0]:
            # A row of an embedding may have to wait for a batch with it.
            value[tuple(rng.integers(n) for n in value.shape)] = np.nan
        elif kind == "gain":
            value *= 4
        elif kind == "dead":
            value *= 0
        variable.assign(value)


def named(event, place):
    if event.detector == "nonfinite":
        first = f"first in the forward pass: {place}"
        return event.series == place or first in event.detail.split("; ")
    return event.series == place


@pytest.mark.parametrize(
    "make, faults", [(language_model, 65), (image_model, 35)]
)
def test_places_of_faults_are_named(make, faults):
    model, batches, places = make()
    training = Training(model, batches)
    rng = np.random.default_rng(0)
    wrong, early, delays = [], [], collections.Counter()
    for number in range(faults):
        # Every place in turn, so that none is left out.
        kind = list(KINDS)[number // len(places) % 3]
        place = list(places)[number % len(places)]
        training.back()
        for _ in range(rng.integers(LATEST + 1)):
            early += training.run()
        begin = training.step
        inject(kind, places[place], rng)
        event = None
        while event is None and training.step < begin + PATIENCE:
            found = training.run()
            event = next((e for e in found if e.detector == KINDS[kind]), None)
        if event is None or not named(event, place):
            wrong.append((kind, place, event and event.detail))
        else:
            delays[event.step - begin - 1] += 1
    print(f"{faults - len(wrong)} of {faults}, delays {dict(delays)}", wrong)
    assert not [e for e in early if e.detector in KINDS.values()]
    assert len(wrong) <= 0.05 * faults, wrong
