"""Run once a backend: logits, gradients and an update of every variant.

KERAS_BACKEND=torch python tests/probe.py OUT.npz
"""

import sys

import keras
import numpy as np

import keras_stable as ks

LEARNING_RATE = 1e-2


class Recording(ks.AdamW):
    """AdamW that keeps the gradients it was given."""

    def build(self, variables):
        super().build(variables)
        self.seen = [
            self.add_variable_from_reference(v, name="seen") for v in variables
        ]

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(trainable_variables)
        for slot, grad in zip(self.seen, grads):
            slot.assign(keras.ops.convert_to_tensor(grad))
        super().apply(grads, trainable_variables)


def set_weights(model):
    """Numbers that depend on the weights' paths alone, large enough to show."""
    for index, v in enumerate(sorted(model.weights, key=lambda v: v.path)):
        rng = np.random.default_rng(index)
        value = rng.normal(size=v.shape)
        if v.path.endswith("/u"):
            value /= np.linalg.norm(value)
        elif v.path.endswith("kernel"):
            value /= v.shape[0] ** 0.5
        elif len(v.shape) < 2:
            value = 1 + 0.1 * value
        v.assign(value.astype("float32"))


def model_of(variant):
    backbone = ks.StableBackbone(31, 1, 2, 16, variant=variant)
    model = ks.StableCausalLM(backbone)
    set_weights(model)
    return model


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 31, (2, 13)).astype("int32")
    # Two documents and padding in one row, one document in the other.
    mask = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], "int32")
    return {"token_ids": ids[:, :-1], "padding_mask": mask}, ids[:, 1:]


def main(out):
    arrays = {}
    inputs, targets = batch()
    for name in ks.VARIANTS:
        model = model_of(name)
        logits = keras.ops.convert_to_numpy(model(inputs, training=False))
        arrays[f"{name}|logits"] = logits
        optimizer = Recording(LEARNING_RATE)
        model.compile(optimizer, weighted_metrics=None)
        model.train_on_batch(inputs, targets)
        for v, g in zip(model.trainable_variables, optimizer.seen):
            arrays[f"{name}|gradient|{v.path}"] = g.numpy()
            arrays[f"{name}|updated|{v.path}"] = v.numpy()
    np.savez(out, **{k: np.asarray(a) for k, a in arrays.items()})


if __name__ == "__main__":
    sys.modules["probe"] = sys.modules[__name__]
    main(sys.argv[1])
