"""Compiled parts of a model on PyTorch, free of Keras's bookkeeping.

`torch.compile` of a Keras step guards on every layer of Keras and compiles
anew when one changes. Here a function is first traced into a graph of plain
torch operations, a pure function of tensors; only that graph is compiled, and
all layers of one structure share it.
"""

import contextlib
import functools
import warnings

import keras
import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

# Calls outside of training before a shape is compiled: lengths that are seen
# once or twice, as in scoring texts, are not worth seconds.
PATIENCE = 100
PLAIN = torch.Tensor, torch.nn.Parameter

_programs = {}
_calls = {}
_tracing = False


@functools.cache
def can_compile():
    """Whether there is a compiler for this GPU; warns once if not."""
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        has_triton = None
    if has_triton is not None and has_triton():
        return True
    warnings.warn(
        "torch.compile needs Triton, which is not installed or does not know "
        "this GPU: the model runs uncompiled, at about half the speed.",
        stacklevel=2,
    )
    return False


@contextlib.contextmanager
def queueing():
    """Within it, numbers go to the device without waiting for it."""
    # Keras turns every Python number into a tensor by `torch.as_tensor`. Its
    # copy to a GPU waits for all that was queued before; ten of them in a step
    # left an H100 idle for a sixth of the time. A kernel that fills, or a copy
    # from pinned memory, queues up instead. A trace would record the copy and
    # its program wait in every run: numbers become part of the program, and
    # arrays are copied once, while it is traced.
    original = torch.as_tensor

    def as_tensor(data, dtype=None, device=None):
        there = device is not None and torch.device(device).type == "cuda"
        if isinstance(data, torch.Tensor) or not (there or _tracing):
            return original(data, dtype=dtype, device=device)
        if isinstance(data, (bool, int, float)):
            return torch.full((), data, dtype=dtype, device=device)
        with disable_proxy_modes_tracing():
            if not there:
                return original(data, dtype=dtype, device=device)
            host = original(data, dtype=dtype, device="cpu")
            return host.pin_memory().to(device, non_blocking=True)

    torch.as_tensor = as_tensor
    try:
        yield
    finally:
        torch.as_tensor = original


def trace(function, *args, mode="real"):
    """A graph of plain torch operations, of the tensors in `args`.

    Args:
        mode: `"fake"`: nothing is computed, and nothing takes memory; without
            arrays in `function`, whose numbers would be lost.
    """
    global _tracing
    outer, _tracing = _tracing, True
    try:
        # Without a gradient of its own: it is taken through the graph. Before
        # dispatch, so that attention chooses its kernel when the graph runs.
        with torch.no_grad(), queueing():
            graph = make_fx(function, tracing_mode=mode, pre_dispatch=True)
            graph = graph(*args)
    finally:
        _tracing = outer
    return graph


def _measured_last(program):
    """Moves what is only looked at behind all that a gradient goes through.

    The compiler keeps activations for the backward pass, and computes anew
    what was fused with its neighbours. Sums over an activation that stood
    between it and its GELU were in the way: the GELU's derivative was kept in
    float32, 6 GB more in 24 blocks of 16 x 2048 tokens and 1024 channels.
    """
    graph, learned = program.graph, set()
    schemas = [getattr(node.target, "_schema", None) for node in graph.nodes]
    if any(schema is not None and schema.is_mutable for schema in schemas):
        # What is written in place is not seen below: all keeps its order.
        return program
    *_, output = graph.nodes
    for node in graph.nodes:
        detached = node.target is torch.ops.aten.detach.default
        parts = node.all_input_nodes
        if node.op == "placeholder" or not detached and learned & {*parts}:
            learned.add(node)
    needed = [x for x in output.all_input_nodes if x in learned]
    found = set()
    while needed:
        node = needed.pop()
        if node not in found:
            found.add(node)
            needed += node.all_input_nodes
    for node in list(graph.nodes):
        if found and node.op == "call_function" and node not in found:
            output.prepend(node)
    program.recompile()
    return program


def _signature(tensors):
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)


def fused(function):
    """`function`, compiled into few kernels where there is a GPU.

    Without gradients. Eager, each of its operations would read its whole
    argument from memory.
    """
    compiled = {}

    @functools.wraps(function)
    def call(*args):
        tensors = [x.detach() for x in args if isinstance(x, torch.Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        if _tracing or not on_gpu or not can_compile():
            return function(*args)
        key = (
            _signature(tensors),
            *(None if isinstance(x, torch.Tensor) else x for x in args),
        )
        with torch.no_grad():
            if key not in compiled:

                def graph(*tensors):
                    left = iter(tensors)
                    return function(
                        *(
                            next(left) if isinstance(x, torch.Tensor) else x
                            for x in args
                        )
                    )

                program = trace(graph, *tensors, mode="fake")
                compiled[key] = torch.compile(program, dynamic=False)
            return compiled[key](*tensors)

    return call


def without_gradient():
    """A context in which nothing is kept for a gradient."""
    return torch.no_grad()


def rehearse(function, *args):
    """Runs a pure function once before it counts, for what it records.

    Before a program of it is known, that is. With a gradient, all that its
    operations look at would be kept: a third more than by its program.
    """
    with without_gradient():
        function(*args)


def region(owner, function, key, training):
    """`function` as a program that is shared by layers of one structure.

    Args:
        owner: the layer whose variables `function` reads; it assigns none.
        function: from tensors, in nested lists, tuples and dictionaries, to
            tensors in the same.
        key: hashable. Equal for owners and functions that compute the same of
            variables of the same shapes.
        training: bool. Whether to compile at once: see `PATIENCE`.
    """
    variables = owner.variables

    def run(*args):
        leaves, spec = pytree.tree_flatten(args)
        tensors = [x for x in leaves if x is not None]
        # Others are symbols: Keras's, or those of an export.
        if _tracing or not all(type(x) in PLAIN for x in tensors):
            return function(*args)
        values = [v.value for v in variables]
        how = torch.is_grad_enabled(), str(spec), _signature(values + tensors)
        signature = key, training, how
        if not training:
            _calls[signature] = _calls.get(signature, 0) + 1
            if _calls[signature] < PATIENCE:
                return function(*args)
        if signature not in _programs:

            def graph(values, tensors):
                left = iter(tensors)
                filled = [None if x is None else next(left) for x in leaves]
                mapping = list(zip(variables, values))
                with keras.StatelessScope(state_mapping=mapping):
                    return function(*pytree.tree_unflatten(filled, spec))

            program = _measured_last(trace(graph, values, tensors))
            if any(x.is_cuda for x in tensors) and can_compile():
                program = torch.compile(program, dynamic=False)
            _programs[signature] = program
        return _programs[signature](values, tensors)

    return run
