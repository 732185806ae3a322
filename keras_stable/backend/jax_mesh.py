"""Which devices a program of JAX is for."""

import jax
import keras
from jax import numpy as jnp


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


def number(value):
    """A float as a float32 scalar that programs are given, if they can be.

    With JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS=1 it is an argument of the program
    that is compiled, which so serves for all values; otherwise a part of it.
    """
    with jax.ensure_compile_time_eval():
        # What is no larger than 32 bytes would be a part of it.
        values = jnp.full(16, value, "float32")
    return values[0]
