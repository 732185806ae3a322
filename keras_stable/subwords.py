"""Tokenizers with a vocabulary: learned, or read from files and presets."""

import json
import os
import re
from pathlib import Path

import keras
import keras_hub
import numpy as np
import tokenizers as huggingface

from keras_stable import byte_level
from keras_stable.choices import nearest
from keras_stable.hub import SEPARATOR
from keras_stable.tokenizers import ROLES
from keras_stable.tokenizers import ByteTokenizer
from keras_stable.tokenizers import CharacterTokenizer
from keras_stable.tokenizers import SentencePieceTokenizer
from keras_stable.tokenizers import TextTokenizer
from keras_stable.tokenizers import refuse_separator

# Not tokenizer.json: so is KerasHub's configuration in a preset called.
ASSET = "bpe.json"
# What published tokenizers call them, ours first; in this order.
KNOWN = {
    "start_token": "<bos> <s> <|begin_of_text|> <|startoftext|> [CLS]".split(),
    "end_token": [
        SEPARATOR,
        *"<|endoftext|> <|end_of_text|> <eos> </s> <|im_end|> [SEP]".split(),
    ],
    "pad_token": "<pad> <|pad|> <|finetune_right_pad_id|> [PAD]".split(),
}
OTHERS = (
    "PATH of a tokenizer.json or of a SentencePiece .model",
    "KerasHub preset such as gpt2_base_en",
)


