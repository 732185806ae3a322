"""What keras_stable needs of PyTorch beyond Keras."""

import os

import keras
import torch
from keras.src.backend.torch.core import get_device

from keras_stable.backend.internals import FUNCTIONS
from keras_stable.backend.jax_only import Stack as Stack
from keras_stable.backend.jax_only import compile_step as compile_step
from keras_stable.backend.jax_only import devices_of as devices_of
from keras_stable.backend.jax_only import flash_attention as flash_attention
from keras_stable.backend.jax_only import losses_of_many as losses_of_many
from keras_stable.backend.jax_only import number as number
from keras_stable.backend.jax_only import shapes_of as shapes_of
from keras_stable.backend.jax_only import without_weights as without_weights
from keras_stable.backend.parts import check_part
from keras_stable.backend.torch_attention import HEAD_SIZES
from keras_stable.backend.torch_attention import attend_fused
from keras_stable.backend.torch_gradients import operation as operation
from keras_stable.backend.torch_gradients import with_gradient as with_gradient
from keras_stable.backend.torch_guard import give_numbers as give_numbers
from keras_stable.backend.torch_guard import guarded as guarded
from keras_stable.backend.torch_guard import put_back as put_back
from keras_stable.backend.torch_guard import taken_back
from keras_stable.backend.torch_processes import distribute as distribute
from keras_stable.backend.torch_processes import global_mean as global_mean
from keras_stable.backend.torch_processes import is_writer as is_writer
from keras_stable.backend.torch_processes import local_rows as local_rows
from keras_stable.backend.torch_processes import merge as merge
from keras_stable.backend.torch_processes import must_merge as must_merge
from keras_stable.backend.torch_processes import of_all as of_all
from keras_stable.backend.torch_processes import processes as processes
from keras_stable.backend.torch_processes import replicas as replicas
from keras_stable.backend.torch_processes import sees_a_part as sees_a_part
from keras_stable.backend.torch_processes import undistribute as undistribute
from keras_stable.backend.torch_programs import can_compile
from keras_stable.backend.torch_programs import fused as fused
from keras_stable.backend.torch_programs import queueing as queueing
from keras_stable.backend.torch_programs import region as region
from keras_stable.backend.torch_programs import rehearse as rehearse
from keras_stable.backend.torch_programs import (
    without_gradient as without_gradient,
)
from keras_stable.backend.torch_transfers import finish_copies as finish_copies
from keras_stable.backend.torch_transfers import finish_read as finish_read
from keras_stable.backend.torch_transfers import (
    replace_batches as replace_batches,
)
from keras_stable.backend.torch_transfers import send_logs as send_logs
from keras_stable.backend.torch_transfers import start_copies as start_copies
from keras_stable.backend.torch_transfers import start_read as start_read
from keras_stable.backend.torch_transfers import to_device as to_device
from keras_stable.backend.torch_updates import mean_ratios as mean_ratios
from keras_stable.backend.torch_updates import (
    observe_updates as observe_updates,
)
from keras_stable.backend.torch_updates import square_sums as square_sums

__all__ = FUNCTIONS

_constants = {}


