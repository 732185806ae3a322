"""What keras_stable needs of PyTorch beyond Keras."""

import torch

__all__ = ["check_data_parallel", "device_name"]


def device_name():
    """Name and number of devices, e.g. `"NVIDIA H100 80GB HBM3 x 1"`."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    return "cpu x 1"


def check_data_parallel(batch_size):
    raise ValueError(
        "Keras accepts a distribution on torch and then ignores it: training "
        "would run on one device. Use KERAS_BACKEND=jax for data parallelism."
    )