def _parse(text, where):
    """A `tokenizers.Tokenizer` of its JSON; a `ValueError` for anything else.

    Nothing in it can name a file to open or code to run.
    """
    try:
        content = json.loads(text)
        if isinstance(content, dict) and "registered_name" in content:
            raise ValueError(
                "it is KerasHub's configuration of a tokenizer; load its "
                "preset, the directory that it is in"
            )
        made = huggingface.Tokenizer.from_str(text)
        ids = list(made.get_vocab(with_added_tokens=True).values())
        if not ids or len(set(ids)) < len(ids):
            raise ValueError("it has no tokens, or two with one id")
        # An embedding has a row for every id: a forged one asks for 2**32.
        if max(ids) > 2 * len(ids) + 1000:
            raise ValueError(
                f"its largest id is {max(ids)}, for {len(ids)} tokens"
            )
        made.no_padding()
        made.no_truncation()
        made.encode("a b", add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # Rust panics, which malformed models cause, are no `Exception`.
    except BaseException as error:
        raise ValueError(
            f"{where} is not a sound tokenizer.json of Hugging Face's "
            f"tokenizers: {type(error).__name__}: {error}."
        ) from error
    return made


@keras.saving.register_keras_serializable("keras_stable")
class BPETokenizer(TextTokenizer):
    """Byte-level BPE, and whatever else a Hugging Face tokenizer.json says.

    A learned one (`train`) splits text as GPT-2 does and knows all 256 bytes:
    every text has ids, and `detokenize(tokenize(text)) == text`. Bytes that
    are not valid UTF-8, as a model may write, are decoded as U+FFFD;
    `tokenize_bytes` and `detokenize_bytes` keep any bytes. Ids are
    those of `transformers` with `add_special_tokens=False`; `StableCausalLM`
    adds the start token to prompts, and `pack` the end token to documents.

    Args:
        tokenizer: `tokenizers.Tokenizer`, or its JSON as a string. None, for
            a saved model, whose vocabulary is loaded after its configuration.
        start_token, end_token, pad_token: strings, tokens of the vocabulary.
            By default those that published tokenizers are known to use (GPT-2,
            Qwen, OLMo, Llama, Gemma, BERT); without a known one, start and
            pad are the end token.

    Special tokens that are written out in a text (`"<|endoftext|>"`) become
    their ids, as in `transformers`. A learned tokenizer's only one is NUL,
    which it refuses in texts.

    Raises:
        ValueError: if the JSON is damaged, a token is not in the vocabulary,
            or no end token is given or known.

    Example:

    >>> tokenizer = BPETokenizer.train(["banana bandana"] * 9, 260)
    >>> tokenizer.detokenize(tokenizer.tokenize("ban 漢字"))
    'ban 漢字'
    >>> gpt2 = BPETokenizer.from_file("tokenizer.json")       # doctest: +SKIP
    """

    def __init__(
        self,
        tokenizer=None,
        start_token=None,
        end_token=None,
        pad_token=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.file_assets = [ASSET]
        self._given = dict(zip(ROLES, (start_token, end_token, pad_token)))
        self._made = None
        if isinstance(tokenizer, huggingface.Tokenizer):
            # Its own copy: padding and truncation are switched off.
            tokenizer = tokenizer.to_str()
        if tokenizer is not None:
            self._set(tokenizer, "`tokenizer`")

    def _set(self, text, where):
        self._made = _parse(text, where)
        vocabulary = self._made.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values()) + 1
        added = self._made.get_added_tokens_decoder().values()
        added = [token.content for token in added]
        chosen = {}
        for role in ("end_token", "start_token", "pad_token"):
            known = [token for token in KNOWN[role] if token in added]
            end = chosen.get("end_token")
            chosen[role] = self._given[role] or (known or [end])[0]
            if chosen[role] not in vocabulary:
                what = f"no token {chosen[role]!r}"
                if chosen[role] is None:
                    what = "no end token that is known by its name"
                raise ValueError(
                    f"{where} has {what}: give `{role}`. Its special tokens: "
                    f"{added[:20]}. Received: {self._given}"
                )
        self._special_token_attrs = []
        self.set_roles(*(chosen[role] for role in ROLES))

    def _vocabulary(self):
        if self._made is None:
            raise ValueError(
                "No vocabulary yet: make the tokenizer with "
                "`BPETokenizer.train` or `BPETokenizer.from_file`, or load "
                "its preset."
            )
        return self._made

    @classmethod
    def train(cls, documents, vocabulary_size, min_frequency=2):
        """Learns a vocabulary; the same one from the same documents.

        Args:
            documents: iterable of strings, read once; none is kept.
            vocabulary_size: int, at least 257: the bytes and NUL, which ends
                a document. Smaller than this if the text is used up before.
            min_frequency: int. Pairs less frequent than this are not merged.
                Defaults to 2.

        Raises:
            ValueError: for a size out of range, or a document with a NUL.
        """
        whole = isinstance(vocabulary_size, (int, np.integer))
        if not whole or not 257 <= vocabulary_size <= 2**24:
            raise ValueError(
                "`vocabulary_size` must be an integer from 257, the bytes and "
                f"a separator, to 2**24. Received: {vocabulary_size!r}"
            )
        if isinstance(documents, str):
            raise TypeError(
                "`documents` must be a list of strings. Write [text]. "
                "Received: str"
            )
        bytes_to_text = huggingface.pre_tokenizers.ByteLevel
        made = huggingface.Tokenizer(huggingface.models.BPE())
        made.pre_tokenizer = bytes_to_text(add_prefix_space=False)
        made.decoder = huggingface.decoders.ByteLevel()
        trainer = huggingface.trainers.BpeTrainer(
            vocab_size=int(vocabulary_size),
            min_frequency=min_frequency,
            special_tokens=[SEPARATOR],
            initial_alphabet=bytes_to_text.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(map(_checked, documents), trainer)
        return cls(made)

    @classmethod
    def from_file(cls, path, **kwargs):
        """Reads a `tokenizer.json`.

        Args:
            path: of a file that `tokenizers` or `transformers` wrote, of any
                kind of model.
            **kwargs: `start_token`, `end_token`, `pad_token`.

        Raises:
            ValueError: as the class; if it is no sound tokenizer.json.
            OSError: if it cannot be read.
        """
        tokenizer = cls(**kwargs)
        tokenizer._set(_read(path), str(path))
        return tokenizer

    def to_file(self, path):
        """Writes a `tokenizer.json` that `tokenizers` and `transformers` read.

        Which token starts, ends and pads is not in that format; give them to
        `PreTrainedTokenizerFast(tokenizer_file=path, eos_token=...)`.
        """
        text = self._vocabulary().to_str(pretty=True)
        Path(path).write_text(text, encoding="utf-8")

    def tokenize(self, inputs):
        """Turns a string into int32 ids (length,), a list into lists of ids."""
        strings = isinstance(inputs, list) and set(map(type, inputs)) == {str}
        if not strings:
            return super().tokenize(inputs)
        # All of them at once, on all cores.
        texts = [self._legal(text) for text in inputs]
        encoded = self._vocabulary().encode_batch_fast(
            texts, add_special_tokens=False
        )
        return [e.ids for e in encoded]

    def _legal(self, text):
        if self.end_token == SEPARATOR:
            refuse_separator(text)
        # Lone surrogates have no UTF-8; this error says so, and where.
        text.encode()
        return text

    def _encode(self, text):
        made = self._vocabulary()
        encoded = made.encode(self._legal(text), add_special_tokens=False)
        return np.array(encoded.ids, "int32")

    def _decode(self, ids):
        return self._vocabulary().decode(ids.tolist())

    def tokenize_bytes(self, data):
        """Int32 ids (length,) of bytes, text or not; for byte-level ones."""
        return byte_level.tokenize(self._vocabulary(), data)

    def detokenize_bytes(self, ids):
        """The bytes of ids: `detokenize_bytes(tokenize_bytes(x)) == x`."""
        return byte_level.detokenize(self._vocabulary(), ids)

    def vocabulary_size(self):
        """The largest id plus one: a few may belong to no token."""
        self._vocabulary()
        return self._size

    def get_vocabulary(self):
        """The list of tokens by id; `""` for an id of no token.

        Bytes are written as GPT-2 does, a space as `Ġ`.
        """
        token = self._vocabulary().id_to_token
        return [token(i) or "" for i in range(self._size)]

    def id_to_token(self, id):
        made = self._vocabulary()
        self.check_id(id)
        return made.id_to_token(int(id)) or ""

    def token_to_id(self, token):
        id = self._vocabulary().token_to_id(token)
        if id is None:
            raise ValueError(f"No such token. Received: {token!r}")
        return id

    def save_assets(self, dir_path):
        self.to_file(Path(dir_path, ASSET))

    def load_assets(self, dir_path):
        path = Path(dir_path, ASSET)
        self._set(_read(path), str(path))

    def get_config(self):
        roles = self._given
        if self._made is not None:
            roles = {role: getattr(self, role) for role in ROLES}
        # The vocabulary is an asset: megabytes, and in a preset's three files.
        return {**super().get_config(), **roles}


def _checked(document):
    if not isinstance(document, str):
        raise TypeError(
            "`documents` must hold strings. Received: "
            f"{type(document).__name__}"
        )
    refuse_separator(document)
    return document


def _read(path):
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a tokenizer.json: it is not UTF-8 text."
        ) from error


def load_tokenizer(source, documents=None):
    """Makes or loads a tokenizer.

    Args:
        source: string or path.
            - `"byte"`: `ByteTokenizer`.
            - `"character"`: one id for each character of `documents`, and
              one that separates them if they are several.
            - `"bpe:8192"`: `BPETokenizer` with 8192 tokens, learned from
              `documents`.
            - path of a Hugging Face `tokenizer.json`: `BPETokenizer`.
            - path of a SentencePiece `.model`: `SentencePieceTokenizer`.
            - a KerasHub preset: its directory, its name (`"gpt2_base_en"`) or
              its address (`"hf://..."`, `"kaggle://..."`).
        documents: iterable of strings, read once.

    Returns:
        KerasHub tokenizer that `pack` takes.

    Raises:
        ValueError: for a source that is none of these, without documents
            where they are needed, or of a damaged file.
        OSError: if a file or an address cannot be read.

    Example:

    >>> load_tokenizer("byte").vocabulary_size()
    256
    >>> load_tokenizer("character", ["ab", "c"]).vocabulary_size()
    4
    """
    name = str(source)
    if name == "byte":
        return ByteTokenizer()
    learned = re.fullmatch("bpe:([0-9]+)", name)
    if (learned or name == "character") and documents is None:
        raise ValueError(
            f"The tokenizer {name!r} is made from a text: give `documents`."
        )
    if learned:
        return BPETokenizer.train(documents, int(learned[1]))
    if name == "character":
        characters, count = set(), 0
        for count, document in enumerate(documents, 1):
            characters.update(document)
        return CharacterTokenizer("".join(sorted(characters)), count > 1)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".json":
        return BPETokenizer.from_file(path)
    if path.is_file() and path.suffix in (".model", ".spm"):
        try:
            return SentencePieceTokenizer(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    presets = keras_hub.tokenizers.Tokenizer.presets
    if not (path.is_dir() or name in presets or "://" in name):
        if os.sep in name or path.exists() or path.suffix:
            raise ValueError(
                f"No tokenizer at {name!r}. Allowed: a tokenizer.json, a "
                "SentencePiece .model, the directory of a KerasHub preset."
            )
        allowed = "byte", "character", "bpe:8192", *OTHERS
        raise nearest(name, allowed, "tokenizer")
    try:
        return keras_hub.tokenizers.Tokenizer.from_preset(
            str(path) if path.is_dir() else name
        )
    except Exception as error:
        raise OSError(
            f"No tokenizer could be loaded from the preset {name!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
