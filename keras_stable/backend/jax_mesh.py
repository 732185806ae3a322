"""Which devices a program of JAX is for."""

import jax
import keras


def mesh():
    """The `jax.sharding.Mesh` of the current distribution, or None."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return distribution.device_mesh.backend_mesh


def platform():
    """`"cpu"`, `"gpu"` or `"tpu"`: what the program being traced runs on.

    That of the distribution's devices, which need not be of this machine: a
    program can be compiled for devices that are elsewhere.
    """
    found = mesh()
    if found is None:
        return jax.default_backend()
    name = found.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name
