"""The recipes as a user calls them."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_stable as ks

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location(
        "pretrain", RECIPES / "pretrain.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("To be, or not to be: that is the question.\n" * 60)
    return str(file)


TINY = (
    "--num-layers 1 --num-heads 2 --hidden-dim 16 --sequence-length 16 "
    "--batch-size 4"
).split()


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_a_run_leaves_its_records(pretrain, text, tmp_path, precision, capsys):
    out = tmp_path / "run"
    pretrain.main(
        [*TINY, "--data", text, "--tokenizer", "character", "--steps", "12"]
        + ["--variant", "qk_norm_cap", "--precision", precision, "--remat"]
        + ["--out", str(out), "--dropout", "0.1"]
    )
    run = ks.read_run(out)
    assert run["status"] == "finished"
    assert run["config"]["variant"] == "qk_norm_cap"
    assert run["tokens"] == 12 * 4 * 16
    assert run["verdict"] == "OK" and run["steps_done"] == 12
    health = ks.read_health(out)
    steps, losses = health.series("loss")
    assert steps.tolist() == list(range(1, 13))
    assert all(map(math.isfinite, losses))
    assert "block_0/attention/query" in health.layout["tensors"]
    lm = keras.models.load_model(out / "model.keras")
    assert lm.count_params() == run["parameters"]
    assert lm.preprocessor.tokenizer.vocabulary_size() == len(
        set(Path(text).read_text())
    )
    printed = capsys.readouterr().out
    for line in ("validation loss", "unigram entropy", "bigram entropy"):
        assert line in printed
    assert printed.rstrip().endswith(str(out))


def test_as_a_command(text, tmp_path):
    command = [sys.executable, RECIPES / "pretrain.py", *TINY, "--data", text]
    command += ["--tokens", "200", "--out", tmp_path / "run"]
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
    )
    assert done.returncode == 0, done.stderr
    assert ks.read_run(tmp_path / "run")["tokens"] == 192
    out = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, RECIPES / "collect.py", out, tmp_path / "run"],
        check=True,
    )
    (run,) = json.loads(out.read_text())["runs"]
    assert run == ks.read_run(tmp_path / "run")


BAD = {
    "--variant qk_nrom": "Did you mean 'qk_norm'",
    "--size 10mm": "Unknown size. Did you mean '10m'",
    "--precision fp16": "Unknown precision",
    "--backend jaxx": "unknown backend 'jaxx'",
    "--schedule cosin": "Did you mean 'cosine'",
    "--distribution dat": "Did you mean 'data'",
    "--tokenizer bytes": "Did you mean 'byte'",
    "--hidden-dim 15": "multiple of `num_heads`",
    "--data nowhere.txt": "No file at or matching",
    "--data EMPTY": "No text in",
    "--data BINARY": "is not UTF-8",
    "--batch-size 4000": "do not fill one batch",
    "--tokens 3": "less than one batch",
    "--weight-decay -1": "`weight_decay` must be at least 0",
    "--dropout 1": "`dropout` must be in",
    "--warmup-steps 2000": "`warmup_steps` must be less than",
    "--out HELD": "already holds another run",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_clear_sentence(pretrain, text, tmp_path, flags):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a")
    held = tmp_path / "held"
    held.mkdir()
    (held / "run.json").write_text('{"config": {"variant": "baseline"}}')
    given = [
        {
            "EMPTY": str(tmp_path / "empty"),
            "BINARY": str(tmp_path / "binary"),
            "HELD": str(held),
        }.get(word, word)
        for word in flags.split()
    ]
    out = ["--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as refused:
        pretrain.main([*TINY, "--data", text, *out, *given])
    assert str(refused.value).startswith("pretrain: ")
    assert BAD[flags] in str(refused.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags, message",
    {
        "--learning-rate nan": "invalid positive number value: 'nan'",
        "--learning-rate -0.1": "invalid positive number value: '-0.1'",
        "--steps 0": "invalid positive integer value: '0'",
        "--steps 3 --tokens 9": "give one of them",
        "--stepz 3": "unrecognized arguments",
    }.items(),
)
def test_bad_numbers(pretrain, flags, message, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(flags.split())
    assert message in capsys.readouterr().err


def test_help_names_every_variant(pretrain, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*ks.VARIANTS, *ks.SCHEDULES])
