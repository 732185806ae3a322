"""Corpora of files and of Hugging Face datasets, and their split."""

import os
import sysconfig

import keras
import pytest

from keras_stable.corpora import load_corpus
from keras_stable.corpora import split


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
