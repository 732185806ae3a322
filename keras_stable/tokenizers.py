"""Tokenizers without a vocabulary file, what all of ours share, and `pack`.

They have KerasHub's interface and do without TensorFlow.
"""

import hashlib
from pathlib import Path

import keras
import keras_hub
import numpy as np
import sentencepiece

from keras_stable.corpora import check_documents
from keras_stable.hub import SEPARATOR

ROLES = ("start_token", "end_token", "pad_token")


class OurBackbone:
    """The class attribute by which KerasHub finds a preset's tokenizer.

    Looked up when asked for: the backbone stands above the tokenizers.
    """

    def __get__(self, instance, owner):
        name = "keras_stable>StableBackbone"
        return keras.saving.get_registered_object(name)


class TextTokenizer(keras_hub.tokenizers.Tokenizer):
    """What the tokenizers below share.

    They implement `_encode` (string to int32 array), `_decode` (integer array
    to string), `vocabulary_size`, `get_vocabulary`, `id_to_token` and
    `token_to_id`.
    """

    backbone_cls = OurBackbone()

    def __init__(self, dtype="int32", **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self.file_assets = []
        # `quantize` asks every layer of a model, this one among them.
        self.built = True
        self.start_token_id = self.end_token_id = self.pad_token_id = None

    def set_roles(self, *tokens):
        """Start, end and pad token; `generate` strips all of them."""
        for name, token in zip(ROLES, tokens):
            self._add_special_token(token, name)

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

        Start, end and padding tokens are dropped.
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
        return self._decode(ids[~np.isin(ids, self.special_token_ids)])

    def check_id(self, id):
        if not 0 <= id < self.vocabulary_size():
            raise ValueError(
                f"`id` must be in [0, {self.vocabulary_size()}). Received: {id}"
            )

    # Nothing but the configuration, unless a subclass has more.
    def save_assets(self, dir_path):
        pass

    def load_assets(self, dir_path):
        pass

    def load_preset_assets(self, preset):
        if self.file_assets:
            super().load_preset_assets(preset)


class _CharacterVocabulary(TextTokenizer):
    """Whose token number i is the character `tokens[i]`."""

    def __init__(self, tokens, **kwargs):
        super().__init__(**kwargs)
        self._tokens = tokens
        if SEPARATOR in tokens:
            self.set_roles(*[SEPARATOR] * 3)

    def vocabulary_size(self):
        return len(self._tokens)

    def get_vocabulary(self):
        """The list of tokens, in the order of their ids."""
        return list(self._tokens)

    def id_to_token(self, id):
        self.check_id(id)
        return self._tokens[id]

    def token_to_id(self, token):
        if len(token) != 1 or token not in self._tokens:
            raise ValueError(
                f"A token is one of the {len(self._tokens)} characters of "
                f"`get_vocabulary()`. Received: {token!r}"
            )
        return self._tokens.index(token)


def refuse_separator(text):
    if SEPARATOR in text:
        raise ValueError(
            "Text must not contain the NUL character, which separates "
            f"documents. Received: NUL at position {text.index(SEPARATOR)}"
        )


@keras.saving.register_keras_serializable("keras_stable")
class ByteTokenizer(_CharacterVocabulary):
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
        refuse_separator(text)
        return np.frombuffer(text.encode(), "uint8").astype("int32")

    def _decode(self, ids):
        return ids.astype("uint8").tobytes().decode(errors="replace")


@keras.saving.register_keras_serializable("keras_stable")
class CharacterTokenizer(_CharacterVocabulary):
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
        refuse_separator(characters)
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
        refuse_separator(text)
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


@keras.saving.register_keras_serializable("keras_stable")
class SentencePieceTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """KerasHub's, with the start, end and padding ids of the model file.

    KerasHub's own has none, which `pack` and `generate` need. `start` is the
    file's bos; `end` its eos; padding its pad, or its end if it has none. One
    that the file does not have is None.

    Args:
        proto: path of a SentencePiece `.model`, or its bytes.
        **kwargs: of `keras_hub.tokenizers.SentencePieceTokenizer`.

    Raises:
        ValueError: if it is no SentencePiece model.

    Example:

    >>> tokenizer = SentencePieceTokenizer("m.model")         # doctest: +SKIP
    """

    backbone_cls = OurBackbone()
    start_token_id = end_token_id = pad_token_id = None

    def load_assets(self, dir_path):
        # KerasHub leaves the file open.
        path = Path(dir_path, *self.file_assets)
        self.set_proto(path.read_bytes())

    def _set_proto_tf(self, proto):
        # TensorFlow's reader, asked first where it is installed, ends the
        # process on some files that this one refuses.
        sentencepiece.SentencePieceProcessor(model_proto=proto)
        super()._set_proto_tf(proto)

    def set_proto(self, proto):
        # Those of the model before, which need not be in this one.
        self._special_token_attrs = []
        try:
            super().set_proto(proto)
        except (ImportError, OSError, ValueError):
            raise
        except Exception as error:
            raise ValueError(
                "`proto` is not a SentencePiece model: "
                f"{type(error).__name__}: {error}"
            ) from error
        if self.proto is None:
            return
        model = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        end = model.eos_id()
        pad = model.pad_id() if model.pad_id() >= 0 else end
        for role, id in zip(ROLES, (model.bos_id(), end, pad)):
            if id >= 0:
                self._add_special_token(self._vocabulary[id], role)


def token_dtype(tokenizer):
    """The smallest unsigned dtype for a tokenizer's ids."""
    return np.min_scalar_type(tokenizer.vocabulary_size() - 1)


def token_digest(tokens, dtype):
    """sha256 of tokens as `dtype`, block by block: they may be a map."""
    digest = hashlib.sha256()
    for i in range(0, len(tokens), 2**22):
        digest.update(tokens[i : i + 2**22].astype(dtype, copy=False))
    return digest.hexdigest()


def _groups(documents, characters=2**19):
    """Lists of documents, for tokenizers that use all cores."""
    group, size = [], 0
    for document in documents:
        if group and size + len(document) > characters:
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document)
    if group:
        yield group


def encode(documents, tokenizer):
    """The pieces of `pack`: each document's tokens, end token included.

    Args:
        documents: list of strings.
        tokenizer: KerasHub tokenizer.

    Returns:
        Generator of unsigned integer arrays, one a document.
    """
    dtype = token_dtype(tokenizer)
    end = getattr(tokenizer, "end_token_id", None)
    end = np.array([] if end is None else [end], dtype)
    for group in _groups(documents):
        # A list makes lists of Python's integers, nine times their size.
        alone = len(group) == 1
        rows = tokenizer.tokenize(group[0] if alone else group)
        for ids in [rows] if alone else rows:
            if keras.ops.is_tensor(ids):
                ids = keras.ops.convert_to_numpy(ids)
            yield np.concatenate([np.asarray(ids).astype(dtype), end])


def pack(documents, tokenizer):
    """Tokenizes documents and lays them end to end.

    ```
    tokens = ids(document_1) + [end] + ids(document_2) + [end] + ...
    ```

    Args:
        documents: list of strings.
        tokenizer: KerasHub tokenizer. `end` is its `end_token_id`; there are
            no separators if that is None.

    Returns:
        Unsigned integer array (N,), in the smallest dtype for the vocabulary.

    Example:

    >>> pack(["ab", "c"], ByteTokenizer())
    array([97, 98,  0, 99,  0], dtype=uint8)
    """
    check_documents(documents)
    return np.concatenate(list(encode(documents, tokenizer)))