def device_name():
    """Name and number of devices, e.g. `"NVIDIA H100 80GB HBM3 x 1"`."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    return "cpu x 1"


def apart(value, function, *tensors):
    """`value`, which is `function(*tensors)`, to be looked at.

    The model's own computation must not change by a bit, and does not here.
    """
    return value


def reachable(value, reference):
    """Whether `value` may be used where `reference` was made: always."""
    return True


def reduce_rows(x):
    """Sums of squares, largest magnitudes, sums and counts of bad entries.

    Args:
        x: floating point tensor (rows, dim).

    Returns:
        float32 tensor (4, rows), of finite entries but for the last.
    """
    finite = torch.isfinite(x)
    y = torch.where(finite, x.float(), 0.0)
    return torch.stack(
        [
            y.square().sum(-1),
            y.abs().amax(-1),
            y.sum(-1),
            x.shape[-1] - finite.sum(-1, dtype=torch.float32),
        ]
    )


def add_product(total, a, b):
    """`total + a @ b`; float32. `total` may be overwritten."""
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    if a.is_cuda:
        # Added by the product's own kernel: no product in between, of 1 GB
        # for a vocabulary of 256,000.
        add = torch.ops.aten.addmm.dtype_out
        return add(total, a, b, torch.float32, out=total)
    return total.add_(matmul_float32(a, b))


def add_slice(total, start, part):
    """`total`, to which `part` is added at `start`, an index of each axis.

    `total` may be overwritten.
    """
    place = tuple(slice(a, a + n) for a, n in zip(start, part.shape))
    total[place] += part
    return total


def matmul_float32(a, b):
    """`a @ b` of matrices, summed and returned in float32.

    Products of 16-bit numbers are exact in float32.
    """
    if a.dtype == torch.float32:
        return a @ b
    learned = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if a.is_cuda and not learned:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def fuses_adamw(variables):
    """Whether `update_adamw` is there and faster for these variables."""
    return all(v.value.dtype == torch.float32 for v in variables)


def _updates_made(optimizer):
    """Updates so far, without waiting for the device if it can be."""
    batches = optimizer._iterations.value
    each = optimizer.gradient_accumulation_steps or 1
    # Each batch adds one, in place. Whatever else assigns is seen here too.
    known, version, count = vars(optimizer).get("_counted", (None, 0, 0))
    left_out = taken_back(optimizer)
    if batches is known and batches._version == version + each:
        count += 1 - left_out
    else:
        count = int(batches) // each
    vars(optimizer)["_counted"] = batches, batches._version, count
    return count


def _norms(optimizer, gradients):
    """Norms of gradients that will be clipped, (len,)."""
    known = vars(optimizer).get("_measured", {"gradients": ()})
    known["clipped"] = gradients
    if list(map(id, known["gradients"])) == list(map(id, gradients)):
        return known["norms"]
    return torch.stack(torch._foreach_norm(gradients))


def update_adamw(optimizer, gradients, variables, learning_rate, decay):
    """Clips by the global norm, decays and updates, in one pass.

    Args:
        optimizer: a Keras `AdamW` that is built.
        gradients, variables: lists. The gradients may be overwritten.
        learning_rate: float32 scalar tensor.
        decay: list of floats, of each variable, that the rate is times.
    """
    values = [v.value for v in variables]
    indices = [optimizer._get_variable_index(v) for v in variables]
    first, second = (
        [slots[i].value for i in indices]
        for slots in (optimizer._momentums, optimizer._velocities)
    )
    step = _updates_made(optimizer) + 1
    # PyTorch adds epsilon after the bias correction, Keras before it.
    epsilon = optimizer.epsilon / (1 - optimizer.beta_2**step) ** 0.5
    scale = None
    if optimizer.global_clipnorm:
        norm = torch.linalg.vector_norm(_norms(optimizer, gradients))
        scale = torch.clamp(norm / optimizer.global_clipnorm, min=1.0)
        # NaN for an infinite norm, as in Keras: not a zeroed gradient.
        scale = scale + (norm - norm)
    count = torch.full((), float(step), device=values[0].device)
    for strength in set(decay):
        mine = [i for i, d in enumerate(decay) if d == strength]
        with torch.no_grad():
            torch._fused_adamw_(
                *([x[i] for i in mine] for x in (values, gradients)),
                *([x[i] for i in mine] for x in (first, second)),
                [],
                [count] * len(mine),
                lr=learning_rate,
                beta1=optimizer.beta_1,
                beta2=optimizer.beta_2,
                weight_decay=strength,
                eps=epsilon,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=vars(optimizer).get("_left_out"),
            )


def fuses_attention(query, masked):
    """Whether Keras's attention has no tensor of all logits.

    Args:
        query: tensor.
        masked: bool. Whether it is given a mask.
    """
    # A mask of all pairs, as floats, on a CPU.
    return get_device() != "cpu" or not masked


def attention_kernel(query, cap, clip):
    """Kernels that compute what `ops.dot_product_attention` cannot.

    Args:
        query: anything with the shape (B, T, N, H) and dtype of queries.
        cap: float or None.
        clip: tuple or None.

    Returns:
        Name, and a function with the arguments and results of
        `torch_attention.attend_fused`; or None.
    """
    dtype = keras.backend.standardize_dtype(query.dtype)
    bounded = cap is not None or clip is not None
    if not bounded or dtype not in ("bfloat16", "float16"):
        return None
    if not str(get_device()).startswith("cuda") or not can_compile():
        return None
    if query.shape[-1] > HEAD_SIZES[-1]:
        return None
    return "Triton", attend_fused


def gelu(x):
    """`x * Phi(x)`, Phi the normal distribution function: the exact GELU."""
    return torch.nn.functional.gelu(x)


def constant(array):
    """A numpy array as a tensor. Torch keeps one of it: give it few arrays."""
    key = id(array), get_device()
    if key not in _constants:
        # With the array, whose `id` is thereby its own.
        _constants[key] = array, torch.as_tensor(array, device=key[1])
    return _constants[key][1]


def scan(step, carry, inputs):
    """Calls `carry, output = step(carry, [x[i] for x in inputs])` for each i.

    One after the other, so that no two steps hold memory at a time.

    Returns:
        Tuple of the last carry and the stacked outputs.
    """
    outputs = []
    for parts in zip(*inputs):
        carry, output = step(carry, parts)
        outputs.append(output)
    return carry, torch.stack(outputs)


def carry(model, take):
    """Nothing to carry: there is no trace to leave."""
    return lambda: None


def each_step(model, collect):
    """Nothing to do: an execution is one step."""
    return lambda: None


def export_options(rank_by_input):
    """What `Model.export` needs for axes of any length, beyond a signature.

    Args:
        rank_by_input: dictionary from an input's name to its number of axes.
    """
    any_length = torch.export.Dim.DYNAMIC
    shapes = {
        name: dict.fromkeys(range(rank), any_length)
        for name, rank in rank_by_input.items()
    }
    return {"dynamic_shapes": [shapes]}


def gather(packed, steps, store):
    """The vector of one step."""
    return packed


def check_observable(model, tables):
    """Raises where a model cannot be observed on this backend.

    Args:
        model: compiled.
        tables: bool. Whether full tables are measured.
    """
    if model.jit_compile is True:
        raise ValueError(
            "On torch, a step compiled as a whole (`jit_compile=True`) cannot "
            "be observed: compile the model without it, or monitor with "
            "`every=None`."
        )
    if must_merge():
        check_part(model.optimizer, tables, "On torch, each process")


def keep_programs(directory):
    """Keeps compiled programs for the next process, where a compiler can.

    Args:
        directory: path of a folder, made if need be; None: nothing is kept.
    """
    if directory is None:
        return
    for variable, name in (
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("TRITON_CACHE_DIR", "triton"),
    ):
        path = os.path.join(os.fspath(directory), name)
        os.environ.setdefault(variable, path)


def peak_memory():
    """Largest number of bytes in use on the device since it was last asked."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak
