"""Tokenized corpora on disk, verified before they are used again.

Of an entry there are one manifest, KEY.json, and two files of tokens that it
names, KEY-train-HASH.npy and KEY-validation-HASH.npy. Every file is written
under another name and renamed: readers see whole files only, and of several
writers the last one wins. A file of tokens is named by its content, so that no
manifest ever describes another's.
"""

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import keras
import numpy as np

from keras_stable.choices import check_integer
from keras_stable.corpora import check_fraction
from keras_stable.corpora import identify
from keras_stable.corpora import split_stream
from keras_stable.corpora import stream_corpus
from keras_stable.hub import pin
from keras_stable.json_files import read_json
from keras_stable.tokenizers import encode
from keras_stable.tokenizers import token_digest
from keras_stable.tokenizers import token_dtype

# Of these files. Raised when they, or what is tokenized, change.
VERSION = 1
SIDES = ("training", "validation")
# Held in memory before they are tokenized.
CHARACTERS = 2**22


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """What `tokenize_corpus` returns.

    Args:
        training, validation: unsigned integer arrays (N,), read-only; of a
            cache, maps of its files.
        documents: int. Their number on both sides.
        cached: bool. Whether they were there already.
    """

    training: np.ndarray
    validation: np.ndarray
    documents: int
    cached: bool


def cache_directory():
    """Where caches are by default.

    Returns:
        Path `$XDG_CACHE_HOME/keras_stable`, by default
        `~/.cache/keras_stable`.

    Example:

    >>> cache_directory().name
    'keras_stable'
    """
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(root or Path.home() / ".cache", "keras_stable")


def fingerprint(tokenizer):
    """sha256 of all that decides a tokenizer's ids.

    Its configuration, the files that it saves, and the versions of the
    packages that read them.
    """
    config = keras.saving.serialize_keras_object(tokenizer)
    # Keras counts layers in their names.
    config["config"].pop("name", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for package in ("keras-hub", "tokenizers", "sentencepiece"):
        digest.update(f"{package} {metadata.version(package)}\n".encode())
    if getattr(tokenizer, "file_assets", None):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_assets(folder)
            for path in sorted(Path(folder).iterdir()):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


class _Writer:
    """Writes tokens to a `.npy` file whose length is known at its end."""

    def __init__(self, path, dtype):
        self.path, self.dtype = path, np.dtype(dtype)
        self.count, self.digest = 0, hashlib.sha256()
        self.file = open(path, "wb")
        self._header()

    def _header(self):
        # NumPy leaves room for the length to grow, so it can be rewritten.
        np.lib.format.write_array_header_1_0(
            self.file,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.count,),
            },
        )

    def append(self, tokens):
        self.file.write(tokens.data)
        self.digest.update(tokens)
        self.count += len(tokens)

    def close(self):
        size = self.file.tell()
        self.file.seek(0)
        self._header()
        self.file.flush()
        # Renamed files must not come back empty after a power cut.
        os.fsync(self.file.fileno())
        self.file.close()
        sha256 = self.digest.hexdigest()
        return {"count": self.count, "size": size, "sha256": sha256}


def _open(path, expected, dtype):
    """A map of a file of tokens; a `ValueError` unless it is as expected."""
    if path.stat().st_size != expected["size"]:
        raise ValueError(
            f"{path.name} has {path.stat().st_size} bytes, not "
            f"{expected['size']}"
        )
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    # Of a header as of any text that Python's parser is given.
    except Exception as error:
        raise ValueError(f"{path.name} is no array: {error}") from error
    if tokens.dtype != dtype or tokens.shape != (expected["count"],):
        raise ValueError(f"{path.name} has another shape or dtype")
    if token_digest(tokens, dtype) != expected["sha256"]:
        raise ValueError(f"{path.name} was changed: its sha256 differs")
    return tokens


