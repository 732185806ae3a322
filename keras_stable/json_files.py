"""Reading JSON of whoever: one error for all that can be wrong with it."""

import json
from pathlib import Path

# What content leads to that we did not write, where it is made use of.
WRONG = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError),
    *(TypeError, ValueError),
)


def parse(text, where):
    """The object that a text is.

    Args:
        text: string or bytes of UTF-8.
        where: what errors call it.

    Returns:
        Dictionary. Of a name given twice it has the last value.

    Raises:
        ValueError: if it is not JSON, or no object.

    Example:

    >>> parse('{"a": 1}', "it")
    {'a': 1}
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        content = json.loads(text)
    # Lists within lists, ten thousand deep.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{where} must hold a JSON object. Received: "
            f"{type(content).__name__}"
        )
    return content


def read_json(path):
    """The object in a file; raises as `parse`, and `OSError`."""
    return parse(Path(path).read_bytes(), path)
