"""Corpora of files and of Hugging Face datasets, and their split."""

import json
import os
import sys
import sysconfig
from pathlib import Path

import keras
import pytest

from keras_stable.corpora import load_corpus
from keras_stable.corpora import split
from keras_stable.corpora import split_stream
from keras_stable.corpora import stream_corpus
from keras_stable.hub import pin

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="no backend takes part"
)


def test_python_corpus_is_the_standard_library():
    documents = load_corpus()
    library = sysconfig.get_path("stdlib")
    for name in ("abc.py", "json/decoder.py"):
        with open(os.path.join(library, name), encoding="utf-8") as file:
            assert file.read() in documents
    with open(keras.__file__, encoding="utf-8") as file:
        assert file.read() not in documents
    with open(os.path.join(library, "test/test_json/__init__.py")) as file:
        assert file.read() not in documents
    assert 5e6 < sum(map(len, documents)) < 50e6
    assert documents == load_corpus()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b/two.txt").write_text("zwei é\r\n", encoding="utf-8")
    (tmp_path / "a.md").write_text("one", encoding="utf-8")
    (tmp_path / "c.txt").write_text("three", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.bin").write_bytes(b"caf\xe9")
    (tmp_path / "nul.bin").write_bytes(b"a\0b")
    (tmp_path / ".hidden/no.txt").write_text("no")
    (tmp_path / ".no.txt").write_text("no")
    return tmp_path


def test_corpus_from_paths(folder, monkeypatch):
    assert load_corpus(folder / "a.md") == ["one"]
    assert load_corpus(folder) == ["one", "three", "zwei é\n"]
    assert load_corpus(str(folder / "*.txt")) == ["three"]
    assert load_corpus(f"{folder}/**/*.txt") == ["zwei é\n", "three"]
    monkeypatch.setenv("HOME", str(folder))
    assert load_corpus("~/c.txt") == ["three"]
    (folder / "x[1].txt").write_text("brackets")
    assert load_corpus(folder / "x[1].txt") == ["brackets"]


def test_corpus_errors(folder):
    with pytest.raises(FileNotFoundError, match="nothing-here.*glob pattern"):
        load_corpus(folder / "nothing-here*.txt")
    with pytest.raises(ValueError, match="latin.bin is not UTF-8.*byte 3"):
        load_corpus(folder / "latin.bin")
    with pytest.raises(ValueError, match="latin.bin is not UTF-8"):
        load_corpus(folder / "l*.bin")
    with pytest.raises(ValueError, match="nul.bin contains NUL"):
        load_corpus(folder / "nul.bin")
    with pytest.raises(ValueError, match=r"No text.*1 file\(s\) are empty"):
        load_corpus(folder / "empty.txt")
    with pytest.raises(TypeError, match="`source` must be.*Received: 3"):
        load_corpus(3)


def test_unreadable_file_is_named(folder, monkeypatch):
    def refuse(path, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    # Permissions themselves do not stop a superuser's tests.
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(ValueError, match="Cannot read .*a.md: Permission"):
        load_corpus(folder / "a.md")
    with pytest.raises(ValueError, match="Cannot read .*a.md: Permission"):
        load_corpus(folder)


def test_single_document_is_cut_like_nanogpt():
    text = "".join(map(chr, range(40, 1155)))
    training, validation = split([text])
    assert (training, validation) == (
        [text[: int(1115 * 0.9)]],
        [text[int(1115 * 0.9) :]],
    )


def test_split_by_document_is_stable():
    documents = [f"document {i}" for i in range(500)]
    training, validation = split(documents, 0.2)
    assert sorted(training + validation) == sorted(documents)
    # Binomial(500, 0.2) has a standard deviation of 9.
    assert 60 < len(validation) < 140
    # Order and other documents do not matter, and the hash is a known one.
    more_training, more_validation = split(
        [f"new {i}" for i in range(50)] + documents[::-1], 0.2
    )
    assert set(training) <= set(more_training)
    assert set(validation) <= set(more_validation)
    # `printf abc | sha256sum` begins with ba7816: 0.72839 of the way.
    assert "abc" in split([*documents, "abc"], 0.7284)[1]
    assert "abc" in split([*documents, "abc"], 0.7283)[0]


def test_split_errors():
    with pytest.raises(ValueError, match="Nothing is left for validation"):
        split(["a", "b"], 1e-9)
    with pytest.raises(ValueError, match="Nothing is left for training"):
        split(["a", "b"], 1 - 1e-9)
    with pytest.raises(ValueError, match=r"training: 1 document\(s\), 1 char"):
        split(["a"])
    for fraction in (0, 1, -0.1, 1.5, float("nan"), "0.1"):
        with pytest.raises(ValueError, match="`validation_fraction` must be"):
            split(["a", "b"], fraction)
    with pytest.raises(TypeError, match=r"list of strings. Write \[text\]"):
        split("abc")
    with pytest.raises(ValueError, match="`documents` is empty"):
        split([])
    with pytest.raises(TypeError, match=r"documents\[1\] of type int"):
        split(["a", 1])


# Streams.


def test_streams_are_the_lists(folder):
    for source in (folder, folder / "a.md", f"{folder}/**/*.txt"):
        assert list(stream_corpus(source)) == load_corpus(source)
    # What is missing is found at once, what is not text when it is read.
    with pytest.raises(FileNotFoundError):
        stream_corpus(folder / "nothing")
    stream = stream_corpus(folder / "latin.bin")
    with pytest.raises(ValueError, match="is not UTF-8"):
        next(stream)


def test_stream_reads_one_file_at_a_time(folder, monkeypatch):
    opened = []
    read = Path.read_text

    def count(path, **kwargs):
        opened.append(path.name)
        return read(path, **kwargs)

    monkeypatch.setattr("pathlib.Path.read_text", count)
    stream = stream_corpus(folder)
    assert opened == []
    assert next(stream) == "one" and opened == ["a.md"]


def test_split_stream_is_split():
    documents = [f"document {i}" for i in range(300)]
    training, validation = split(documents, 0.2)
    pairs = list(split_stream(iter(documents), 0.2))
    assert [text for _, text in pairs] == documents
    assert [text for side, text in pairs if side] == validation
    assert [text for side, text in pairs if not side] == training
    # It holds no more than two documents.
    drawn = []
    stream = split_stream((drawn.append(t) or t for t in documents), 0.2)
    next(stream)
    assert len(drawn) <= 2
    assert list(split_stream(["abcdefghij"], 0.2)) == [
        (False, "abcdefgh"),
        (True, "ij"),
    ]
    with pytest.raises(ValueError, match="left for training: 0 document"):
        list(split_stream([]))
    with pytest.raises(ValueError, match="`validation_fraction` must be"):
        split_stream([], 2)


# Hugging Face datasets; there is no network in tests.

ROWS = [
    {"text": "one", "other": "ein", "n": 1},
    {"text": "t\0wo", "other": "zwei", "n": 2},
    {"text": None, "other": "drei", "n": 3},
    {"text": "", "other": "vier", "n": 4},
    {"text": "fünf", "other": "five", "n": 5},
]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub"
    folder.mkdir()
    lines = "\n".join(map(json.dumps, ROWS))
    (folder / "train.jsonl").write_text(lines)
    (folder / "test.jsonl").write_text(json.dumps(ROWS[0]))
    return folder


def test_datasets_are_streamed(dataset, tmp_path):
    import pyarrow
    import pyarrow.parquet

    source = f"hf:{dataset}"
    assert load_corpus(source) == ["one", "two", "fünf"]
    assert load_corpus(source + "?documents=2") == ["one", "two"]
    assert load_corpus(source + "?split=test&column=other") == ["ein"]
    assert next(stream_corpus(source + "?column=oth%65r")) == "ein"
    other = tmp_path / "parquet"
    other.mkdir()
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, other / "train.parquet")
    assert load_corpus(f"hf:{other}") == ["one", "two", "fünf"]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "train.txt").write_text("a\n\nb\n")
    assert load_corpus(f"hf:{plain}") == ["a", "b"]


