"""The state of a training besides its arrays, as values that go into JSON."""

import json
import random

import keras
import numpy as np
from keras import ops

from keras_stable import snapshots
from keras_stable.backend import saving
from keras_stable.records import versions

# Others do not touch the numbers.
PACKAGES = "keras keras-hub numpy grain jax torch tensorflow".split()


def capture(model, variables, config):
    """What a checkpoint says of the run it is of, and of its seeds."""
    return {
        **_run(model, variables, config),
        "backend": keras.backend.backend(),
        "versions": versions(),
        "seeds": _seeds(),
    }


def check(state, model, variables, config, path):
    """Compares a state with what it is to be loaded into.

    Prints which versions of libraries differ.

    Raises:
        ValueError: if it is of another configuration; it names what differs.
    """
    ours = _run(model, variables, config)
    try:
        theirs = {name: state[name] for name in ours}
        others = state["versions"], state["backend"]
        step = state["step"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no state of training.") from error
    found = snapshots.differences(theirs, ours)
    if found:
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise ValueError(
            f"{path} is of another run: {'; '.join(found[:8])}{more}. Resume "
            "with the settings it was begun with, or begin anew elsewhere."
        )
    (theirs, backend), ours = others, versions()
    used = [p for p in PACKAGES if p in theirs and p in ours]
    other = {"jax", "torch", "tensorflow"} - {keras.backend.backend()}
    used = [p for p in used if p not in other]
    found = snapshots.differences(
        {"backend": backend, **{p: theirs[p] for p in used}},
        {
            "backend": keras.backend.backend(),
            **{p: ours[p] for p in used},
        },
    )
    if found:
        print(
            f"The checkpoint of step {step} was made by other versions: "
            f"{'; '.join(found)}. Training goes on, but not bit by bit as it "
            "would have there."
        )


def _run(model, variables, config):
    """What must be the same where training goes on."""
    optimizer = keras.saving.serialize_keras_object(model.optimizer)
    run = {
        "config": config,
        "optimizer": _settings(optimizer),
        "weights": {
            # Keras counts in int32 or int64, as the backend likes.
            name: f"{v.dtype if 'float' in v.dtype else 'int'} {list(v.shape)}"
            for name, v in variables.items()
        },
    }
    return json.loads(json.dumps(run))


def _settings(config):
    """Without names, and a learning rate that is a variable, so restored."""
    if not isinstance(config, dict):
        return config
    return {
        key: _settings(value)
        for key, value in config.items()
        if key != "name"
        and not (key == "learning_rate" and isinstance(value, float))
    }


def _seeds():
    # First: to make Keras's seed may draw one of Python's.
    host = host_seeds()
    default = ops.convert_to_numpy(saving.default_seed())
    return {**host, "keras": default.tolist()}


def host_seeds():
    """The seeds of Python, numpy and torch, which no device holds."""
    version, internal, gauss = random.getstate()
    twister = np.random.get_state(legacy=False)
    return {
        "python": [version, list(internal), gauss],
        "numpy": {
            **twister,
            "state": {
                "key": twister["state"]["key"].tolist(),
                "pos": int(twister["state"]["pos"]),
            },
        },
        "native": saving.native_seeds(),
    }


def set_seeds(seeds):
    """Sets the seeds of Python, numpy, Keras and torch to a state's.

    Keras's own is left as it is where the state does not have it.
    """
    version, internal, gauss = seeds["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(seeds["numpy"])
    if "keras" in seeds:
        saving.default_seed().assign(np.array(seeds["keras"], "uint32"))
    saving.set_native_seeds(seeds["native"])
