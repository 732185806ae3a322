"""What torch and TensorFlow answer where only jax has something."""


def attention(*tensors, **how):
    """None: there is no kernel but those that Keras chooses from."""


def flash_attention():
    """None: Keras chooses."""
