"""What runs must share to be trained in one program, and what is refused."""

import keras

from keras_stable.backend import internals
from keras_stable.distribution import process_count
from keras_stable.models import StableCausalLM

# What runs may have otherwise: it enters the program as numbers.
FREE = ("name", "seed", "learning_rate", "peak_learning_rate")


def batch_of(model, data, index):
    """A batch as the model's `train_step` takes it."""
    batch = data[index]
    batch = batch if isinstance(batch, tuple) else (batch,)
    return model.preprocess_samples(*batch)


def check_runs(models, data, monitors):
    counts = [len(x) for x in (models, data, monitors)]
    if len(set(counts)) > 1 or not models:
        raise ValueError(
            "Give as many models as datasets and monitors, one at least. "
            f"Received: {counts[0]} models, {counts[1]} datasets and "
            f"{counts[2]} monitors."
        )
    check_models(models)
    settings = []
    for monitor in monitors:
        if monitor.policy not in ("observe", "halt"):
            raise ValueError(
                "Of several runs in one program none can go back or leave a "
                "batch out: use policy='observe' or 'halt', or train them one "
                f"by one. Received: {monitor.policy!r}"
            )
        if monitor.every is None:
            raise ValueError(
                "`every=None` measures nothing, and would wait for the device "
                "at every step of all runs: give 'auto' or an integer."
            )
        budget = monitor._budget
        settings.append((monitor.every, budget.max_overhead, monitor._what))
    _equal("monitor's every, max_overhead and layers", settings)
    for what, items in (
        ("optimizer", [model.optimizer for model in models]),
        ("monitor", monitors),
    ):
        if len({*map(id, items)}) < len(items):
            raise ValueError(f"Each run needs a {what} of its own.")
    paths = [str(m.path) for m in monitors if m.path is not None]
    if len(set(paths)) < len(paths):
        raise ValueError(f"Two runs would write to one directory: {paths}")
    optimizers = []
    for model in models:
        # Raises for a learning rate that cannot be known before.
        schedule, peak = internals.learning_of(model.optimizer)
        optimizer = keras.saving.serialize_keras_object(model.optimizer)
        kinds = {"schedule": schedule is not None, "peak": peak is not None}
        optimizers.append({**_without(optimizer), **kinds})
    _equal("optimizer", optimizers)
    batches = []
    for index, (model, dataset) in enumerate(zip(models, data)):
        if not len(dataset):
            raise ValueError(f"Dataset {index} has no batches.")
        batch = batch_of(model, dataset, 0)
        batches.append(keras.tree.map_structure(_shape, batch))
    _equal("batch", batches)


def check_models(models):
    if process_count() > 1 or keras.distribution.distribution() is not None:
        raise ValueError(
            "Several models are trained in one program on one device: without "
            "a distribution and in one process. Train large ones one by one."
        )
    if len({*map(id, models)}) < len(models):
        raise ValueError("The same model is given twice: build one for each.")
    configs = []
    for model in models:
        if not isinstance(model, StableCausalLM) or not model._chunked:
            raise ValueError(
                "Models must be `StableCausalLM`s, compiled with the default "
                f"loss and metrics. Received: {type(model).__name__}"
            )
        if model.run_eagerly or model.steps_per_execution > 1:
            raise ValueError(
                "`run_eagerly` and `steps_per_execution` are not for several "
                "models at once: compile without them."
            )
        shapes = [(v.dtype, v.shape, v.trainable) for v in model.weights]
        config = _without(model.backbone.get_config())
        configs.append({**config, "weights": shapes})
    _equal("model", configs)


def _without(config):
    if not isinstance(config, dict):
        return config
    return {k: _without(v) for k, v in config.items() if k not in FREE}


def _shape(x):
    return f"{x.dtype} {list(x.shape)}"


def _equal(what, values):
    for index, value in enumerate(values[1:], 1):
        if value != values[0]:
            raise ValueError(
                f"Runs in one program share the {what}, but for seeds and "
                f"learning rates. Run 0 has {values[0]} and run {index} "
                f"{value}. Train those that differ in another call."
            )
