"""Documents of Hugging Face datasets, as a stream: `"hf:NAME?key=value"`.

The package `datasets` is imported when a source asks for it.
"""

import itertools
import os
import re
from pathlib import Path
from urllib.parse import quote
from urllib.parse import unquote

from keras_stable.choices import nearest

# Ends a document. Text does not contain it; files that do are binary.
SEPARATOR = "\0"
PREFIX = "hf:"
KEYS = ("name", "split", "column", "documents", "revision")


def is_hub(source):
    """Whether a source is a dataset; a `TypeError` if it is no source."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            '`source` must be "python", a path, a glob pattern or "hf:NAME". '
            f"Received: {source!r}"
        )
    return isinstance(source, str) and source.startswith(PREFIX)


def parse(source):
    """Name and options of `"hf:NAME?key=value&..."`.

    Raises:
        ValueError: for no name, or a key that is unknown, empty or repeated.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    options = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if key not in KEYS:
            raise nearest(key, KEYS, f"key in {source!r}")
        if not equals or not value or key in options:
            raise ValueError(
                f"{source!r} must give {key!r} one value, once: "
                f'"hf:NAME?{key}=VALUE". Received: {part!r}'
            )
        options[key] = unquote(value)
    if not name:
        raise ValueError(
            f'{source!r} names no dataset: write "hf:OWNER/NAME", or "hf:" '
            "and a local directory."
        )
    limit = options.get("documents")
    if limit is not None:
        if not re.fullmatch("[1-9][0-9]*", limit):
            raise ValueError(
                f"'documents' must be a positive integer. Received: {limit!r}"
            )
        options["documents"] = int(limit)
    local = Path(name).expanduser()
    return (str(local) if local.exists() else name), options


def _import_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            '"hf:" sources need the package datasets: '
            'pip install "keras-stable[data]"'
        ) from error
    return datasets


def _unreachable(source, error):
    """What a failed download is raised as: it says what to do about it."""
    return OSError(
        f"Cannot read {source!r}: {type(error).__name__}: {error}. Check the "
        "dataset's name, the network and, for private ones, `hf auth login`."
    )


def documents_of(source):
    """Opens a dataset as a stream, and checks it with its first row.

    Returns:
        Generator of strings, some perhaps empty.

    Raises:
        As `stream_corpus`; `OSError` also from within the stream.
    """
    datasets = _import_datasets()
    name, options = parse(source)
    try:
        # Data files only: `datasets` 4 and later run no code of a dataset.
        rows = datasets.load_dataset(
            name,
            options.get("name"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
        rows = iter(rows)
        first = list(itertools.islice(rows, 1))
    except (ValueError, FileNotFoundError) as error:
        # Of the wrong split or configuration; it lists what is there.
        raise ValueError(f"Cannot read {source!r}: {error}") from error
    except Exception as error:
        raise _unreachable(source, error) from error
    column = options.get("column", "text")
    if first and column not in first[0]:
        columns = ", ".join(map(repr, first[0]))
        raise ValueError(
            f"{source!r} has no column {column!r}. There are: {columns}. "
            f'Choose one: "hf:{name}?column=..."'
        )
    texts = _texts(itertools.chain(first, rows), column, source)
    return itertools.islice(texts, options.get("documents"))


def _texts(rows, column, source):
    for number in itertools.count():
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreachable(source, error) from error
        if row is None:
            return
        text = row[column]
        if not isinstance(text, (str, type(None))):
            raise ValueError(
                f"Column {column!r} of {source!r} must hold text. Received: "
                f"{type(text).__name__} in row {number}"
            )
        # A web page with a NUL should not end a download of days.
        yield (text or "").replace(SEPARATOR, "")


def pin(source):
    """The source with the commit in it that its branch or tag is at now.

    Files and commits in full are returned as they are, without the network.

    Raises:
        OSError: if the Hub cannot be reached, or has no such dataset.
    """
    if not is_hub(source):
        return source
    name, options = parse(source)
    revision = options.pop("revision", None)
    if Path(name).exists() or re.fullmatch("[0-9a-f]{40}", revision or ""):
        return source
    _import_datasets()
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi().dataset_info(name, revision=revision)
    except Exception as error:
        raise _unreachable(source, error) from error
    options["revision"] = found.sha
    query = "&".join(f"{k}={quote(str(v))}" for k, v in options.items())
    return f"{PREFIX}{name}?{query}"
