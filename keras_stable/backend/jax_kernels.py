"""Which kernels of attention there are for the device of a program."""

import keras

from keras_stable.backend.jax_attention import HEAD_SIZES
from keras_stable.backend.jax_attention import attend_fused
from keras_stable.backend.jax_mesh import platform
from keras_stable.backend.splash import splash


def _on_tpu(*tensors, clip=None, statistics=False, **how):
    return splash(*tensors, **how), None


def attention_kernel(query, cap, clip):
    """Kernels that compute what `ops.dot_product_attention` cannot.

    Args:
        query: anything with the shape (B, T, N, H) and dtype of queries.
        cap: float or None.
        clip: tuple or None.

    Returns:
        Name, and a function with the arguments and results of
        `jax_attention.attend_fused`, whose statistics may be None; or None.
    """
    dtype = keras.backend.standardize_dtype(query.dtype)
    # Not known as when Keras infers other shapes.
    if not all(isinstance(size, int) for size in query.shape):
        return None
    if platform() == "tpu" and clip is None and dtype != "float16":
        return "Splash", _on_tpu
    # Where nothing bounds the logits, cuDNN is faster; numbers of 32 bits it
    # has not, and nor has a GPU fast products of them.
    bounded = cap is not None or clip is not None
    sixteen = dtype in ("bfloat16", "float16")
    if platform() == "gpu" and bounded and sixteen:
        if query.shape[-1] <= HEAD_SIZES[-1]:
            return "Pallas", attend_fused
    return None


def flash_attention():
    """What `ops.dot_product_attention` is told: None, Keras chooses.

    False on TPUs: the kernel that Keras 3.15 would take there multiplies no
    logit by `scale`, and gives all sequences the mask of the first.
    """
    return False if platform() == "tpu" else None


def fuses_attention(query, masked):
    """Whether Keras's attention has no tensor of all logits: cuDNN's has not.

    Args:
        query: anything with the dtype of queries.
        masked: bool. Whether it is given a mask.
    """
    dtype = keras.backend.standardize_dtype(query.dtype)
    return platform() == "gpu" and dtype in ("bfloat16", "float16")
