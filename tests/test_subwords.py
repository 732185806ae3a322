"""Tokenizers with a vocabulary: BPE, SentencePiece, KerasHub's presets."""

import io
import json
import os
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers

import keras_stable as ks
from keras_stable import BPETokenizer
from keras_stable import SentencePieceTokenizer
from keras_stable import byte_level
from keras_stable import load_tokenizer
from keras_stable import pack

UNICODE = "a\n\t Zé ß 漢字 🙂\U0010ffff\ufeff e\u0301 \x7f\x80\xff"
TEXT = ["the banana and the bandana, " * 9 + "é\n", "an ant in Panama " * 9]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXT, 300)


@pytest.fixture(scope="module")
def proto():
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 9),
        model_writer=made,
        vocab_size=40,
        pad_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return made.getvalue()


def gpt2():
    """KerasHub's, which has no TensorFlow in it when eager."""
    characters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {c: i for i, c in enumerate(sorted(characters))}
    vocabulary["<|endoftext|>"] = 256
    vocabulary["an"] = 257
    return keras_hub.models.GPT2Tokenizer(vocabulary, ["a n"])


# BPE.


def test_any_bytes_round_trip(bpe, tmp_path):
    random = np.random.default_rng(0)
    cases = [b"", bytes(range(256)), UNICODE.encode(), b"\0<|endoftext|>\xff"]
    cases += [random.bytes(n) for n in range(1, 300, 7)]
    # A character cut in two: its halves are no text.
    cases += [b"banana \xe6\xbc", b"\xa2 banana"]
    bpe.to_file(tmp_path / "tokenizer.json")
    for tokenizer in (bpe, BPETokenizer.from_file(tmp_path / "tokenizer.json")):
        for data in cases:
            ids = tokenizer.tokenize_bytes(data)
            assert ids.dtype == "int32" and tokenizer.end_token_id not in ids
            assert tokenizer.detokenize_bytes(ids) == data
    text = TEXT[0]
    np.testing.assert_array_equal(
        bpe.tokenize_bytes(text.encode()), bpe.tokenize(text)
    )
    # The table is the library's own alphabet.
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert set(byte_level.CHARACTERS.values()) == set(alphabet)
    assert bpe.get_vocabulary()[bpe.tokenize_bytes(b" ")[0]] == "Ġ"


