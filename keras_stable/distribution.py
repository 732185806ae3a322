"""How a model and its batches are laid out over devices, by name.

A mesh has two axes: `"batch"`, over which the batch is divided, and
`"model"`, over which heads, the MLP's channels and the vocabulary are.
"""

import warnings

import keras

from keras_stable import backend
from keras_stable.choices import check_choice
from keras_stable.choices import check_integer

DISTRIBUTIONS = ("none", "data", "fsdp", "tensor", "fsdp+tensor")

# Axes of every weight, by its path. Kernels into the heads and into the MLP
# are cut by output channel, those out of them by input channel, so that a
# branch needs one all-reduce. What is small is on every device.
_INTO, _OUT_OF = "(query|key|value|fc1|gate)", "(output|fc2)"
LAYOUTS = {
    "token_embedding/embeddings": ("model", "batch"),
    "token_embedding/reverse_embeddings": ("batch", "model"),
    "position_embedding/embeddings": (None, "batch"),
    rf"block_\d+/(attention|mlp)/{_INTO}/kernel": ("batch", "model"),
    rf"block_\d+/(attention|mlp)/{_INTO}/bias": ("model",),
    rf"block_\d+/(attention|mlp)/{_OUT_OF}/kernel": ("model", "batch"),
    rf"block_\d+/(attention|mlp)/{_OUT_OF}/bias": (),
    # sigma-Reparam's scale and singular vector; LoRA's factors.
    r"block_\d+/(attention|mlp)/\w+/(gamma|u|lora_kernel_[ab])": (),
    r"block_\d+/attention/entropy_theta": (),
    r"block_\d+/\w+/gain": (),
    r"(block_\d+/\w+/)?\w+_norm/(scale|bias)": (),
}
# Axes of the mesh along which weights are cut, by name.
_CUT = {
    "data": (),
    "fsdp": ("batch",),
    "tensor": ("model",),
    "fsdp+tensor": ("batch", "model"),
}


class Layouts(keras.distribution.ModelParallel):
    """Weights laid out by `LAYOUTS`, batches divided over `"batch"`.

    Args:
        mesh: `keras.distribution.DeviceMesh` with axes batch and model.
        cut: tuple of those of its axes along which weights are cut.
    """

    def __init__(self, mesh, cut):
        # Each process reads its own rows; Keras shards `tf.data` only.
        super().__init__(
            layout_map=keras.distribution.LayoutMap(mesh),
            batch_dim_name="batch",
            auto_shard_dataset=False,
        )
        self._cut = cut
        self._by_path = get_layout_map(mesh)

    def get_variable_layout(self, variable):
        """Axes of a weight; a slot of the optimizer has its weight's."""
        if getattr(variable, "_layout", None) is not None:
            return variable._layout
        layout = self._by_path[variable.path]
        axes = []
        for size, axis in zip(variable.shape, layout.axes if layout else ()):
            axis = axis if axis in self._cut else None
            parts = axis and self.size(axis)
            if axis and size % parts:
                warnings.warn(
                    f"{variable.path} of shape {tuple(variable.shape)} is not "
                    f"cut in {parts} parts, which do not divide {size}: every "
                    "device holds that axis whole.",
                    stacklevel=2,
                )
                axis = None
            axes.append(axis)
        return keras.distribution.TensorLayout(axes, self.device_mesh)

    def size(self, axis):
        """How many devices lie along an axis."""
        mesh = self.device_mesh
        return mesh.shape[mesh.axis_names.index(axis)]


