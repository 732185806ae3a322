"""Functions of JAX with gradients of their own."""

import functools

import jax


def with_gradient(function, x, w, *constants):
    """The first output of `function`, with the gradient that it computes.

    Args:
        function: of the tensors and of `gradient`, a bool. It returns a float32
            vector; with `gradient` a tuple of it and of the gradients of its
            first entry by `x` and `w`.
        x, w: tensors.
        *constants: tensors without gradients.
    """

    @jax.custom_vjp
    def value(*tensors):
        return function(*tensors, gradient=False)

    def forward(*tensors):
        return function(*tensors, gradient=True)

    def backward(gradients, upstream):
        scaled = [g * upstream[0] for g in gradients]
        scaled = [g.astype(t.dtype) for g, t in zip(scaled, (x, w))]
        return (*scaled, *(None for _ in constants))

    value.defvjp(forward, backward)
    return value(x, w, *constants)


def operation(name, forward, backward):
    """One operation, whose gradient is computed anew from its inputs.

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

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def run(tensors, settings):
        return forward(tensors, *settings)

    def keep(tensors, settings):
        return run(tensors, settings), tensors

    def pull(settings, tensors, upstream):
        gradients = backward(tensors, upstream[0], *settings)
        return ([*gradients, *[None] * (len(tensors) - len(gradients))],)

    run.defvjp(keep, pull)
    return run

