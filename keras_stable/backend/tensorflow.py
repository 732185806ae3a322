"""What keras_stable needs of TensorFlow beyond Keras."""

import tensorflow as tf

__all__ = ["check_data_parallel", "device_name"]


def device_name():
    """Name and number of devices, e.g. `"NVIDIA H100 80GB HBM3 x 1"`."""
    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        return "cpu x 1"
    details = tf.config.experimental.get_device_details(devices[0])
    return f"{details.get('device_name', 'GPU')} x {len(devices)}"


def check_data_parallel(batch_size):
    raise ValueError(
        "Keras accepts a distribution on tensorflow and then ignores it: "
        "training would run on one device. Use KERAS_BACKEND=jax for data "
        "parallelism."
    )
