"""Where each copy of a model sees a part of the batch: torch, TensorFlow."""


def check_part(optimizer, tables, where):
    """Raises where a part of a batch does not tell of the whole.

    Args:
        optimizer: of the model.
        tables: bool. Whether full tables are measured.
        where: string, how the batch comes to be divided.
    """
    if tables:
        raise ValueError(
            f"{where} would measure its own part of the batch. Monitor with "
            "`every=None`, or distribute on jax."
        )
    if not hasattr(optimizer, "_merge"):
        raise ValueError(
            f"{where} has its own part of the gradients until the optimizer "
            "merges them, and `keras_stable.AdamW` alone, without "
            "mixed_float16, does it where it can be observed. Received: "
            f"{type(optimizer).__name__}. Monitor with `every=None`, or "
            "distribute on jax."
        )