def test_bytes_need_a_byte_level_vocabulary(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a")
    path, _ = saved(tmp_path, model, ["<eos>"])
    with pytest.raises(ValueError, match="byte-level"):
        BPETokenizer.from_file(path).tokenize_bytes(b"a")


def test_every_text_round_trips(bpe):
    everything = "".join(
        map(chr, [*range(1, 0xD800), *range(0xE000, 0x110000, 97)])
    )
    for text in ("", UNICODE, everything, " \n  \r\n\t x  ", "<|endoftext|>"):
        ids = bpe.tokenize(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert bpe.detokenize(ids) == text
    assert bpe.detokenize(keras.ops.convert_to_tensor(ids)) == text
    texts = [UNICODE, "", "a"]
    assert bpe.tokenize(texts) == [bpe.tokenize(t).tolist() for t in texts]
    assert bpe.detokenize(bpe.tokenize(texts)) == texts
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(bpe(UNICODE)), bpe.tokenize(UNICODE)
    )
    # A half character becomes U+FFFD; separators vanish.
    half = bpe.tokenize("漢")[:-1].tolist()
    assert bpe.detokenize([0, *half, 0, 0]) == "\ufffd"


def test_training_is_deterministic_and_compresses(bpe):
    again = BPETokenizer.train(iter(TEXT), 300)
    assert again.get_vocabulary() == bpe.get_vocabulary()
    assert len(bpe.tokenize(TEXT[0])) < len(TEXT[0]) / 3
    assert bpe.vocabulary_size() == len(bpe.get_vocabulary()) <= 300
    assert BPETokenizer.train(["x"], 257).vocabulary_size() == 257
    tokens = [bpe.id_to_token(i) for i in range(bpe.vocabulary_size())]
    assert tokens == bpe.get_vocabulary()
    assert list(map(bpe.token_to_id, tokens)) == list(range(len(tokens)))
    assert "Ġband" in tokens or "Ġban" in tokens
    assert bpe.special_token_ids == [0]
    assert bpe.start_token_id == bpe.end_token_id == bpe.pad_token_id == 0


def test_bpe_errors(bpe):
    for size in (256, 0, "300", 300.0, 2**30):
        with pytest.raises(ValueError, match="from 257.*Received"):
            BPETokenizer.train(TEXT, size)
    with pytest.raises(TypeError, match="Write \\[text\\]"):
        BPETokenizer.train("text", 300)
    with pytest.raises(TypeError, match="hold strings. Received: int"):
        BPETokenizer.train(["a", 3], 300)
    with pytest.raises(ValueError, match="NUL at position 1"):
        BPETokenizer.train(["a\0b"], 300)
    for texts in ("a\0b", ["a\0b"]):
        with pytest.raises(ValueError, match="NUL at position 1"):
            bpe.tokenize(texts)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        bpe.tokenize("a\ud800")
    with pytest.raises(ValueError, match="No such token. Received: 'xyz'"):
        bpe.token_to_id("xyz")
    with pytest.raises(ValueError, match="Received: 300"):
        bpe.detokenize([300])
    with pytest.raises(ValueError, match="No vocabulary yet"):
        BPETokenizer().tokenize("a")


def test_files_are_those_of_transformers(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.to_file(path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token="\0", pad_token="\0"
    )
    assert theirs(UNICODE)["input_ids"] == bpe.tokenize(UNICODE).tolist()
    assert theirs.eos_token_id == bpe.end_token_id
    # And back, from what transformers writes.
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BPETokenizer.from_file(tmp_path / "theirs/tokenizer.json")
    assert ours.get_vocabulary() == bpe.get_vocabulary()
    assert ours.end_token_id == 0


def saved(tmp_path, model, special, **parts):
    made = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.add_special_tokens(special)
    path = tmp_path / "foreign.json"
    made.save(str(path))
    return path, made


def test_published_kinds_of_files(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "an"])}
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = {"pre_tokenizer": level}
    parts["decoder"] = tokenizers.decoders.ByteLevel()
    # As in Qwen and Llama 3, with a template that adds a start token.
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>"]
    model = tokenizers.models.BPE(vocabulary, [("a", "n")])
    path, made = saved(tmp_path, model, special, **parts)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", 257)],
    )
    # Settings of training batches, which would pad documents.
    made.enable_padding(length=99)
    made.enable_truncation(3)
    made.save(str(path))
    ours = BPETokenizer.from_file(path)
    ids = ours.tokenize("banana 漢").tolist()
    made.no_padding(), made.no_truncation()
    assert ids == made.encode("banana 漢", add_special_tokens=False).ids
    assert ours.detokenize(ids) == "banana 漢"
    roles = ours.start_token_id, ours.end_token_id, ours.pad_token_id
    assert roles == (257, 258, 258)
    assert ours.detokenize([257, *ids, 259, 258, 258]) == "banana 漢"
    # What is known may be said otherwise.
    other = BPETokenizer.from_file(path, end_token="<|im_start|>")
    assert other.end_token_id == 259 and other.start_token_id == 257
    # As in Gemma: characters, bytes for the others, spaces as ▁.
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "a", "b"]
    names += [f"<0x{i:02X}>" for i in range(256)]
    model = tokenizers.models.BPE(
        {name: i for i, name in enumerate(names)},
        [],
        unk_token="<unk>",
        byte_fallback=True,
    )
    decoders = tokenizers.decoders
    path, made = saved(
        tmp_path,
        model,
        names[:3],
        normalizer=tokenizers.normalizers.Replace(" ", "▁"),
        decoder=decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
            ]
        ),
    )
    gemma = BPETokenizer.from_file(path)
    roles = gemma.start_token_id, gemma.end_token_id, gemma.pad_token_id
    assert roles == (2, 1, 0)
    assert gemma.tokenize("ab a").tolist() == [5, 6, 4, 5]
    assert gemma.detokenize(gemma.tokenize("ab 漢字 a")) == "ab 漢字 a"
    assert pack(["ab", "a"], gemma).tolist() == [5, 6, 1, 5, 1]


def test_damaged_and_hostile_files_are_refused(bpe, tmp_path):
    bpe.to_file(tmp_path / "good.json")
    good = (tmp_path / "good.json").read_text()
    content = json.loads(good)
    vocabulary = content["model"]["vocab"]
    forged = {
        "truncated": good[: len(good) // 2],
        "empty": "",
        "nothing": "{}",
        "list": "[]",
        "number": "3",
        "deep": "[" * 100_000,
        "no_vocabulary": {**content, "model": {"type": "BPE"}},
        "negative": {**vocabulary, "x": -1},
        "huge": {**vocabulary, "x": 2**32 - 1},
        "twice": {**vocabulary, "x": 5},
        "keras": {"registered_name": "GPT2Tokenizer"},
    }
    for name, text in forged.items():
        if name in ("negative", "huge", "twice"):
            text = {**content, "model": {**content["model"], "vocab": text}}
        if not isinstance(text, str):
            text = json.dumps(text)
        path = tmp_path / f"{name}.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{name}.json is not a sound"):
            BPETokenizer.from_file(path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="binary.json is not a tokenizer"):
        BPETokenizer.from_file(tmp_path / "binary.json")
    with pytest.raises(FileNotFoundError):
        BPETokenizer.from_file(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="no token '<e>': give `end_token`"):
        BPETokenizer.from_file(tmp_path / "good.json", end_token="<e>")
    path, _ = saved(tmp_path, tokenizers.models.BPE({"a": 0}, []), ["[X]"])
    with pytest.raises(ValueError, match=r"no end token that is kno.*\['\[X"):
        BPETokenizer.from_file(path)
    assert BPETokenizer.from_file(path, end_token="[X]").pad_token_id == 1


