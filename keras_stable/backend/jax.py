"""What keras_stable needs of JAX beyond Keras."""

import jax

__all__ = ["check_data_parallel", "device_name"]


def device_name():
    """Name and number of devices, e.g. `"NVIDIA H100 80GB HBM3 x 1"`."""
    devices = jax.devices()
    return f"{devices[0].device_kind} x {len(devices)}"


def check_data_parallel(batch_size):
    """Raises unless a batch divides evenly among the devices."""
    devices = jax.device_count()
    if batch_size % devices:
        raise ValueError(
            f"The batch must be a multiple of the {devices} devices it is "
            f"divided among. Received: batch size {batch_size}"
        )
