"""Token caches: verified before they are used, safe to write together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import token_cache
from keras_stable import tokenize_corpus

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="no backend takes part"
)

BYTE = ks.ByteTokenizer()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"text {i} " * (i + 1))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def expected(source, tokenizer=BYTE, fraction=0.1):
    sides = ks.split(ks.load_corpus(source), fraction)
    return [ks.pack(side, tokenizer).tolist() for side in sides]


def sides(corpus):
    return [corpus.training.tolist(), corpus.validation.tolist()]


def names(cache):
    return sorted(path.name for path in cache.iterdir())


def test_tokens_are_those_of_pack(folder, cache, capsys):
    for where in (None, cache, cache):
        corpus = tokenize_corpus(folder, BYTE, 0.2, where)
        assert sides(corpus) == expected(folder, fraction=0.2)
        assert corpus.documents == 30
        assert corpus.training.dtype == np.uint8
        assert not corpus.training.flags.writeable
    assert corpus.cached and isinstance(corpus.training, np.memmap)
    # Three files, and nothing is said.
    assert len(names(cache)) == 3
    assert capsys.readouterr().err == ""
    # A single document is cut.
    single = folder / "29.txt"
    assert sides(tokenize_corpus(single, BYTE, 0.1, cache)) == expected(single)


def test_batches_take_the_map_without_copying(folder, cache):
    corpus = tokenize_corpus(folder, BYTE, cache=cache)
    data = ks.TokenBatches(corpus.training, 2, 8)
    assert np.shares_memory(data._views, corpus.training)
    # Wider than need be, as a large vocabulary's, it is not copied either.
    wide = corpus.training.astype("uint32")
    other = ks.TokenBatches(wide, 2, 8)
    assert np.shares_memory(other._views, wide)
    assert other.fingerprint == data.fingerprint
    np.testing.assert_array_equal(other[3][1], data[3][1])


def test_one_entry_for_each_tokenizer_split_and_source(folder, cache, capsys):
    bpe = ks.BPETokenizer.train(ks.stream_corpus(folder), 270)
    other = ks.BPETokenizer.train(["other text " * 9], 270)
    tokenizers = BYTE, ks.CharacterTokenizer.from_text("text 0123456789")
    for tokenizer in (*tokenizers, bpe, other):
        made = tokenize_corpus(folder, tokenizer, cache=cache)
        assert not made.cached
        assert tokenize_corpus(folder, tokenizer, cache=cache).cached
        assert sides(made) == expected(folder, tokenizer)
    assert not tokenize_corpus(folder, BYTE, 0.3, cache).cached
    assert not tokenize_corpus(folder / "*.txt", BYTE, cache=cache).cached
    assert tokenize_corpus(folder, BYTE, cache=cache).cached
    # Names that Keras counts do not matter.
    assert tokenize_corpus(folder, ks.ByteTokenizer(), cache=cache).cached
    assert capsys.readouterr().err == ""
    prints = {token_cache.fingerprint(t) for t in (*tokenizers, bpe, other)}
    assert len(prints) == 4


def changed_file(folder, cache):
    (folder / "00.txt").write_text("something else")
    return "its source is another one now"


def new_file(folder, cache):
    (folder / "new.txt").write_text("more")
    return "its source is another one now"


def touched_file(folder, cache):
    os.utime(folder / "00.txt", (1, 1))
    return "its source is another one now"


def truncated_tokens(folder, cache):
    (path,) = cache.glob("*-training-*.npy")
    path.write_bytes(path.read_bytes()[:-5])
    return "has [0-9]+ bytes, not"


def longer_tokens(folder, cache):
    (path,) = cache.glob("*-training-*.npy")
    path.write_bytes(path.read_bytes() + b"\0")
    return "has [0-9]+ bytes, not"


def changed_tokens(folder, cache):
    (path,) = cache.glob("*-validation-*.npy")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    return "sha256 differs"


def another_header(folder, cache):
    (path,) = cache.glob("*-validation-*.npy")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"|u1", b"|i1"))
    return "another shape or dtype"


def pickled_objects(folder, cache):
    (path,) = cache.glob("*-training-*.npy")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"'|u1'", b"'|O' "))
    return "made anew"


def missing_tokens(folder, cache):
    (path,) = cache.glob("*-training-*.npy")
    path.unlink()
    return "is missing"


def truncated_manifest(folder, cache):
    (path,) = cache.glob("*.json")
    path.write_bytes(path.read_bytes()[:100])
    return "made anew"


def empty_manifest(folder, cache):
    (path,) = cache.glob("*.json")
    path.write_text("[]")
    return "made anew"


def manifest_of_another_tokenizer(folder, cache):
    (path,) = cache.glob("*.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "tokenizer": "0"}))
    return "its tokenizer is another one now"


def manifest_of_another_version(folder, cache):
    (path,) = cache.glob("*.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 0}))
    return "its version is another one now"


DAMAGES = [
    *(changed_file, new_file, touched_file, truncated_tokens, longer_tokens),
    *(changed_tokens, another_header, pickled_objects, missing_tokens),
    *(truncated_manifest, empty_manifest, manifest_of_another_tokenizer),
    manifest_of_another_version,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_what_does_not_agree_is_made_anew(folder, cache, damage, capfd):
    tokenize_corpus(folder, BYTE, cache=cache)
    told = damage(folder, cache)
    corpus = tokenize_corpus(folder, BYTE, cache=cache)
    assert not corpus.cached and sides(corpus) == expected(folder)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("keras_stable: the cached tokens of")
    assert re.search(told, line)
    # Once; and nothing is left of the entry before.
    assert tokenize_corpus(folder, BYTE, cache=cache).cached
    assert capfd.readouterr().err == "" and len(names(cache)) == 3


def test_an_interrupted_call_leaves_no_entry(folder, cache, monkeypatch):
    def broken(source):
        yield from ["a", "b"] * 300
        raise OSError("the network is gone")

    monkeypatch.setattr(token_cache, "stream_corpus", broken)
    with pytest.raises(OSError, match="network is gone"):
        tokenize_corpus(folder, BYTE, cache=cache)
    assert names(cache) == []
    monkeypatch.undo()
    assert not tokenize_corpus(folder, BYTE, cache=cache).cached
    # Nor does a text that changes meanwhile.
    read = token_cache.stream_corpus

    def writing(source):
        yield from read(source)
        (folder / "late.txt").write_text("late")

    monkeypatch.setattr(token_cache, "stream_corpus", writing)
    with pytest.raises(OSError, match="changed while they were read"):
        tokenize_corpus(folder, BYTE, 0.3, cache)
    assert len(names(cache)) == 3


def test_errors(folder, cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Cannot write tokens.*--cache none"):
        tokenize_corpus(folder, BYTE, cache=tmp_path / "file")
    with pytest.raises(ValueError, match="Nothing is left for validation"):
        tokenize_corpus(folder, BYTE, 1e-9, cache)
    assert names(cache) == []
    for where in (None, cache):
        with pytest.raises(FileNotFoundError, match="No file at"):
            tokenize_corpus(folder / "nowhere", BYTE, cache=where)
        with pytest.raises(ValueError, match="`validation_fraction` must be"):
            tokenize_corpus(folder, BYTE, 2, where)


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ks.cache_directory() == tmp_path / "keras_stable"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ks.cache_directory() == Path.home() / ".cache/keras_stable"


WRITER = """
import sys
from pathlib import Path
import keras_stable as ks
_, source, cache = sys.argv
for _ in range(20):
    # So that both write, again and again.
    for path in Path(cache).glob("*.json"):
        path.unlink(missing_ok=True)
    corpus = ks.tokenize_corpus(source, ks.ByteTokenizer(), cache=cache)
    print(len(corpus.training), int(corpus.training.sum(dtype="int64")))
"""


def test_writers_at_the_same_time(folder, cache):
    command = [sys.executable, "-c", WRITER, str(folder), str(cache)]
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(2)
    ]
    training = expected(folder)[0]
    for process in running:
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert set(out.splitlines()) == {f"{len(training)} {sum(training)}"}
    assert tokenize_corpus(folder, BYTE, cache=cache).training.tolist() == (
        training
    )


def test_datasets_and_their_options(tmp_path, cache):
    folder = tmp_path / "hub"
    folder.mkdir()
    rows = [json.dumps({"text": f"row {i} " * 5}) for i in range(50)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    source = f"hf:{folder}?documents=40"
    corpus = tokenize_corpus(source, BYTE, cache=cache)
    assert corpus.documents == 40 and sides(corpus) == expected(source)
    assert tokenize_corpus(source, BYTE, cache=cache).cached
    assert not tokenize_corpus(f"hf:{folder}", BYTE, cache=cache).cached
    (folder / "train.jsonl").write_text("\n".join(rows[::-1]))
    assert not tokenize_corpus(source, BYTE, cache=cache).cached