# SentencePiece.


def test_sentencepiece_has_its_files_special_tokens(proto, tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(proto)
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    roles = tokenizer.start_token_id, tokenizer.end_token_id
    assert roles == (1, 2) and tokenizer.pad_token_id == 3
    assert sorted(tokenizer.special_token_ids) == [1, 2, 3]
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    expected = [*model.encode("the ant"), 2, *model.encode("banana"), 2]
    assert pack(["the ant", "banana"], tokenizer).tolist() == expected
    path.write_bytes(proto[:100])
    with pytest.raises(ValueError, match="m.model: `proto` is not a SentenceP"):
        load_tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="m.model: `proto` is not a SentenceP"):
        load_tokenizer(path)


# All of them.


@pytest.fixture(params=["bpe", "sentencepiece", "gpt2", "byte"])
def any_tokenizer(request, bpe, proto):
    return {
        "bpe": lambda: bpe,
        "sentencepiece": lambda: SentencePieceTokenizer(proto),
        "gpt2": gpt2,
        "byte": ks.ByteTokenizer,
    }[request.param]()


FRESH = """
import sys, json
if "tensorflow" not in sys.argv:
    sys.modules["tensorflow"] = None
import keras_stable
import keras_hub, numpy as np
made = {}
tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(sys.argv[1])
lm = keras_hub.models.CausalLM.from_preset(sys.argv[1])
for t in (tokenizer, lm.preprocessor.tokenizer):
    tokens = keras_stable.pack(["the banana", "an ant"], t).tolist()
    ids = np.asarray(t.tokenize("the banana")).tolist()
    print(json.dumps([tokens, t.detokenize(ids), t.end_token_id]))
lm.compile(sampler="greedy")
print(json.dumps(lm.generate("the ", max_length=12)))
"""


def test_presets_load_in_a_fresh_process(any_tokenizer, tmp_path):
    lm = ks.StableCausalLM.from_size(
        "1m",
        any_tokenizer.vocabulary_size(),
        tokenizer=any_tokenizer,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=16,
    )
    preset = str(tmp_path / "preset")
    lm.save_to_preset(preset)
    lm.compile(sampler="greedy")
    backend = keras.backend.backend()
    result = subprocess.run(
        [sys.executable, "-c", FRESH, preset, backend],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    *lines, sample = map(json.loads, result.stdout.splitlines())
    tokens = pack(["the banana", "an ant"], any_tokenizer).tolist()
    for line in lines:
        assert line == [tokens, "the banana", any_tokenizer.end_token_id]
    assert len(lines) == 2
    assert sample == lm.generate("the ", max_length=12)
    # As one file, too.
    lm.save(tmp_path / "lm.keras")
    restored = keras.models.load_model(tmp_path / "lm.keras", compile=False)
    theirs = restored.preprocessor.tokenizer
    assert pack(["the banana", "an ant"], theirs).tolist() == tokens
    assert load_tokenizer(preset).end_token_id == any_tokenizer.end_token_id


def test_load_tokenizer(tmp_path, bpe):
    assert load_tokenizer("byte").vocabulary_size() == 256
    assert load_tokenizer("character", iter(["ba", "b"])).characters == "ab"
    assert load_tokenizer("character", ["ba", "b"]).end_token_id == 2
    assert load_tokenizer("character", ["ba"]).end_token_id is None
    learned = load_tokenizer("bpe:300", iter(TEXT))
    assert learned.get_vocabulary() == bpe.get_vocabulary()
    bpe.to_file(tmp_path / "tokenizer.json")
    read = load_tokenizer(tmp_path / "tokenizer.json")
    assert read.get_vocabulary() == bpe.get_vocabulary()
    for name in ("bpe:300", "character"):
        with pytest.raises(ValueError, match="give `documents`"):
            load_tokenizer(name)
    with pytest.raises(ValueError, match="Did you mean 'byte'.*gpt2_base_en"):
        load_tokenizer("bytes")
    for name in ("bpe:", "bpe:x", "bpe:-3", "gpt2_base_enn"):
        with pytest.raises(ValueError, match="Unknown tokenizer"):
            load_tokenizer(name, TEXT)
    for name in ("nowhere/tokenizer.json", "no.model"):
        with pytest.raises(ValueError, match="No tokenizer at 'no"):
            load_tokenizer(name)
    with pytest.raises(OSError, match="preset.*has no config.json"):
        load_tokenizer(tmp_path)