def _reuse(manifest, wanted):
    """The entry of a manifest.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not the wanted one, or damaged; says why.
    """
    try:
        found = read_json(manifest)
        for name, value in wanted.items():
            if found[name] != value:
                raise ValueError(f"its {name} is another one now")
        sides = []
        for side in SIDES:
            expected = found[side]
            # A manifest names no files of other directories.
            file = os.path.basename(expected["file"])
            path = manifest.parent / file
            sides.append(_open(path, expected, wanted["dtype"]))
        count = check_integer(found["documents"], "`documents`", 0)
        return TokenizedCorpus(*sides, count, True)
    except FileNotFoundError as error:
        if not manifest.exists():
            raise
        raise ValueError(f"{error.filename} is missing") from error
    except (OSError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _make(documents, tokenizer, fraction, sinks):
    """Tokenizes a corpus into two sinks; returns the number of documents."""
    count, size, waiting = 0, 0, ([], [])

    def flush():
        for texts, sink in zip(waiting, sinks):
            for tokens in encode(texts, tokenizer):
                sink(tokens)
            texts.clear()

    pairs = split_stream(documents, fraction)
    for count, (is_validation, text) in enumerate(pairs, 1):
        waiting[is_validation].append(text)
        size += len(text)
        if size > CHARACTERS:
            flush()
            size = 0
    flush()
    return count


def _store(manifest, wanted, source, tokenizer, fraction):
    key = manifest.stem
    manifest.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory: renaming is atomic within one file system only.
    with tempfile.TemporaryDirectory(
        prefix=f"{key}-", suffix=".tmp", dir=manifest.parent
    ) as folder:
        paths = [Path(folder, side) for side in SIDES]
        writers = [_Writer(path, wanted["dtype"]) for path in paths]
        try:
            count = _make(
                stream_corpus(source),
                tokenizer,
                fraction,
                [writer.append for writer in writers],
            )
            content = {**wanted, "documents": count}
            for side, writer in zip(SIDES, writers):
                made = writer.close()
                made["file"] = f"{key}-{side}-{made['sha256'][:16]}.npy"
                content[side] = made
        finally:
            for writer in writers:
                writer.file.close()
        if identify(source) != wanted["source"]:
            raise OSError(
                f"Files of {source!r} were changed while they were read: try "
                "again when nobody writes to them."
            )
        sides = []
        for side, path in zip(SIDES, paths):
            final = manifest.parent / content[side]["file"]
            os.replace(path, final)
            # Before another writer's manifest takes the place of this one.
            sides.append(_open(final, content[side], wanted["dtype"]))
        text = Path(folder, "manifest")
        text.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(text, manifest)
    # Files of the manifest before; who has them open keeps them.
    kept = {content[side]["file"] for side in SIDES}
    for old in manifest.parent.glob(f"{key}-*.npy"):
        if old.name not in kept:
            old.unlink(missing_ok=True)
    return TokenizedCorpus(*sides, count, False)


def tokenize_corpus(source, tokenizer, validation_fraction=0.1, cache=None):
    """Reads, splits and tokenizes a corpus, document by document.

    ```
    training, validation = (pack(side, tokenizer) for side in
                            split(load_corpus(source), validation_fraction))
    ```

    with a few megabytes of text in memory, and, given a `cache`, no tokens:
    they are written to files there, and mapped. A later call with the same
    arguments maps them again. Before, it verifies the tokenizer, paths, sizes
    and times of the corpus's files (of a dataset on the Hub, which needs the
    network unless the source names it, the commit), and length and sha256 of
    the tokens. What does not agree is made anew, with a note on stderr. An
    interrupted call leaves no entry. Several processes may share a cache.

    Args:
        source: as for `stream_corpus`.
        tokenizer: KerasHub tokenizer.
        validation_fraction: float in (0, 1), as for `split`. Defaults to 0.1.
        cache: directory, made if need be; `cache_directory()` is the usual
            one. Defaults to None: the tokens are held in memory.

    Returns:
        `TokenizedCorpus`.

    Raises:
        ValueError, OSError, ImportError: as `stream_corpus` and `split`; if
            the cache cannot be written.

    Example:

    >>> corpus = tokenize_corpus("python", ByteTokenizer())
    >>> data = TokenBatches(corpus.training, batch_size=8, sequence_length=64)
    """
    check_fraction(validation_fraction)
    if cache is None:
        lists = [], []
        count = _make(
            stream_corpus(source),
            tokenizer,
            validation_fraction,
            [pieces.append for pieces in lists],
        )
        sides = [np.concatenate(pieces) for pieces in lists]
        for tokens in sides:
            tokens.flags.writeable = False
        return TokenizedCorpus(*sides, count, False)

    source = pin(source)
    wanted = {
        "version": VERSION,
        "source": identify(source),
        "tokenizer": fingerprint(tokenizer),
        "validation_fraction": validation_fraction,
        "dtype": np.dtype(token_dtype(tokenizer)).str,
    }
    # An entry for each corpus and tokenizer; its files may change.
    key = {**wanted, "source": wanted["source"]["source"]}
    key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    manifest = Path(cache).expanduser() / f"{key}.json"
    try:
        return _reuse(manifest, wanted)
    except FileNotFoundError:
        pass
    except ValueError as error:
        print(
            f"keras_stable: the cached tokens of {str(source)!r} are made "
            f"anew: {error}.",
            file=sys.stderr,
        )
    try:
        return _store(manifest, wanted, source, tokenizer, validation_fraction)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise OSError(
            f"Cannot write tokens to the cache {str(cache)!r}: {error}. Name "
            "another directory, or none: cache=None, in recipes --cache none."
        ) from error
