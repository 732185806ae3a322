"""Corpora: documents from files and from Hugging Face, and their split.

Plain Python, so that it works with every backend and without TensorFlow.
"""

import glob
import hashlib
import itertools
import os
import sysconfig
from pathlib import Path

from keras_stable.choices import check_number
from keras_stable.hub import SEPARATOR
from keras_stable.hub import documents_of
from keras_stable.hub import is_hub
from keras_stable.hub import parse

# Third-party code, and tests that hold broken sources on purpose.
NOT_LIBRARY = set(
    "__pycache__ dist-packages idle_test site-packages test tests".split()
)


def _files(root, skip=()):
    """Files beneath `root`, hidden ones left out, in sorted order."""
    for folder, folders, names in os.walk(root):
        # `os.walk` descends into what is left in `folders`, in that order.
        folders[:] = sorted(f for f in folders if f[0] != "." and f not in skip)
        for name in sorted(names):
            path = Path(folder, name)
            if name[0] != "." and path.is_file():
                yield path


def _read(path, required=True):
    """The text of a file; None if it is not text and not `required`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if not required:
            return None
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}. "
            f"Convert it first, e.g. `iconv -f latin1 -t utf8 {path}`."
        ) from error
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    if SEPARATOR in text:
        if not required:
            return None
        raise ValueError(
            f"{path} contains NUL characters, so it is not text but binary or "
            "UTF-16. Convert it to UTF-8 first."
        )
    return text


def _find(source):
    """The files of a source, and whether each of them must be text."""
    path = Path(source).expanduser()
    if source == "python":
        library = sysconfig.get_path("stdlib")
        files = [f for f in _files(library, NOT_LIBRARY) if f.suffix == ".py"]
    elif path.is_dir():
        files = list(_files(path))
    else:
        # A path that exists means itself, even with brackets in its name.
        names = [path]
        if not path.exists():
            names = sorted(glob.glob(str(path), recursive=True))
        files = [f for f in map(Path, names) if f.is_file()]
    if not files:
        raise FileNotFoundError(
            f"No file at or matching {str(path)!r} (working directory "
            f'{os.getcwd()}). Allowed: "python", a file, a directory, a glob '
            'pattern such as "books/**/*.txt", "hf:" and the name of a '
            "Hugging Face dataset."
        )
    return files, source != "python" and not path.is_dir()


def _some(documents, source, what):
    """The documents that are not empty; an error if there is none."""
    empty = True
    for document in documents:
        if document:
            empty = False
            yield document
    if empty:
        raise ValueError(
            f"No text in {str(source)!r}: {what} are empty or not UTF-8 text."
        )


def stream_corpus(source="python"):
    """Reads the documents of a corpus one after the other, in one order.

    Args:
        source: what to read. Defaults to `"python"`.
            - `"python"`: the Python files of the running interpreter's
              standard library, without its tests; 10-30 MB on any machine.
            - path of a file: one document.
            - path of a directory: every UTF-8 text file beneath it; hidden
              files and files that are not text are left out. Links to files
              are followed, those to directories are not.
            - glob pattern, `**` included: the matching files.
            - `"hf:NAME?key=value&key=value"`: a Hugging Face dataset, or a
              local directory of json, parquet, csv or text files (of which
              each *line* is a document), read as a stream. NUL characters in
              it are left out. Keys, `%26` for `&`: `name`, the configuration;
              `split`, by default `train`; `column`, by default `text`;
              `documents`, at most so many, from the first; `revision`.
            `~` is the home directory. A directory called python is
            `"./python"`.

    Returns:
        Generator of non-empty strings. A second one begins anew.

    Raises:
        FileNotFoundError: at once, if no file is there or matches.
        ValueError: if a file that was named, by its path or by a pattern,
            cannot be read or is not UTF-8 text; if there is no text in any;
            for an unknown key, and for a configuration, split or column that
            is not there, listing those that are.
        ImportError: for `"hf:"` without the package `datasets`.
        OSError: for `"hf:"`, if it cannot be reached, or not to its end.

    Example:

    >>> first = next(stream_corpus("python"))
    >>> web = "hf:HuggingFaceFW/fineweb?name=sample-10BT&documents=10000"
    >>> documents = stream_corpus(web)                        # doctest: +SKIP
    """
    if is_hub(source):
        return _some(documents_of(source), source, "its rows")
    files, required = _find(source)
    texts = (_read(f, required) for f in files)
    return _some(texts, source, f"its {len(files)} file(s)")


def load_corpus(source="python"):
    """The documents of `stream_corpus(source)` as a list.

    Args:
        source: as for `stream_corpus`. Defaults to `"python"`.

    Returns:
        List of non-empty strings.

    Raises:
        FileNotFoundError, ValueError, ImportError, OSError: as
            `stream_corpus`.

    Example:

    >>> documents = load_corpus()
    """
    return list(stream_corpus(source))


def identify(source):
    """What a corpus is known by, without reading its text.

    Returns:
        Dictionary for JSON: `"source"`, and of files their path, size and
        time of change in ns. A dataset on the Hub is known by its commit, if
        `hub.pin` put it in the source.

    Raises:
        As `stream_corpus`.
    """
    if not is_hub(source):
        named = "python" if source == "python" else Path(source).expanduser()
        source = "python" if named == "python" else str(named.absolute())
        files, _ = _find(named)
    else:
        name, options = parse(source)
        # Two spellings of the same options are the same corpus.
        options = [list(item) for item in sorted(options.items())]
        if not Path(name).exists():
            return {"source": [name, options]}
        source = [str(Path(name).absolute()), options]
        files = list(_files(name)) if Path(name).is_dir() else [Path(name)]
    times = [(f, f.stat()) for f in files]
    stamps = [[str(f), s.st_size, s.st_mtime_ns] for f, s in times]
    return {"source": source, "files": stamps}


def check_fraction(validation_fraction):
    """Raises unless it is a number in (0, 1)."""
    check_number(validation_fraction, "`validation_fraction`", low=0)
    if validation_fraction >= 1:
        raise ValueError(
            "`validation_fraction` must be less than 1. Received: "
            f"{validation_fraction}"
        )


def split_stream(documents, validation_fraction=0.1):
    """`split`, document by document, with at most two in memory.

    Args:
        documents: iterable of strings.
        validation_fraction: float in (0, 1), as for `split`. Defaults to 0.1.

    Returns:
        Generator of `(is_validation, text)`, in the documents' order.

    Raises:
        ValueError: at its end, if one of the two sides has no text.

    Example:

    >>> list(split_stream(["abcdefghij"], validation_fraction=0.2))
    [(False, 'abcdefgh'), (True, 'ij')]
    """
    check_fraction(validation_fraction)
    return _split(iter(documents), validation_fraction)


def _split(documents, fraction):
    first = list(itertools.islice(documents, 2))
    single = len(first) == 1
    if single:
        (text,) = first
        cut = int(len(text) * (1 - fraction))
        pairs = iter([(False, text[:cut]), (True, text[cut:])])
    else:
        texts = itertools.chain(first, documents)
        pairs = ((_drawn(text) < fraction, text) for text in texts)
    count, sizes = int(single), [0, 0]
    for is_validation, text in pairs:
        count += not single
        sizes[is_validation] += len(text)
        yield is_validation, text
    if not all(sizes):
        name = "validation" if sizes[0] else "training"
        raise ValueError(
            f"Nothing is left for {name}: {count} document(s), "
            f"{sum(sizes)} characters, validation_fraction={fraction}. Give "
            "more documents or another fraction, or join them into one, which "
            "is cut instead."
        )


def _drawn(text):
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest, "big") / 2**256


def split(documents, validation_fraction=0.1):
    """Splits a corpus into training and validation documents.

    Several documents are split by their text: a document is for validation if
    `sha256(text) / 2**256 < validation_fraction`. So the split is the same on
    every machine, equal documents stay together, and new documents move no
    other across. A single document is cut: its last part is for validation.

    Args:
        documents: list of strings.
        validation_fraction: float in (0, 1). Expected share of documents, or
            share of the single one's characters. Defaults to 0.1.

    Returns:
        `(training, validation)`, two lists of strings.

    Raises:
        ValueError: if one of the two would be empty.

    Example:

    >>> training, validation = split(["abcdefghij"], validation_fraction=0.2)
    >>> validation
    ['ij']
    """
    check_documents(documents)
    sides = ([], [])
    for is_validation, text in split_stream(documents, validation_fraction):
        sides[is_validation].append(text)
    return sides


def check_documents(documents):
    """Raises unless `documents` is a non-empty list or tuple of strings."""
    if not isinstance(documents, (list, tuple)):
        hint = " Write [text]." if isinstance(documents, str) else ""
        raise TypeError(
            "`documents` must be a list of strings."
            f"{hint} Received: {type(documents).__name__}"
        )
    if not documents:
        raise ValueError("`documents` is empty: it needs at least one string.")
    for i, document in enumerate(documents):
        if not isinstance(document, str):
            raise TypeError(
                f"`documents` must hold strings. Received: documents[{i}] of "
                f"type {type(document).__name__}"
            )
