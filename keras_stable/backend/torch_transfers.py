"""Copies between the host and the device that nothing waits for."""

import contextlib

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
    contiguous = {"memory_format": torch.contiguous_format}
    copies = [v.value.detach().clone(**contiguous) for v in variables]
    device = next((x.device for x in copies if x.is_cuda), None)
    if device is None:
        return copies, None
    stream = torch.cuda.Stream(device)
    # Behind the clones, and before the next step.
    stream.wait_stream(torch.cuda.current_stream(device))
    return copies, stream


def finish_copies(handle):
    """The values as numpy arrays, waiting for the device if need be.

    To be called once; may be called by another thread.
    """
    copies, stream = handle
    stage, arrays = None, []
    # A thread begins on the first device, and on its default stream.
    cuda = stream is not None
    with torch.cuda.stream(stream) if cuda else contextlib.nullcontext():
        for i, copy in enumerate(copies):
            # Each device tensor goes as soon as it is here.
            copies[i] = None
            same, dtype = _OTHERS.get(copy.dtype, (None, None))
            copy = copy.view(same) if same else copy
            if copy.is_cuda:
                if stage is None:
                    pinned = {"dtype": torch.uint8, "pin_memory": True}
                    stage = torch.empty(STAGE, **pinned)
                copy = _through(stage, copy, stream)
            array = copy.numpy()
            arrays.append(array.view(dtype) if dtype else array)
    return arrays


def _through(stage, copy, stream):
    """A tensor of the device in ordinary memory, through pinned memory.

    Straight into ordinary memory, a copy would hold up the kernels that the
    training launches; to pin a whole state would take longer than a step.
    """
    host = torch.empty(copy.shape, dtype=copy.dtype, device="cpu")
    whole, parts = host.reshape(-1), copy.reshape(-1)
    stage = stage.view(copy.dtype)
    for begin in range(0, parts.numel(), stage.numel()):
        part = parts[begin : begin + stage.numel()]
        here = stage[: part.numel()]
        here.copy_(part, non_blocking=True)
        stream.synchronize()
        whole[begin : begin + part.numel()].copy_(here)
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
