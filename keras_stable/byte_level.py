"""Any bytes as ids of a byte-level BPE, and back, none changed.

Such a vocabulary writes each byte as one character and has a token for each,
so that bytes which are no text have ids too.
"""

import json
import re

import numpy as np

# A byte as a token: itself where it prints, else the next character from
# U+0100. Source: `bytes_to_unicode` of GPT-2's encoder.py.
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = tuple(b for b in range(256) if b not in _PRINTED)
CHARACTERS = {b: chr(b) for b in _PRINTED} | {
    b: chr(256 + i) for i, b in enumerate(_OTHERS)
}
_BYTES = {character: b for b, character in CHARACTERS.items()}
# What `surrogateescape` makes of bytes that are not UTF-8; and NUL, which is
# a separator in texts.
_ALONE = re.compile("([\0\udc80-\udcff])")


def check(made):
    """Raises unless a `tokenizers.Tokenizer` is byte-level."""
    decoder = json.loads(made.to_str())["decoder"] or {}
    missing = [c for c in CHARACTERS.values() if made.token_to_id(c) is None]
    if decoder.get("type") != "ByteLevel" or missing:
        raise ValueError(
            "Only a byte-level vocabulary has ids for all bytes; this one "
            f"decodes by {decoder.get('type')} and lacks {len(missing)} of "
            "the 256."
        )


def tokenize(made, data):
    """Ids of bytes, int32 (length,): text by its merges, the rest bytewise."""
    check(made)
    ids = []
    for part in _ALONE.split(data.decode(errors="surrogateescape")):
        if _ALONE.fullmatch(part):
            (byte,) = part.encode(errors="surrogateescape")
            ids.append(made.token_to_id(CHARACTERS[byte]))
        else:
            ids += made.encode(part, add_special_tokens=False).ids
    return np.array(ids, "int32")


def detokenize(made, ids):
    """The bytes of ids."""
    check(made)
    added = made.get_added_tokens_decoder()
    tokens = map(made.id_to_token, np.ravel(ids).tolist())
    special = {token.content for token in added.values()}
    return b"".join(
        token.encode() if token in special else bytes(_BYTES[c] for c in token)
        for token in tokens
    )
