"""What a training step needs of devices that are not here: memory, time."""

import contextlib
import dataclasses
import math
import time

import keras
import numpy as np

from keras_stable import backend
from keras_stable import costs
from keras_stable.choices import check_integer
from keras_stable.distribution import set_distribution
from keras_stable.watch import watch


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip does at best.

    Attributes:
        flops: bfloat16 operations a second.
        memory: bytes. Of these the compiler keeps some for itself.
        memory_bandwidth: bytes a second.
        link_bandwidth: bytes a second that it sends along one axis of its
            torus, in both directions together.
        ring: length from which an axis of a slice is closed to a ring.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    ring: int


# Sources: docs.cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e. Their
# "bidirectional interconnect bandwidth per chip" counts what is sent and what
# is received on all axes: 400 GB/s and two axes, 1200 and three, 800 and two.
CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 400e9 / 4, 16),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1200e9 / 6, 4),
    "v6e": Chip(918e12, 32 * 2**30, 1600e9, 800e9 / 4, 16),
}


def plan(
    build,
    batch_size,
    sequence_length,
    topology,
    distribution="fsdp",
    tensor_parallel=None,
    monitor=True,
    effort=None,
):
    """Compiles a training step for devices that need not be here.

    The step is that of `fit`: the model's own `train_step` and optimizer,
    with every kernel, and measured as a monitor does. The model is built
    without weights, so that one of any size can be planned.

    Args:
        build: function without arguments that returns a compiled
            `StableCausalLM`.
        batch_size, sequence_length: int. B, of all devices together, and T.
        topology: `"v5e:2x4"`, `"v5p:8x8x8"`, `"v6e:4x4"`: TPU chips, compiled
            for by libtpu; or `"cpu:8"`, for what GPUs hold of weights.
        distribution, tensor_parallel: as of `set_distribution`.
        monitor: bool. Whether the step measures its full table.
        effort: float from -1 to 1, how hard the compiler tries; None for what
            it does in `fit`. At -1 it takes less time, for a program of
            the same products that may hold and move more.

    Returns:
        Dictionary, of one device unless it says otherwise:

        - `devices`, `mesh`: how many; how many along batch and model.
        - `parameters`: of the model.
        - `memory`: bytes by what they hold, and their sum, `total`.
        - `flops`: what the program computes, products alone.
        - `model_flops`: what the formula needs, nothing computed again.
        - `memory_traffic`: bytes read and written.
        - `collectives`: list of `kind`, `count`, `bytes` (of the whole tensor
          that is gathered or reduced) and `group`, devices that take part.
        - `seconds`: what products, memory and links take at the chip's best:
          `compute`, `memory`, `interconnect`; None for `"cpu:N"`.
        - `mfu`, `mfu_serial`: `model_flops` by what the chip could do in the
          longest of the three, and in their sum: bounds, not predictions.

    Raises:
        MemoryError: if it does not fit.
        ValueError: if there is no such topology, or the batch does not divide.

    Example:

    >>> def build():
    ...     lm = StableCausalLM.from_size("8b", variant="qk_norm_cap")
    ...     lm.compile(AdamW(3e-4))
    ...     return lm
    >>> plan(build, 512, 4096, "v5p:8x8x8", "fsdp")         # doctest: +SKIP
    """
    check_integer(sequence_length, "`sequence_length`", 1)
    devices = backend.devices_of(topology)
    if distribution == "none":
        # A mesh of one device, which says for what to compile.
        distribution, devices = "data", devices[:1]
    before = keras.distribution.distribution()
    set_distribution(distribution, batch_size, tensor_parallel, devices)
    try:
        mesh = keras.distribution.distribution().device_mesh
        # A shape in no more than one number of memory.
        ids = np.broadcast_to(np.int32(0), (batch_size, sequence_length))
        batch = backend.shapes_of(({"token_ids": ids}, ids))
        lm = backend.without_weights(build, batch)
        start = time.perf_counter()
        with watch(lm) if monitor else contextlib.nullcontext():
            step = backend.compile_step(lm, batch, effort)
        seconds = time.perf_counter() - start
    finally:
        keras.distribution.set_distribution(before)
    places = [getattr(d, "coords", None) for d in mesh.devices.flat]
    found = {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(zip(mesh.axis_names, mesh.shape)),
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "parameters": sum(math.prod(w.shape) for w in lm.trainable_weights),
        "memory": _memory(step),
        "model_flops": model_flops(lm, batch_size, sequence_length)
        / len(devices),
        **costs.summarize(step["text"]),
        "compile_seconds": seconds,
    }
    chip = CHIPS.get(topology.partition(":")[0])
    _estimate(found, chip, places)
    return found


