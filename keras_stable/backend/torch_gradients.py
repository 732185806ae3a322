"""Functions of PyTorch with gradients of their own."""

import json

import torch

_SCHEMA = "(Tensor[] tensors, str settings) -> Tensor[]"


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x, w, *constants):
        value, ctx.gradients = function(x, w, *constants, gradient=True)
        ctx.dtypes = x.dtype, w.dtype
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradient of this loss was taken before: it is computed "
                "once, beside the loss. Compute the loss again."
            )
        # In place: that of the head may be of 1 GB.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [g.mul_(upstream[0]) for g in gradients]
        scaled = [g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes)]
        others = len(ctx.needs_input_grad) - 3
        return (None, *scaled, *(None for _ in range(others)))


def with_gradient(function, x, w, *constants):
    """The first output of `function`, with the gradient that it computes.

    Args:
        function: of the tensors and of `gradient`, a bool. It returns a float32
            vector; with `gradient` a tuple of it and of the gradients of its
            first entry by `x` and `w`.
        x, w: tensors.
        *constants: tensors without gradients.
    """
    return _WithGradient.apply(function, x, w, *constants)


def operation(name, forward, backward):
    """One operation, whose gradient is computed anew from its inputs.

    One too in the graphs that regions are traced into, where everything else
    becomes its parts, whose results are kept for the gradient.

    Args:
        name: string, unique.
        forward: `forward(tensors, *settings)` returns a list of tensors, of
            which only the first has a gradient.
        backward: `backward(tensors, upstream, *settings)` returns the
            gradients of the first tensors, for all that have one.

    Returns:
        Function of `tensors`, a list, and `settings`, a tuple of numbers,
        bools, None and tuples of them. It returns what `forward` does.
    """

    def run(tensors, settings):
        return forward(tensors, *json.loads(settings))

    def pull(tensors, settings):
        *tensors, upstream = tensors
        return backward(tensors, upstream, *json.loads(settings))

    def define(name, function):
        # Settings as text: schemas have no lists with None.
        made = torch.library.custom_op(
            f"keras_stable::{name}",
            function,
            mutates_args=(),
            schema=_SCHEMA,
        )
        made.register_fake(function)
        return made

    run_op = define(name, run)
    pull_op = define(f"{name}_backward", pull)

    def keep(ctx, inputs, output):
        tensors, ctx.settings = inputs
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors)

    def gradients(ctx, upstream):
        tensors = [*ctx.saved_tensors, upstream[0].contiguous()]
        found = pull_op(tensors, ctx.settings)
        return [*found, *[None] * (ctx.count - len(found))], None

    run_op.register_autograd(gradients, setup_context=keep)

    def call(tensors, settings):
        return run_op(tensors, json.dumps(settings))

    return call