def set_distribution(name, batch_size, tensor_parallel=None, devices=None):
    """Distributes all models and optimizers built from here on.

    | `name`          | mesh (batch, model) | of each matrix a device holds   |
    |-----------------|---------------------|---------------------------------|
    | `"none"`        | one device          | all                             |
    | `"data"`        | (n, 1)              | all                             |
    | `"fsdp"`        | (n, 1)              | 1 / n                           |
    | `"tensor"`      | (n / m, m)          | 1 / m: its heads, MLP channels, |
    |                 |                     | tokens of the vocabulary        |
    | `"fsdp+tensor"` | (n / m, m)          | 1 / n                           |

    The numbers are those of one device: the loss is the mean over the whole
    batch, gradients are summed over the devices. Optimizer slots lie where
    their weights do. Several processes see one mesh, after
    `keras.distribution.initialize`; `TokenBatches` then gives each its rows.

    Args:
        name: one of `DISTRIBUTIONS`. All but `"none"` need the jax backend;
            TensorFlow has `"data"` through `tf.distribute`, torch in several
            processes, as `torchrun` starts them.
        batch_size: int. The global batch.
        tensor_parallel: int, m. Defaults to the devices of one process for
            `"tensor"`, and to 2 for `"fsdp+tensor"`.
        devices: list of devices. Defaults to all.

    Raises:
        ValueError: for an unknown name; if the backend cannot do it (Keras
            would silently ignore it); if m does not divide the devices or n
            or n / m do not divide the batch.

    Example:

    >>> set_distribution("none", batch_size=8)
    """
    check_choice(name, DISTRIBUTIONS, "distribution")
    batch_size = check_integer(batch_size, "`batch_size`", 1)
    backend.undistribute()
    keras.distribution.set_distribution(None)
    if tensor_parallel is not None and "tensor" not in name:
        raise ValueError(
            f"`tensor_parallel={tensor_parallel}` is for 'tensor' and "
            f"'fsdp+tensor'. Received: {name!r}"
        )
    if name == "none":
        return
    if tensor_parallel is not None:
        check_integer(tensor_parallel, "`tensor_parallel`", 1)
    devices = backend.distribute(name, batch_size, tensor_parallel, devices)
    if devices is not None:
        mesh = keras.distribution.DeviceMesh(
            devices.shape, ("batch", "model"), devices
        )
        keras.distribution.set_distribution(Layouts(mesh, _CUT[name]))


def along_batch(x):
    """`x` with its first axis over `"batch"` and the others whole.

    Said of the residual stream, or XLA cuts it as weights are cut in one place
    and as batches are in another, and sends it around in between.
    """
    current = keras.distribution.distribution()
    if not isinstance(current, Layouts) or not isinstance(x.shape[0], int):
        return x
    if x.shape[0] % current.size("batch"):  # A prompt of `generate`.
        return x
    axes = ("batch", *[None] * (len(x.shape) - 1))
    layout = keras.distribution.TensorLayout(axes, current.device_mesh)
    return keras.distribution.distribute_tensor(x, layout)


def check_heard():
    """Refuses a distribution of Keras's that the backend would not hear of."""
    current = keras.distribution.distribution()
    if current is not None and keras.backend.backend() != "jax":
        raise ValueError(
            f"On {keras.backend.backend()} Keras ignores {current}: training "
            "would run on one device. Use `keras_stable.set_distribution`, or "
            "KERAS_BACKEND=jax."
        )


def process_count():
    """How many processes train one model, see `set_distribution`."""
    return backend.processes()


def check_heads(num_heads):
    """Refuses heads that the tensor-parallel devices cannot share."""
    current = keras.distribution.distribution()
    if isinstance(current, Layouts) and num_heads % current.size("model"):
        raise ValueError(
            f"{num_heads} heads cannot be shared by "
            f"{current.size('model')} devices: choose a `tensor_parallel` that "
            "divides them."
        )


def get_layout_map(
    device_mesh,
    model_parallel_dim_name="model",
    data_parallel_dim_name="batch",
):
    """How `StableBackbone`'s weights lie on a mesh, as in KerasHub's models.

    Those of `"fsdp+tensor"`: see `set_distribution` and `LAYOUTS`.

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
    names = {
        "model": model_parallel_dim_name,
        "batch": data_parallel_dim_name,
        None: None,
    }
    for name in (model_parallel_dim_name, data_parallel_dim_name):
        if name not in device_mesh.axis_names:
            raise ValueError(
                f"The mesh has no axis {name!r}. Received: axes "
                f"{tuple(device_mesh.axis_names)}"
            )
    layout = keras.distribution.LayoutMap(device_mesh)
    for path, axes in LAYOUTS.items():
        # Models may have the backbone within another layer.
        layout[f"(.*/)?{path}"] = tuple(names[axis] for axis in axes)
    return layout
