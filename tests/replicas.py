"""Guarded runs of which one replica of two meets bad batches.

python tests/replicas.py '{"model": "language", "bad": [2], ...}', see
`distributed.launch`: one of two processes of torch, or both of TensorFlow's
replicas.
"""

import hashlib
import json
import sys

import distributed

BATCH = 4


def values(variable):
    """A variable's value in each replica of this process."""
    import keras

    if keras.backend.backend() == "torch":
        return [variable.value.numpy(force=True)]
    parts = getattr(variable.value, "values", [variable.value])
    return [part.numpy() for part in parts]


def digest(variables):
    """One of each replica in this process; of what is not its own, the same."""
    found = {}
    for variable in variables:
        for i, value in enumerate(values(variable)):
            found.setdefault(i, hashlib.sha1()).update(value.tobytes())
    return [x.hexdigest() for x in found.values()]


def shared(model):
    return [*model.trainable_variables, *model.optimizer.variables]


def moving(model):
    return [*model.non_trainable_variables, *model.metrics_variables]


def language(number, bad, how):
    import numpy as np

    rng = np.random.default_rng(number)
    ids = rng.integers(0, 31, (BATCH, 7))
    weights = np.ones((BATCH, 6), "float32")
    if bad:
        weights[-1] = np.nan if how == "nan" else 1e6
    return {"token_ids": ids[:, :-1]}, ids[:, 1:], weights


def normalized(number, bad, how):
    import numpy as np

    rng = np.random.default_rng(number)
    x = rng.normal(size=(BATCH, 8)).astype("float32")
    y = rng.normal(size=(BATCH, 3)).astype("float32")
    if bad and how == "nan":
        x[-1, 0] = np.nan
    elif bad:
        y[-1] *= 1e4
    return x, y


BATCHES = {
    "language": language,
    "normalized": normalized,
    "accumulated": normalized,
}


def build(name, size=1):
    import keras

    import keras_stable as ks

    keras.utils.set_random_seed(0)
    gathered = 3 if name == "accumulated" else None
    optimizer = ks.AdamW(
        ks.WarmupSchedule(1e-2, 300, warmup_steps=4),
        gradient_accumulation_steps=gathered,
    )
    if name == "language":
        backbone = ks.StableBackbone(31, 1, 2, 8, variant="sigma_reparam")
        model = ks.StableCausalLM(backbone)
        model.compile(optimizer)
        return model
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2, seed=5),
            keras.layers.Dense(3),
        ]
    )
    model.compile(optimizer, "mse", metrics=["mae"], steps_per_execution=size)
    return model


def mine(batch, settings):
    """This process's rows."""
    import keras

    size = BATCH // settings["processes"]
    begin = settings["process"] * size
    return keras.tree.map_structure(lambda x: x[begin : begin + size], batch)


def dataset(settings, places):
    """What `fit` takes: batches by their number."""
    import grain

    def batch(place):
        bad = place in settings["bad"]
        batch = BATCHES[settings["model"]](place, bad, settings["how"])
        return mine(batch, settings)

    return grain.MapDataset.source(list(places)).map(batch)


def guarded(settings):
    """Digests and scalars of each step of a watched run."""
    import keras

    import keras_stable as ks

    model = build(settings["model"])
    states, samples = [], []
    guard = ks.Guard(loss=1e3) if settings.get("guard", True) else None
    with ks.watch(model, guard=guard, tables=False) as watch:

        def note(*_, **__):
            samples.extend(watch.read())
            states.append([digest(shared(model)), digest(moving(model))])

        end = keras.callbacks.LambdaCallback(on_train_batch_end=note)
        history = model.fit(
            dataset(settings, settings["places"]),
            shuffle=False,
            verbose=0,
            callbacks=[end],
        )
    scalars = [
        [
            s.scalars["loss"],
            s.scalars["gradient_norm"],
            s.scalars["update_norm"],
            s.scalars["guarded"],
            s.scalars["nonfinite"],
        ]
        for s in samples
    ]
    return {
        "states": states,
        "scalars": scalars,
        "first": [s.scalars["first_nonfinite"] for s in samples],
        "history": history.history["loss"][0],
        "final": [w.tolist() for w in model.get_weights()],
    }


def monitored(settings):
    """A run with a `StabilityMonitor`, and what it decided."""
    import keras_stable as ks

    model = build(settings["model"], settings.get("size", 1))
    rescue = ks.Rescue(
        every=20, certify=10, margin=10, skip=15, rewarmup=0, back_off=1.0
    )
    every_place = range(400)
    data = dataset(settings, every_place)
    policy, steps, made = settings["policy"], settings["steps"], 0
    monitor = None
    if policy is not None:
        monitor = ks.StabilityMonitor(
            settings.get("path"),
            policy=policy,
            every=settings.get("every", "auto"),
            data=data if settings.get("seeks") else None,
            rescue=rescue,
            autopsy=settings.get("autopsy", False),
            verbose=0,
        )
    places = settings.get("places", every_place)
    try:
        while (left := steps + (monitor.undone if monitor else 0) - made) > 0:
            place = monitor.position if monitor else 0
            model.fit(
                dataset(settings, places[place : place + left]),
                # At an end that it did not know of, TensorFlow would draw
                # seeds for a step that has no batch.
                steps_per_epoch=left,
                shuffle=False,
                verbose=0,
                callbacks=[monitor] if monitor else [],
            )
            made += left
    except (ks.TrainingHalted, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found = {"shared": digest(shared(model)), "moving": digest(moving(model))}
    if monitor:
        found["events"] = [
            [e.step, e.onset, e.detector, str(e.value)] for e in monitor.events
        ]
        found["details"] = [e.detail for e in monitor.events]
        found["position"], found["made"] = monitor.position, made
        found["overhead"] = monitor.overhead
    return found


def run(settings):
    import keras_stable as ks

    ks.set_distribution(settings.get("distribution", "data"), BATCH)
    kinds = {"guarded": guarded, "monitored": monitored}
    found = []
    for one in settings["runs"]:
        one = {"kind": "guarded", **settings, **one}
        found.append(kinds[one["kind"]](one))
    return found


if __name__ == "__main__":
    distributed.main(json.loads(sys.argv[1]), run)
