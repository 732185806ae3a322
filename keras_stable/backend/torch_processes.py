"""Data parallelism on PyTorch: a process for each device, with a whole model.

Like `DistributedDataParallel`, which wraps a module's `forward` and so does
not fit a Keras model, but after the backward pass instead of within it.
"""

import os

import numpy as np
import torch

from keras_stable.backend.internals import check_data
from keras_stable.backend.internals import check_shares

# Numbers that processes send each other at a time: 100 MB of float32.
BUCKET = 25_000_000


def distribute(name, batch_size, tensor_parallel, devices):
    """Joins the processes that `torchrun` began; None: there is no mesh.

    Keras accepts its own distributions on torch and then ignores them.
    """
    check_data(name, "torch")
    if devices is not None or "RANK" not in os.environ:
        raise ValueError(
            "On torch each device has a process of its own: start them with "
            "`torchrun --nproc-per-node=DEVICES SCRIPT`. In one process, use "
            "KERAS_BACKEND=jax."
        )
    count = int(os.environ["WORLD_SIZE"])
    check_shares(batch_size, count, "processes")
    if torch.cuda.is_available():
        # Keras's "cuda" is the current one.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group()


def undistribute():
    """Ends what `distribute` began."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def processes():
    """How many processes train one model."""
    joined = torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


def replicas():
    """How many parts of a loss Keras adds up."""
    return 1


def global_mean(x):
    """The mean over all processes; its gradient is that of `x`."""
    if processes() == 1:
        return x
    mean = x.detach().clone()
    torch.distributed.all_reduce(mean)
    # Nothing is added to it, so that it has the same bits everywhere.
    return mean / processes() + (x - x.detach())


def merge(tensors):
    """Gradients of the whole batch from those that copies of the model have.

    Args:
        tensors: list of tensors and None.
    """
    if processes() > 1:
        left = [x for x in tensors if x is not None]
        while left:
            # Many small messages would wait for each other; one of all would
            # take the memory of all.
            bucket = [left.pop()]
            while left and sum(x.numel() for x in bucket) < BUCKET:
                if left[-1].dtype != bucket[0].dtype:
                    break
                bucket.append(left.pop())
            flat = torch.cat([x.reshape(-1) for x in bucket])
            torch.distributed.all_reduce(flat.div_(processes()))
            parts = flat.split([x.numel() for x in bucket])
            for x, part in zip(bucket, parts):
                x.copy_(part.view_as(x))
    return tensors


def must_merge():
    """Whether gradients differ between processes until `merge`."""
    return processes() > 1


def of_all(x):
    """What each copy of the model has of a vector: (copies, len)."""
    parts = [torch.empty_like(x) for _ in range(processes())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def sees_a_part(model):
    """Whether a step sees a part of the batch alone, one of several."""
    return must_merge()


def local_rows(batch_size):
    """Which rows of a global batch this process feeds: int array."""
    rows = np.arange(batch_size)
    if processes() == 1:
        return rows
    return np.split(rows, processes())[torch.distributed.get_rank()]


def is_writer():
    """Whether this process writes files: one of several does."""
    return processes() == 1 or torch.distributed.get_rank() == 0
