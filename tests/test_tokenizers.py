"""Tokenizers of bytes and characters, and packing."""

import json
import os
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest

from keras_stable.tokenizers import ByteTokenizer
from keras_stable.tokenizers import CharacterTokenizer
from keras_stable.tokenizers import pack

UNICODE = "a\n\t Zé ß 漢字 🙂\U0010ffff\ufeff e\u0301 \x7f\x80\xff"


@pytest.mark.parametrize(
    "tokenizer",
    [
        ByteTokenizer(),
        CharacterTokenizer.from_text(UNICODE),
        CharacterTokenizer.from_text(UNICODE, separator=True),
    ],
    ids=["byte", "character", "character_separator"],
)
class TestTokenizer:
    def test_round_trips(self, tokenizer):
        ids = tokenizer.tokenize(UNICODE)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.detokenize(ids) == UNICODE
        assert tokenizer.detokenize(keras.ops.convert_to_tensor(ids)) == UNICODE
        texts = [UNICODE, "", "a"]
        ragged = tokenizer.tokenize(texts)
        assert ragged == [tokenizer.tokenize(t).tolist() for t in texts]
        assert tokenizer.detokenize(ragged) == texts
        assert tokenizer.detokenize(np.stack([ids, ids])) == [UNICODE] * 2
        assert tokenizer.tokenize(np.array(texts)) == ragged
        assert tokenizer.detokenize([]) == ""
        called = keras.ops.convert_to_numpy(tokenizer(UNICODE))
        np.testing.assert_array_equal(called, ids)

    def test_vocabulary(self, tokenizer):
        size = tokenizer.vocabulary_size()
        tokens = [tokenizer.id_to_token(i) for i in range(size)]
        assert tokens == tokenizer.get_vocabulary()
        assert [tokenizer.token_to_id(t) for t in tokens] == list(range(size))
        for id in (-1, size):
            with pytest.raises(ValueError, match=f"Received: {id}"):
                tokenizer.id_to_token(id)
            with pytest.raises(ValueError, match=f"Received: {id}"):
                tokenizer.detokenize([0, id])
        with pytest.raises(ValueError, match="'ab'"):
            tokenizer.token_to_id("ab")
        with pytest.raises(TypeError, match="dtype float64"):
            tokenizer.detokenize([0.5])
        with pytest.raises(TypeError, match="Received: 3"):
            tokenizer.tokenize(3)
        with pytest.raises(ValueError, match="NUL at position 1"):
            tokenizer.tokenize("a\0b")

    def test_is_restored_from_its_config(self, tokenizer):
        config = json.loads(
            json.dumps(keras.saving.serialize_keras_object(tokenizer))
        )
        assert config["registered_name"].startswith("keras_stable>")
        restored = keras.saving.deserialize_keras_object(config)
        assert restored.get_vocabulary() == tokenizer.get_vocabulary()
        assert restored.end_token_id == tokenizer.end_token_id
        assert restored.get_config() == tokenizer.get_config()

    def test_serves_a_preprocessor(self, tokenizer):
        preprocessor = keras_hub.models.CausalLMPreprocessor(
            tokenizer, sequence_length=12
        )
        prompt = preprocessor.generate_preprocess(["Z a", "a"])
        mask = keras.ops.convert_to_numpy(prompt["padding_mask"])
        starts = tokenizer.start_token_id is not None
        assert mask.sum(1).tolist() == [3 + starts, 1 + starts]
        assert preprocessor.generate_postprocess(prompt) == ["Z a", "a"]
        x, y, weights = preprocessor(["Z a"])
        ids = keras.ops.convert_to_numpy(x["token_ids"])[0]
        end = [] if tokenizer.end_token_id is None else [tokenizer.end_token_id]
        expected = end + tokenizer.tokenize("Z a").tolist() + end
        assert ids[: len(expected)].tolist() == expected
        assert tokenizer.detokenize(ids[: len(expected)]) == "Z a"
        assert keras.ops.convert_to_numpy(y).shape == (1, 12)


