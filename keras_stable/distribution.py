"""How a model and its batches are laid out over devices, by name."""

import keras

from keras_stable import backend
from keras_stable.choices import check_choice

DISTRIBUTIONS = ("none", "data")


def set_distribution(name, batch_size):
    """Distributes all models built from here on.

    | `name`   | weights            | batches                 |
    |----------|--------------------|-------------------------|
    | `"none"` | on one device      | whole                   |
    | `"data"` | a copy on each     | divided, B / devices    |

    The numbers are those of one device: the loss is the mean over the whole
    batch, gradients are summed over the devices.

    Args:
        name: `"none"` or `"data"`, which needs the jax backend.
        batch_size: int. The global batch.

    Raises:
        ValueError: for an unknown name; for `"data"` if the backend cannot do
            it (Keras would silently ignore it) or if the batch does not
            divide.

    Example:

    >>> set_distribution("none", batch_size=8)
    """
    check_choice(name, DISTRIBUTIONS, "distribution")
    if name == "none":
        keras.distribution.set_distribution(None)
        return
    backend.check_data_parallel(batch_size)
    # Each process reads its own rows; Keras shards `tf.data` only.
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(parallel)


def get_layout_map(
    device_mesh,
    model_parallel_dim_name="model",
    data_parallel_dim_name="batch",
):
    """How `StableBackbone`'s weights lie on a mesh, as in KerasHub's models.

    Kernels into the heads and into the MLP are cut by output channel, those
    out of them by input channel, so that a branch needs one all-reduce. Their
    other dimension is cut along the data axis (fully sharded data parallel).
    All else is replicated.

    Args:
        device_mesh: `keras.distribution.DeviceMesh` with both axes.
        model_parallel_dim_name, data_parallel_dim_name: names of its axes.

    Returns:
        `keras.distribution.LayoutMap`.

    Example:

    >>> mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"))
    >>> layout = get_layout_map(mesh)                         # doctest: +SKIP
    >>> keras.distribution.set_distribution(                  # doctest: +SKIP
    ...     keras.distribution.ModelParallel(
    ...         layout_map=layout, batch_dim_name="batch"
    ...     )
    ... )
    """
    names = (model_parallel_dim_name, data_parallel_dim_name)
    missing = [name for name in names if name not in device_mesh.axis_names]
    if missing:
        raise ValueError(
            f"The mesh has no axis {missing[0]!r}. Received: axes "
            f"{tuple(device_mesh.axis_names)}"
        )
    model, data = names
    layout = keras.distribution.LayoutMap(device_mesh)
    layout[r".*token_embedding/embeddings"] = (model, data)
    layout[r".*token_embedding/reverse_embeddings"] = (data, model)
    layout[r".*/(query|key|value|fc1|gate)/kernel"] = (data, model)
    layout[r".*/(query|key|value|fc1|gate)/bias"] = (model,)
    layout[r".*/(output|fc2)/kernel"] = (model, data)
    return layout
