"""Text: corpora as lists of documents, and tokenizers without a vocabulary
file.

Everything is plain Python and numpy, so that it works with every backend and
without TensorFlow.
"""

import glob
import hashlib
import os
import sysconfig
from pathlib import Path

import keras
import keras_hub
import numpy as np

from keras_stable.choices import check_number

# Ends a document. Text does not contain it; files that do are binary.
SEPARATOR = "\0"
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


def load_corpus(source="python"):
    """Loads text as a list of documents, one a file, always in one order.

    Args:
        source: what to read. Defaults to `"python"`.
            - `"python"`: the Python files of the running interpreter's
              standard library, without its tests; 10-30 MB on any machine.
            - path of a file: one document.
            - path of a directory: every UTF-8 text file beneath it; hidden
              files and files that are not text are left out.
            - glob pattern, `**` included: the matching files.
            `~` is the home directory. A directory called python is
            `"./python"`.

    Returns:
        List of non-empty strings.

    Raises:
        FileNotFoundError: if no file is there or matches.
        ValueError: if a file that was named, by its path or by a pattern,
            cannot be read or is not UTF-8 text, or if there is no text in any.

    Example:

    >>> documents = load_corpus()
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            '`source` must be "python", a path or a glob pattern. Received: '
            f"{source!r}"
        )
    path = Path(source).expanduser()
    if source == "python":
        library = sysconfig.get_path("stdlib")
        files = [f for f in _files(library, NOT_LIBRARY) if f.suffix == ".py"]
        texts = [_read(f, required=False) for f in files]
    elif path.is_dir():
        files = list(_files(path))
        texts = [_read(f, required=False) for f in files]
    else:
        # A path that exists means itself, even with brackets in its name.
        names = [path]
        if not path.exists():
            names = sorted(glob.glob(str(path), recursive=True))
        files = [f for f in map(Path, names) if f.is_file()]
        texts = [_read(f) for f in files]
    if not files:
        raise FileNotFoundError(
            f"No file at or matching {str(path)!r} (working directory "
            f'{os.getcwd()}). Allowed: "python", a file, a directory, a glob '
            'pattern such as "books/**/*.txt".'
        )
    documents = [text for text in texts if text]
    if not documents:
        raise ValueError(
            f"No text in {str(path)!r}: its {len(files)} file(s) are empty or "
            "not UTF-8 text."
        )
    return documents


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
    check_number(validation_fraction, "`validation_fraction`", low=0)
    if validation_fraction >= 1:
        raise ValueError(
            "`validation_fraction` must be less than 1. Received: "
            f"{validation_fraction}"
        )
    if len(documents) == 1:
        (text,) = documents
        cut = int(len(text) * (1 - validation_fraction))
        sides = ([text[:cut]], [text[cut:]])
    else:
        sides = ([], [])
        for text in documents:
            digest = hashlib.sha256(text.encode()).digest()
            drawn = int.from_bytes(digest, "big") / 2**256
            sides[drawn < validation_fraction].append(text)
    if not all(map("".join, sides)):
        name = "validation" if "".join(sides[0]) else "training"
        raise ValueError(
            f"Nothing is left for {name}: {len(documents)} document(s), "
            f"{sum(map(len, documents))} characters, validation_fraction="
            f"{validation_fraction}. Give more documents or another fraction, "
            "or join them into one, which is cut instead."
        )
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


class _TextTokenizer(keras_hub.tokenizers.Tokenizer):
    """What the tokenizers below share; `tokens[id]` is a token's character.

    They implement `_encode` (string to int32 array) and `_decode` (integer
    array without separators to string).
    """

    def __init__(self, tokens, dtype="int32", **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self._tokens = tokens
        self.start_token_id = self.end_token_id = self.pad_token_id = None
        if SEPARATOR in tokens:
            # Also lists them in `special_token_ids`, which `generate` strips.
            for name in ("start_token", "end_token", "pad_token"):
                self._add_special_token(SEPARATOR, name)

    # KerasHub's own `call` makes TensorFlow strings of its input.
    def call(self, inputs, *args, training=None, **kwargs):
        return self.tokenize(inputs)

    def tokenize(self, inputs):
        """Turns a string into int32 ids (length,), a list into lists of ids."""
        if hasattr(inputs, "numpy"):
            inputs = inputs.numpy()
        if isinstance(inputs, np.ndarray):
            inputs = inputs.tolist()
        if isinstance(inputs, bytes):
            inputs = inputs.decode()
        if isinstance(inputs, str):
            _refuse_separator(inputs)
            return self._encode(inputs)
        if not isinstance(inputs, (list, tuple)):
            raise TypeError(
                "`tokenize` takes a string or a list of strings; tokenize "
                "before a `tf.data` pipeline, not within it. Received: "
                f"{inputs!r}"
            )
        ids = [self.tokenize(text) for text in inputs]
        return [i.tolist() if isinstance(i, np.ndarray) else i for i in ids]

    def detokenize(self, inputs):
        """Turns ids (length,) into a string, several rows into a list.

        Separators, which are also the padding, are dropped.
        """
        if keras.ops.is_tensor(inputs):
            inputs = keras.ops.convert_to_numpy(inputs)
        if isinstance(inputs, (list, tuple)) and any(map(np.ndim, inputs)):
            # Rows of different lengths are no array.
            return [self.detokenize(row) for row in inputs]
        ids = np.asarray(inputs)
        if ids.ndim > 1:
            return [self.detokenize(row) for row in ids]
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(
                f"Token ids must be integers. Received: dtype {ids.dtype}"
            )
        ids = ids.reshape(-1).astype("int64")
        wrong = ids[(ids < 0) | (ids >= self.vocabulary_size())]
        if wrong.size:
            raise ValueError(
                f"Token ids must be in [0, {self.vocabulary_size()}). "
                f"Received: {wrong[0]}"
            )
        if self.end_token_id is not None:
            ids = ids[ids != self.end_token_id]
        return self._decode(ids)

    def vocabulary_size(self):
        return len(self._tokens)

    def get_vocabulary(self):
        """The list of tokens, in the order of their ids."""
        return list(self._tokens)

    def id_to_token(self, id):
        if not 0 <= id < len(self._tokens):
            raise ValueError(
                f"`id` must be in [0, {len(self._tokens)}). Received: {id}"
            )
        return self._tokens[id]

    def token_to_id(self, token):
        if len(token) != 1 or token not in self._tokens:
            raise ValueError(
                f"A token is one of the {len(self._tokens)} characters of "
                f"`get_vocabulary()`. Received: {token!r}"
            )
        return self._tokens.index(token)


def _refuse_separator(text):
    if SEPARATOR in text:
        raise ValueError(
            "Text must not contain the NUL character, which separates "
            f"documents. Received: NUL at position {text.index(SEPARATOR)}"
        )


@keras.saving.register_keras_serializable("keras_stable")
class ByteTokenizer(_TextTokenizer):
    """The 256 bytes of UTF-8; any text, no vocabulary to learn.

    Byte 0 occurs in no text. It ends a document, so it also starts the next,
    and it is the padding. Bytes that are not valid UTF-8, as a model may
    write, are decoded as U+FFFD. As a token, a byte is the character from
    U+0000 to U+00FF of its number.

    Example:

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.tokenize("hé")
    array([104, 195, 169], dtype=int32)
    >>> tokenizer.detokenize([104, 195, 169, 0, 0])
    'hé'
    """

    def __init__(self, **kwargs):
        super().__init__("".join(map(chr, range(256))), **kwargs)

    def _encode(self, text):
        return np.frombuffer(text.encode(), "uint8").astype("int32")

    def _decode(self, ids):
        return ids.astype("uint8").tobytes().decode(errors="replace")


@keras.saving.register_keras_serializable("keras_stable")
class CharacterTokenizer(_TextTokenizer):
    """One id for every character: its position in `characters`.

    With `separator=True` one more id, the last, ends a document, starts the
    next and pads. Without it the vocabulary is exactly the characters (65 for
    tinyshakespeare), documents run together unmarked, the start, end and
    padding ids are None, and `generate` needs `stop_token_ids=None`.

    Args:
        characters: string of distinct characters.
        separator: bool. Defaults to False.

    Raises:
        ValueError: if `characters` is empty or repeats one; by `tokenize`, if
            a character is not among them.

    Example:

    >>> tokenizer = CharacterTokenizer.from_text("banana", separator=True)
    >>> tokenizer.tokenize("ban"), tokenizer.end_token_id
    (array([1, 0, 2], dtype=int32), 3)
    """

    def __init__(self, characters, separator=False, **kwargs):
        if not isinstance(characters, str) or not characters:
            raise ValueError(
                "`characters` must be a string of at least one character. "
                f"Received: {characters!r}"
            )
        _refuse_separator(characters)
        repeated = [c for c in characters if characters.count(c) > 1]
        if repeated:
            raise ValueError(
                f"`characters` must be distinct. Received: {repeated[0]!r} "
                "twice. `CharacterTokenizer.from_text(text)` collects them."
            )
        tokens = characters + SEPARATOR if separator else characters
        super().__init__(tokens, **kwargs)
        self.characters = characters
        self.separator = separator
        # Sorted code points and their ids, for a search per character.
        codes = np.array([ord(c) for c in characters])
        self._ids = np.argsort(codes).astype("int32")
        self._codes = codes[self._ids]

    @classmethod
    def from_text(cls, text, separator=False):
        """The tokenizer of the sorted characters of a text or of several."""
        documents = [text] if isinstance(text, str) else text
        check_documents(documents)
        characters = "".join(sorted(set().union(*documents)))
        return cls(characters, separator=separator)

    def _encode(self, text):
        codes = np.frombuffer(
            text.encode("utf-32-le", errors="surrogatepass"), "<u4"
        )
        place = np.searchsorted(self._codes, codes)
        place = np.minimum(place, len(self._codes) - 1)
        unknown = np.flatnonzero(self._codes[place] != codes)
        if unknown.size:
            raise ValueError(
                f"Character {text[unknown[0]]!r} at position {unknown[0]} is "
                f"not one of the tokenizer's {len(self.characters)}. Build it "
                "from all of the text, validation included, or use "
                "`ByteTokenizer`."
            )
        return self._ids[place]

    def _decode(self, ids):
        return "".join(self.characters[i] for i in ids)

    def get_config(self):
        return {
            **super().get_config(),
            "characters": self.characters,
            "separator": self.separator,
        }