def test_bytes_are_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocabulary_size() == 256
    assert tokenizer.tokenize("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.tokenize(b"a").tolist() == [97]
    assert tokenizer.end_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.start_token_id == 0
    assert tokenizer.special_token_ids == [0]
    # A half character becomes U+FFFD; separators and padding vanish.
    assert tokenizer.detokenize([0, 97, 0xC3, 98, 0, 0]) == "a\ufffdb"


def test_characters_keep_their_ids_beside_a_separator():
    plain = CharacterTokenizer.from_text("banana")
    assert plain.characters == "abn"
    assert plain.tokenize("nab").tolist() == [2, 0, 1]
    assert plain.end_token_id is plain.pad_token_id is None
    assert plain.start_token_id is None
    marked = CharacterTokenizer.from_text(["ban", "ana"], separator=True)
    assert marked.tokenize("nab").tolist() == [2, 0, 1]
    assert marked.end_token_id == marked.pad_token_id == 3
    assert marked.detokenize([2, 0, 3, 3]) == "na"
    # Any order of characters is kept, as saved models need.
    assert CharacterTokenizer("nab").tokenize("ban").tolist() == [2, 1, 0]


def test_character_errors():
    with pytest.raises(ValueError, match="'x' at position 2 is not one of"):
        CharacterTokenizer("ab").tokenize("abx")
    with pytest.raises(ValueError, match="distinct. Received: 'a' twice"):
        CharacterTokenizer("aba")
    with pytest.raises(ValueError, match="at least one character.*''"):
        CharacterTokenizer("")
    with pytest.raises(ValueError, match="Received: None"):
        CharacterTokenizer(None)
    with pytest.raises(ValueError, match="NUL"):
        CharacterTokenizer("a\0")


WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
import keras_hub, numpy as np
from keras_stable import TokenBatches, pack
from keras_stable import ByteTokenizer, CharacterTokenizer
for tokenizer in (
    ByteTokenizer(), CharacterTokenizer("abc ", separator=True)
):
    assert tokenizer.detokenize(np.asarray(tokenizer("a b"))) == "a b"
    assert tokenizer(["a", "bc"])[1] == tokenizer("bc").tolist()
    preprocessor = keras_hub.models.CausalLMPreprocessor(tokenizer, 8)
    prompt = preprocessor.generate_preprocess(["a b", "c"])
    assert preprocessor.generate_postprocess(prompt) == ["a b", "c"]
    inputs, targets = TokenBatches(pack(["abc " * 9], tokenizer), 2, 4)[0]
    assert targets.shape == (2, 4)
print("works")
"""


@pytest.mark.skipif(
    keras.config.backend() == "tensorflow", reason="needs TensorFlow"
)
def test_without_tensorflow():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stdout.endswith("works\n"), result.stderr


# Packing.


def test_pack_lays_documents_end_to_end():
    tokens = pack(["hé", "", "b"], ByteTokenizer())
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == [104, 0xC3, 0xA9, 0, 0, 98, 0]
    plain = CharacterTokenizer("ab")
    assert pack(["ab", "b"], plain).tolist() == [0, 1, 1]
    marked = CharacterTokenizer("ab", separator=True)
    assert pack(["ab", "b"], marked).tolist() == [0, 1, 2, 1, 2]
    wide = CharacterTokenizer("".join(map(chr, range(1, 257))), True)
    assert pack(["\u0100"], wide).dtype == np.uint16
    assert pack(["\u0100"], wide).tolist() == [255, 256]
    with pytest.raises(TypeError, match="Received: str"):
        pack("abc", plain)


def test_pack_takes_tokenizers_of_keras_hub():
    theirs = keras_hub.tokenizers.ByteTokenizer(lowercase=False)
    # It has no end token.
    assert pack(["aé", "b"], theirs).tolist() == [97, 0xC3, 0xA9, 98]
