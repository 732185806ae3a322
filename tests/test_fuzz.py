"""Readers of strangers' files: what they do with damage, and never do."""

import importlib
import io
import json
import math
import os
import pickle
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import fresh
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import keras_stable as ks
from keras_stable.diagnosis import Diagnosis
from keras_stable.families import FAMILIES
from keras_stable.health import HealthWriter
from keras_stable.packing import Layout
from keras_stable.packing import Sample

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
fuzz = importlib.import_module("fuzz")

LAYOUT = Layout(
    tensors=["fc", "fc/input"], heads={"core": 2}, variables=["fc/kernel"]
)


def generated(strategy, count):
    """Runs a test on so many examples, always the same ones."""

    def decorate(test):
        settings = hypothesis.settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        return settings(hypothesis.given(strategy)(test))

    return decorate


@pytest.fixture
def root(tmp_path, monkeypatch):
    """All that a reader may write in, what it unpacks included."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", fuzz.SHARES)
def test_readers_read_or_say_why_not(name, root):
    make, read, allowed = fuzz.readers(ks)[name]
    files = fuzz.sound(make, root / "sound")
    # As it is, it is read, and is no cause for complaint.
    assert fuzz.attempt(root, files, read, ()) == ("read", None)
    outcomes = set()

    @generated(
        fuzz.damaged(files, fuzz.pickled(root / "stolen")),
        max(10, fuzz.SHARES[name]),
    )
    def give(inputs):
        outcome, wrong = fuzz.attempt(root, inputs, read, allowed)
        assert wrong is None, wrong
        outcomes.add(outcome)

    give()
    # A damaged cache or state is made anew; all others refuse something.
    if name not in ("cache of tokens", "run that is continued"):
        assert outcomes - {"read"}


def test_the_fuzzer_would_see_it(root):
    """What no reader does is noticed where it is done."""
    files = {"a.json": b"{}"}

    def wrong(read, allowed=ValueError):
        return fuzz.attempt(root, files, read, allowed)[1]

    def leave(*arguments):
        raise ValueError(*arguments)

    payload, array, archive = fuzz.pickled(root / "stolen")
    assert "a pickle" in wrong(lambda folder: pickle.loads(payload))
    (root / "array.npz").write_bytes(archive)
    with np.load(root / "array.npz", allow_pickle=True) as arrays:
        assert "a pickle" in wrong(lambda folder: arrays["step"])
    outside = root.parent / "outside"
    assert "forbidden: open" in wrong(lambda folder: outside.write_text(""))
    assert "os.remove" in wrong(lambda folder: outside.unlink())
    assert "os.system" in wrong(lambda folder: os.system("true"))
    (root / "link").symlink_to(root.parent / "there")
    assert "open" in wrong(lambda folder: (root / "link").write_text(""))
    (root.parent / "there").unlink()
    assert "KeyError at" in wrong(lambda folder: {}["a"])
    assert "without a word" in wrong(lambda folder: leave())
    assert wrong(lambda folder: leave("why")) is None
    assert wrong(lambda folder: (folder / "b").write_text("")) is None


def test_damage_is_of_every_kind():
    found = []

    @generated(fuzz.damaged({"a.json": b'{"a": [1, {"b": "c"}]}'}), 400)
    def collect(files):
        found.append(files["a.json"])

    collect()
    texts = [f.decode(errors="replace") for f in found if type(f) is bytes]
    assert None in found and any(isinstance(f, Path) for f in found)
    assert len(set(texts)) > 150
    assert any(text.startswith('{"a": [[[[') for text in texts)
    assert any("\ufffd" in text for text in texts) and "" in texts


def sample(loss):
    return Sample(
        {
            "loss": loss,
            "gradient_norm": 1.0,
            "update_norm": 1.0,
            "skipped": 0.0,
            "updated": 1.0,
        },
        np.ones((2, 6), "float32"),
        [np.ones((3, 2), "float32")],
        np.ones((1, 4), "float32"),
    )


def test_detectors_go_on_from_any_state(tmp_path):
    file = tmp_path / "monitor.json"
    begun = Diagnosis(LAYOUT)
    for step in range(1, 200):
        loss = math.nan if step == 150 else 5.5 / step**0.2 + (step == 100)
        begun.update(step, sample(loss))
    begun.save(file, 199)
    files = {file.name: file.read_bytes()}
    resumed = []

    @generated(fuzz.damaged(files), 150)
    def go_on(inputs):
        hypothesis.assume(inputs[file.name] is not None)
        fuzz.write(tmp_path / "given", inputs)
        diagnosis = Diagnosis(LAYOUT)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            diagnosis.load(tmp_path / "given" / file.name, 199)
            for step in range(200, 260):
                diagnosis.update(step, sample(math.inf if step == 230 else 3.0))
        anew = any("begin anew" in str(w.message) for w in found)
        resumed.append(not anew)

    go_on()
    assert 10 < sum(resumed) < len(resumed) - 10


def test_a_state_as_saved_is_gone_on_from(tmp_path):
    file = tmp_path / "monitor.json"
    begun = Diagnosis(LAYOUT)
    for step in range(1, 100):
        begun.update(step, sample(3.0))
    begun.save(file, 99)
    again = Diagnosis(LAYOUT)
    # The rehearsal leaves no trace.
    again.load(file, 99)
    assert json.dumps(again.state()) == json.dumps(begun.state())
    earlier = Diagnosis(LAYOUT)
    earlier.load(file, 98)
    assert json.dumps(earlier.state()) == json.dumps(Diagnosis(LAYOUT).state())


def test_records_are_not_written_through_links(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("health.jsonl", "events"):
        (run / name).symlink_to(theirs)
        with pytest.raises(FileExistsError, match="is a link to"):
            HealthWriter(run)
        (run / name).unlink()
    (run / "events").mkdir()
    (run / "events/00000001-spike.npz").symlink_to(theirs)
    writer = HealthWriter(run)
    event = ks.Event(1, 1, "spike", "loss", 1.0, "")
    with np.load(writer.black_box(event, {"step": np.ones(1)})) as box:
        assert box["step"] == 1
    writer.close()
    (run / "run.part").symlink_to(theirs)
    ks.RunDirectory(run, {"seed": 1})
    assert theirs.read_text() == "precious"
    assert ks.read_run(run)["config"] == {"seed": 1}


@pytest.mark.parametrize(
    "size", [{"vocabulary_size": 2**31}, {"num_layers": 10**400}]
)
@pytest.mark.parametrize("file", ["config.json", "task.json"])
def test_a_preset_allocates_no_more_than_it_has(file, size, tmp_path):
    lm = ks.StableCausalLM.from_size(
        "1m", 256, num_layers=1, num_heads=2, hidden_dim=8
    )
    lm.save_to_preset(str(tmp_path / "preset"))
    path = tmp_path / "preset" / file
    content = json.loads(path.read_text())
    config = content["config"]
    config.get("backbone", content)["config"].update(size)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="larger than the preset.s weights"):
        ks.StableCausalLM.from_preset(str(tmp_path / "preset"))


@pytest.mark.parametrize("rate", [[0.1], {"a": 1}, "0.1", True, 0.2])
def test_a_dropout_that_is_none(rate):
    with pytest.raises(ValueError, match="one dropout rate"):
        FAMILIES["gpt2"].read({"embd_pdrop": rate})


def test_a_sentencepiece_model_that_ended_the_process(root):
    make, _, _ = fuzz.readers(ks)["SentencePiece model"]
    make(root / "sound")
    model = (root / "sound/m.model").read_bytes()
    assert b"\xe2\x96\x81ban" in model
    model = model.replace(b"\xe2\x96\x81ban", b"\0\x96\x81ban", 1)
    (root / "m.model").write_bytes(model)
    fresh.run(
        "import sys, keras_stable as ks\n"
        "try:\n    ks.load_tokenizer(sys.argv[1])\n"
        "except ValueError as error:\n    assert 'null' in str(error)\n"
        "else:\n    raise AssertionError('It was read.')",
        root / "m.model",
    )


def test_datasets_of_strangers_run_no_code(root):
    payload, array, archive = fuzz.pickled(root / "stolen")
    code = f"import os; os.mkdir({str(root / 'stolen')!r})"
    for number, files in enumerate(
        [
            {"a.py": code.encode()},
            {"a.pkl": payload, "a.pickle": payload, "a.pt": archive},
            {"a.tar": packed({"0.pickle": payload, "0.pyd": payload})},
            {"a.tar": packed({"0.npy": array, "0.pth": archive})},
            {"README.md": b"---\nconfigs: [{data_files: a.pkl}]\n---"},
        ]
    ):
        folder = root / f"set{number}"
        fuzz.write(folder, {"a.pkl": payload, **files})
        with pytest.raises((ValueError, OSError)):
            ks.load_corpus(f"hf:{folder}?column=pickle")
        assert not (root / "stolen").exists(), files


def packed(members):
    """A tar archive, as WebDataset reads it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


HOSTILE = st.sampled_from(
    [
        {"name": "a", "softmax": {"cap": 10**400}},
        {"name": "a", "attention": []},
        {"name": "a", "doubts": 5},
        {},
        [],
        {"name": "a", "softmax": {"clip": {"zeta": "1"}}},
    ]
)


@generated(HOSTILE, 20)
def test_dictionaries_of_no_variant(content):
    with pytest.raises((ValueError, TypeError)):
        ks.Variant.from_dict(content)


def test_the_lab_book_has_the_results():
    recipes = Path(fuzz.__file__).parent
    results = json.loads((recipes / "results/fuzz.json").read_text())
    readers, book = results["readers"], (recipes / "README.md").read_text()
    assert readers.keys() == fuzz.SHARES.keys()
    assert results["inputs"] == sum(r["inputs"] for r in readers.values())
    assert results["inputs"] >= 100_000
    assert not any(reader["unexpected"] for reader in readers.values())
    for name, reader in readers.items():
        read = reader["outcomes"]["read"]
        assert f"| {name} | {reader['inputs']} | {read} |" in book, name
