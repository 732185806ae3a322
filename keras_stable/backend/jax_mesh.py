"""Which devices a program of JAX is for."""

import jax
import keras
from jax import numpy as jnp
from jax.sharding import PartitionSpec


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


def device_kind():
    """The name of the device the program being traced is for, as "H200"."""
    found = mesh()
    device = jax.devices()[0] if found is None else found.devices.flat[0]
    return device.device_kind


def _share(axis, *sizes):
    """The mesh's axis, if it divides all the sizes; else None."""
    devices = mesh().shape.get(axis, 1)
    return axis if all(size % devices == 0 for size in sizes) else None


def on_each_device(function, inputs, outputs, batch, heads):
    """`function`, each device computing its sequences and heads.

    The compiler of a distributed program cannot divide a kernel. Sequences
    are divided by the mesh's axis `"batch"`, heads by `"model"`, where the
    axis divides them; otherwise each device computes them all. Without a
    distribution, `function` as it is.

    Args:
        function: of arrays or None, and returning arrays.
        inputs, outputs: trees of the axes of arrays, as `"BTNH"`, or None: B
            are sequences, N heads, and other letters are not divided.
        batch: int, how many sequences there are.
        heads: tuple of int, all the numbers of heads among the arrays.
    """
    if mesh() is None:
        return function
    divided = {"B": _share("batch", batch), "N": _share("model", *heads)}

    def spec(axes):
        return PartitionSpec(*[divided.get(axis) for axis in axes])

    return jax.shard_map(
        function,
        mesh=mesh(),
        in_specs=jax.tree.map(spec, inputs),
        out_specs=jax.tree.map(spec, outputs),
        check_vma=False,
    )


def number(value):
    """A float as a float32 scalar that programs are given, if they can be.

    With JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS=1 it is an argument of the program
    that is compiled, which so serves for all values; otherwise a part of it.
    """
    with jax.ensure_compile_time_eval():
        # What is no larger than 32 bytes would be a part of it.
        values = jnp.full(16, value, "float32")
    return values[0]
