"""Copies between the host and the device that nothing waits for."""

import numpy as np
import torch
from keras.src.backend.torch.core import get_device
from torch.utils._pytree import tree_map


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
