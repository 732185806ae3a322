"""Copies between the host and the device that nothing waits for."""

import contextlib
import math

import keras
import ml_dtypes
import numpy as np
import torch
from keras.src.backend.torch.core import convert_to_tensor
from keras.src.backend.torch.core import get_device
from torch.utils._pytree import tree_map

from keras_stable.backend.internals import standardized

# Bytes of pinned memory through which a state leaves the device.
STAGE = 32 * 2**20
# dtypes that numpy has not, and those of as many bits that both have.
_OTHERS = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}


def to_device(batch):
    """A batch of arrays, on its way to the device; waits for nothing."""
    if not torch.cuda.is_available() or get_device() == "cpu":
        return batch

    def send(x):
        if isinstance(x, torch.Tensor) and x.device.type == "cpu":
            # A copy from memory that is not pinned would wait until the
            # device has done all that it was given before.
            return x.pin_memory().to(get_device(), non_blocking=True)
        return x

    return tree_map(send, batch)


def start_read(array):
    """Begins to copy an array to the host, and returns at once."""
    if not array.is_cuda:
        return array.clone(), None
    host = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
    host.copy_(array, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def finish_read(handle):
    """The array as numpy, waiting for the device if need be."""
    host, event = handle
    if event is not None:
        event.synchronize()
    return host.numpy()


class _Arriving:
    """A number on its way to the host; `float` of it waits."""

    def __init__(self, handle, index):
        self._handle, self._index = handle, index

    def __float__(self):
        return float(finish_read(self._handle)[self._index])

    def __array__(self, dtype=None, copy=None):
        return np.array(float(self), dtype or "float32")


def send_logs(logs):
    """The logs of a step, whose scalars leave the device in one copy.

    Keras would copy each by itself, and the device stand still meanwhile.
    """
    scalars = {
        name: value
        for name, value in logs.items()
        if isinstance(value, torch.Tensor) and value.is_cuda and not value.dim()
    }
    if not scalars:
        return logs
    values = [value.detach().float() for value in scalars.values()]
    handle = start_read(torch.stack(values))
    arriving = [_Arriving(handle, i) for i in range(len(scalars))]
    return {**logs, **dict(zip(scalars, arriving))}


def start_copies(variables):
    """Begins to copy variables' values to the host, and returns at once.

    What the values become afterwards, in place or not, is not seen.
    """
    values = [v.value.detach() for v in variables]
    # Joined: the thread that takes them to the host does little for each, and
    # seldom holds up the one that trains, as any line of Python does.
    pieces = [
        (places, torch.cat([values[i].reshape(-1) for i in places]))
        for places in _pieces(values)
    ]
    shapes = [tuple(x.shape) for x in values]
    device = next((x.device for x in values if x.is_cuda), None)
    if device is None:
        return pieces, shapes, None
    stream = torch.cuda.Stream(device)
    # Behind the copies, and before the next step.
    stream.wait_stream(torch.cuda.current_stream(device))
    return pieces, shapes, stream


def _pieces(values):
    """Lists of places of values of one dtype that have a stage's bytes."""
    groups = {}
    for place, x in enumerate(values):
        groups.setdefault((x.dtype, x.device), []).append(place)
    for left in groups.values():
        while left:
            piece, size = [], 0
            while left and size < STAGE:
                size += values[left[-1]].nbytes
                piece.append(left.pop())
            yield piece


def finish_copies(handle):
    """The values as numpy arrays, waiting for the device if need be.

    To be called once; may be called by another thread.
    """
    pieces, shapes, stream = handle
    stage, arrays = None, [None] * len(shapes)
    # A thread begins on the first device, and on its default stream.
    cuda = stream is not None
    with torch.cuda.stream(stream) if cuda else contextlib.nullcontext():
        while pieces:
            # Each device tensor goes as soon as it is here.
            places, piece = pieces.pop()
            same, dtype = _OTHERS.get(piece.dtype, (None, None))
            piece = piece.view(same) if same else piece
            if piece.is_cuda:
                if stage is None:
                    pinned = {"dtype": torch.uint8, "pin_memory": True}
                    stage = torch.empty(STAGE, **pinned)
                host = _through(stage, piece, stream)
            else:
                host = piece.numpy()
            host = host.view(dtype) if dtype else host
            ends = np.cumsum([math.prod(shapes[i]) for i in places])
            for i, part in zip(places, np.split(host, ends[:-1])):
                arrays[i] = part.reshape(shapes[i])
    return arrays


def _through(stage, piece, stream):
    """A vector of the device in ordinary memory, through pinned memory.

    Straight into ordinary memory, a copy would hold up the kernels that the
    training launches; to pin a whole state would take longer than a step.
    """
    stage = stage.view(piece.dtype)
    # By numpy, whose memory is in large pages, and which copies in one thread,
    # without the lock of Python's: PyTorch would take every core.
    from_stage = stage.numpy()
    host = np.empty(piece.numel(), from_stage.dtype)
    for begin in range(0, piece.numel(), stage.numel()):
        part = piece[begin : begin + stage.numel()]
        stage[: part.numel()].copy_(part, non_blocking=True)
        stream.synchronize()
        host[begin : begin + part.numel()] = from_stage[: part.numel()]
    return host


def replace_batches(args, take, steps, store):
    """Arguments of a train function that train on other batches.

    Args:
        args: tuple, what the train function was called with.
        take: function without arguments, returns the next batch.
        steps: int. How many batches an execution takes: one.
        store: dictionary that is kept from call to call.
    """

    def convert(x):
        if x is None or isinstance(x, torch.Tensor):
            return x
        if isinstance(x, np.ndarray) and not x.flags.writeable:
            x = x.copy()  # torch would warn.
        return convert_to_tensor(x)

    # On the CPU first: a plain copy to the device would wait for it.
    with keras.device("cpu"):
        batch = keras.tree.map_structure(convert, standardized(take()))
    return ([to_device(batch)],)