def _memory(step):
    """Bytes of one device by what they hold."""
    state, memory = step["state"], step["memory"]
    # Rows of a tile are filled up.
    padding = memory["argument"] - sum(state.values())
    found = {
        **state,
        "padding": padding,
        "temporaries": memory["temp"],
        "outputs": memory["output"] - memory["alias"],
        "program": memory["generated_code"],
    }
    return {**found, "total": sum(found.values())}


def model_flops(lm, batch_size, sequence_length):
    """Operations that a step needs: three times those of the forward pass.

    ```
    3 * B * T * (2 * (kernels + V D) + 4 * sum over layers of N H * keys)
    ```

    with `keys` the mean number that a query sees.
    """
    kernels = [w for w in lm.trainable_weights if w.name == "kernel"]
    products = sum(math.prod(w.shape) for w in kernels)
    embedding = lm.backbone.token_embedding
    products += embedding.input_dim * embedding.output_dim
    attention, T = 0, sequence_length
    for layer in lm.backbone.transformer_layers:
        core = layer.attention
        window = core.variant.architecture.sliding_window or T
        w = min(window, T)
        keys = (w * (w + 1) / 2 + (T - w) * w) / T
        width = core.num_heads * (
            core.head_dim or embedding.output_dim // core.num_heads
        )
        attention += width * keys
    return 3.0 * batch_size * T * (2 * products + 4 * attention)


def _estimate(found, chip, places):
    """Adds the times of a roofline."""
    moved = found["collectives"]
    sent = 0.0
    for one in moved:
        devices = one.pop("devices")
        one["group"] = len(devices) or found["devices"]
        if chip is not None:
            sent += _send_seconds(one, devices, chip, places)
    found["seconds"] = found["mfu"] = found["mfu_serial"] = None
    if chip is None:
        return
    times = {
        "compute": found["flops"] / chip.flops,
        "memory": found["memory_traffic"] / chip.memory_bandwidth,
        "interconnect": sent,
    }
    needed = found["model_flops"] / chip.flops
    found["seconds"] = times
    found["mfu"] = needed / max(times.values())
    found["mfu_serial"] = needed / sum(times.values())


def _send_seconds(one, devices, chip, places):
    """What a collective takes, its bytes alone: hops and waiting are free."""
    group = [places[i] for i in devices] if devices else places
    n = len(group)
    if n < 2:
        return 0.0
    if one["kind"] == "collective-permute":
        # To one neighbour, in one direction.
        return one["bytes"] / (chip.link_bandwidth / 2)
    bandwidth = 0.0
    for axis, whole in zip(zip(*group), zip(*places)):
        length = len(set(axis))
        if length > 1:
            # A line that is not closed to a ring carries half.
            ring = length == len(set(whole)) and length % chip.ring == 0
            bandwidth += chip.link_bandwidth * (1.0 if ring else 0.5)
    twice = 2 if one["kind"] == "all-reduce" else 1
    return twice * one["bytes"] * (n - 1) / n / bandwidth


def largest_batch(make, granularity, capacity, report, limit=2**20):
    """The largest batch that fits, by a search over compiled steps.

    Each guess is where the line through the two largest tries meets the
    capacity, or twice the last that fitted. What does not fit is taken for a
    bound, though memory may fall where the loss takes one more chunk.

    Args:
        make: function from a batch size to a plan; it may raise `MemoryError`.
        granularity: int. The batch is a multiple of it.
        capacity: bytes of one device.
        report: function of each try's batch, bytes (infinite where the
            compiler does not tell) and whether it fits.
        limit: int. The largest batch to try.

    Returns:
        `(batch_size, plan)`; `(0, None)` if nothing fits.
    """
    low, high, best = 0, limit // granularity + 1, None
    points = {}
    guess = 1
    while high - low > 1:
        size = guess * granularity
        try:
            found = make(size)
            needed = found["memory"]["total"]
        except MemoryError as error:
            found = None
            needed = error.args[1] if len(error.args) > 1 else math.inf
        fits = found is not None and needed <= capacity
        points[guess] = needed
        report(size, needed, fits)
        if fits:
            low, best = guess, found
        else:
            high = guess
        guess = _next(points, low, high, capacity)
    return low * granularity, best


def _next(points, low, high, capacity):
    """The next guess: on the line through two tries, inside the bounds."""
    known = sorted(k for k in points if math.isfinite(points[k]))[-2:]
    guess = 2 * low or 1
    if len(known) == 2:
        a, b = known
        slope = (points[b] - points[a]) / (b - a)
        if slope > 0:
            guess = math.floor(a + (capacity - points[a]) / slope)
    return min(max(guess, low + 1), high - 1)