BAD = {
    "?colum=text": "Unknown key in .*Did you mean 'column'.*'revision'",
    "?column=words": "no column 'words'. There are: 'text', 'other', 'n'",
    "?column=n": "must hold text. Received: int in row 0",
    "?split=valid": r"Cannot read .*Available splits: \['train', 'test'\]|"
    r"Available splits: \['test', 'train'\]",
    "?name=large": "'large' not found. Available: \\['default'\\]",
    "?documents=0": "positive integer. Received: '0'",
    "?documents=many": "positive integer. Received: 'many'",
    "?split=": "one value, once.*Received: 'split='",
    "?split": "one value, once.*Received: 'split'",
    "?split=train&split=test": "one value, once",
}


@pytest.mark.parametrize("query", BAD)
def test_dataset_errors_name_what_is_there(dataset, query):
    with pytest.raises(ValueError, match=BAD[query]):
        load_corpus(f"hf:{dataset}{query}")


def test_other_dataset_errors(dataset, monkeypatch):
    with pytest.raises(ValueError, match="names no dataset"):
        stream_corpus("hf:")
    with pytest.raises(OSError, match="Check the dataset's name, the network"):
        stream_corpus("hf:nobody/nothing")
    with pytest.raises(OSError, match="Check the dataset's name, the network"):
        pin("hf:nobody/nothing")
    commit = f"hf:nobody/nothing?revision={'0a' * 20}"
    assert pin(commit) == commit
    # Code that came with a dataset is not run.
    (dataset / "train.jsonl").unlink()
    (dataset / "test.jsonl").unlink()
    (dataset / "hub.py").write_text("raise SystemExit('was run')")
    with pytest.raises((ValueError, OSError), match="Cannot read"):
        stream_corpus(f"hf:{dataset}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "keras-stable\[data'):
        stream_corpus(f"hf:{dataset}")


def test_a_stream_that_breaks_off_is_no_end(dataset, monkeypatch):
    def broken(*args, **kwargs):
        yield from ROWS[:2]
        raise TimeoutError("gone")

    monkeypatch.setattr("datasets.load_dataset", broken)
    stream = stream_corpus("hf:some/where")
    assert [next(stream), next(stream)] == ["one", "two"]
    with pytest.raises(OSError, match="TimeoutError: gone. Check"):
        next(stream)


def test_the_commit_is_pinned(monkeypatch):
    class Found:
        sha = "ab" * 20

    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: Found
    )
    pinned = pin("hf:a/b?name=x%26y&documents=3")
    assert pinned == f"hf:a/b?name=x%26y&documents=3&revision={'ab' * 20}"
    assert pin(pinned) == pinned
    assert pin("python") == "python"
