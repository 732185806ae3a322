"""What torch and TensorFlow answer where only jax has something."""


def attention_kernel(query, cap, clip):
    """None: there is no kernel but those that Keras chooses from."""


def flash_attention():
    """None: Keras chooses."""


def number(value):
    """`value`: it is a part of the programs."""
    return value


def _refuse(*args):
    raise ValueError(
        "Plans are made with jax, which compiles for devices that are not "
        "here. Use KERAS_BACKEND=jax."
    )


compile_step = devices_of = shapes_of = without_weights = _refuse


def _one_each(*args, **kwargs):
    raise ValueError(
        "Several models are trained in one program by jax alone: use "
        "KERAS_BACKEND=jax. Here, train each with `fit` in a process of its "
        "own."
    )


Stack = losses_of_many = _one_each
