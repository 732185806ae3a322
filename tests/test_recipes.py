"""The recipes as a user calls them."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_stable as ks

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.append(str(RECIPES))  # What `python recipes/...` has by itself.


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location(
        "pretrain", RECIPES / "pretrain.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where the recipes keep tokens, in the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home/keras_stable"


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


@pytest.mark.parametrize("policy", ["guard", "recover --autopsy"])
def test_a_healthy_run_may_be_saved(policy, text, tmp_path, pretrain):
    losses = []
    for i, flags in enumerate(("halt", policy)):
        out = tmp_path / str(i)
        command = [*TINY, "--data", text, "--tokens", "400", "--out", str(out)]
        pretrain.main([*command, "--policy", *flags.split()])
        run = ks.read_run(out)
        losses.append((run["validation_loss"], run["steps_done"]))
    assert losses[0] == losses[1]


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


def test_several_corpora_a_learned_tokenizer_and_a_cache(
    pretrain, text, tmp_path, cache, capsys
):
    other = tmp_path / "hub"
    other.mkdir()
    rows = [json.dumps({"text": f"Row {i} of it. " * 4}) for i in range(60)]
    (other / "train.jsonl").write_text("\n".join(rows))
    hub = f"hf:{other}?documents=50"
    flags = [*TINY, "--steps", "6", "--data", text, "--data", hub]
    flags += ["--weights", "3", "1", "--z-loss", "1e-4"]
    flags += "--cycles 2 --cycle-growth 2 --peak-decay 0.5".split()
    flags += "--rewarmup-steps 1 --warmup-steps 1".split()
    pretrain.main(
        [*flags, "--tokenizer", "bpe:270", "--out", str(tmp_path / "a")]
    )
    run = ks.read_run(tmp_path / "a")
    assert run["status"] == "finished" and run["config"]["data"] == [text, hub]
    first, second = run["corpus"]["corpora"]
    assert second["documents"] == 50 and second["source"] == hub
    assert first["weight"] == pytest.approx(0.75, abs=1e-5)
    assert run["validation_loss"] == pytest.approx(
        0.75 * first["validation_loss"] + 0.25 * second["validation_loss"],
        abs=1e-4,
    )
    assert first["validation_loss"] != second["validation_loss"]
    for name in ("training_tokens", "validation_tokens", "documents"):
        assert run["corpus"][name] == first[name] + second[name]
    printed = capsys.readouterr().out
    assert f"{second['validation_loss']:.4f}" in printed and hub in printed
    lm = keras.models.load_model(tmp_path / "a/model.keras")
    assert lm.backbone.variant.architecture.z_loss == 1e-4
    config = lm.optimizer.get_config()["learning_rate"]["config"]
    assert config["cycles"] == 2 and config["cycle_growth"] == 2
    assert config["peak_decay"] == 0.5 and config["rewarmup_steps"] == 1
    vocabulary = lm.preprocessor.tokenizer.get_vocabulary()
    assert len(vocabulary) == run["corpus"]["vocabulary_size"] <= 270

    # Again with what was learned: the same tokens, and the same numbers.
    entries = sorted(cache.iterdir())
    assert len(entries) == 6
    learned = str(tmp_path / "a/tokenizer.json")
    again = str(tmp_path / "b")
    pretrain.main([*flags, "--tokenizer", learned, "--out", again])
    assert sorted(cache.iterdir()) == entries
    other_run = ks.read_run(again)
    assert other_run["corpus"] == run["corpus"]
    assert other_run["validation_loss"] == run["validation_loss"]


def test_without_a_cache(pretrain, text, tmp_path, cache):
    out = str(tmp_path / "run")
    flags = [*TINY, "--data", text, "--steps", "2", "--out", out]
    pretrain.main([*flags, "--cache", "none"])
    assert not cache.exists()


def at_step(monkeypatch, step, action):
    """Does something in the monitor, before a step counted from 0."""
    original = ks.StabilityMonitor.on_train_batch_begin

    def begin(self, batch, logs=None):
        if batch == step:
            action()
        original(self, batch, logs)

    monkeypatch.setattr(ks.StabilityMonitor, "on_train_batch_begin", begin)


def test_an_interrupted_run_goes_on(pretrain, text, tmp_path, monkeypatch):
    # Elsewhere than on torch, programs that measure take long to compile.
    every = "1" if keras.backend.backend() == "torch" else "none"
    flags = [*TINY, "--data", text, "--steps", "9", "--every", every]
    flags += ["--dropout", "0.1", "--checkpoint-every", "4"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    pretrain.main([*flags, "--out", whole])
    with monkeypatch.context() as patched:
        # A kill is like it, but for the last checkpoint: `test_resumption`.
        at_step(patched, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            # `--resume` begins what is not there.
            pretrain.main([*flags, "--out", parts, "--resume"])
    assert stopped.value.code == 75
    run = ks.read_run(parts)
    assert run["status"] == "interrupted" and run["steps_done"] == 5
    # All flags are the run's.
    pretrain.main(["--resume", "--out", parts])
    runs = [ks.read_run(path) for path in (whole, parts)]
    assert [entry["step"] for entry in runs[1]["resumed"]] == [5]
    for name in ("status", "verdict", "steps_done", "validation_loss"):
        assert runs[0][name] == runs[1][name], name
    assert runs[0]["last_batch_loss"] == runs[1]["last_batch_loss"]
    first, second = (
        (Path(path) / "health.jsonl").read_text() for path in (whole, parts)
    )
    assert first == second
    first, second = (
        keras.models.load_model(Path(path) / "model.keras").get_weights()
        for path in (whole, parts)
    )
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_a_run_of_a_sweep(pretrain, text, tmp_path, monkeypatch):
    # Any variant, AdamW's numbers, and nothing kept but records.
    variant = ks.get_variant("soft_cap").replace(cap=30.0, name="mine")
    flags = [*TINY, "--data", text, "--steps", "6", "--every", "none"]
    flags += ["--variant", json.dumps(variant.to_dict()), "--save", "none"]
    flags += "--beta-1 0.8 --beta-2 0.99 --epsilon 1e-6 --final 0".split()
    flags += "--decay independent --weight-decay 1e-4".split()
    seen = []
    original = ks.StableCausalLM.compile
    monkeypatch.setattr(
        ks.StableCausalLM,
        "compile",
        lambda lm, *a, **k: (seen.append(lm), original(lm, *a, **k))[1],
    )
    out = tmp_path / "a"
    with monkeypatch.context() as patched:
        at_step(patched, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            pretrain.main(
                [*flags, "--clip-norm", "none", "--out", str(out), "--resume"]
            )
    assert stopped.value.code == 75
    assert ks.read_run(out)["steps_done"] == 4
    # A checkpoint when it was stopped, and no other.
    saved = [p.name for p in (out / "checkpoints").glob("0*")]
    assert saved == ["00000004"]
    pretrain.main(["--resume", "--out", str(out)])
    run = ks.read_run(out)
    assert run["status"] == "finished" and run["resumed"][0]["step"] == 4
    assert {p.name for p in out.iterdir()} == {
        *("run.json", "health.jsonl", "monitor.json")
    }
    config = run["config"]
    assert config["label"] == "mine" and "sample" in run
    assert ks.get_variant(config["variant"]) == variant
    assert run["sample"] is None
    lm = seen[-1]
    assert lm.backbone.variant == variant
    optimizer = lm.optimizer
    assert (optimizer.beta_1, optimizer.beta_2) == (0.8, 0.99)
    assert (optimizer.epsilon, optimizer.decay) == (1e-6, "independent")
    assert optimizer.global_clipnorm is None
    assert optimizer.learning_rate == 0

    # Killed without one, it begins again; a label, and a norm to clip to.
    labelled = str(tmp_path / "b")
    flags += ["--label", "it", "--clip-norm", "0.5", "--out", labelled]

    def kill():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ks.StableCausalLM, "evaluate", lambda *a, **k: kill())
        with pytest.raises(KeyboardInterrupt):
            pretrain.main([*flags, "--resume"])
    assert not (tmp_path / "b/checkpoints").exists()
    pretrain.main([*flags, "--resume"])
    run = ks.read_run(labelled)
    assert [entry["step"] for entry in run["resumed"]] == [0]
    assert run["config"]["label"] == "it" and run["status"] == "finished"
    assert seen[-1].optimizer.global_clipnorm == 0.5
    steps, _ = ks.read_health(labelled).series("loss")
    assert steps.tolist() == list(range(1, 7))


def test_losses_of_validation_batches(pretrain, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("So long lives this, and this gives life to thee.\n" * 90)
    out = tmp_path / "run"
    pretrain.main(
        [*TINY, "--data", text, "--data", str(other), "--steps", "3"]
        + ["--every", "none", "--save", "none", "--out", str(out)]
    )
    run = ks.read_run(out)
    losses = iter(run["validation_batch_losses"])
    for row in run["corpus"]["corpora"]:
        own = [next(losses) for _ in range(row["validation_batches"])]
        assert len(own) > 1 and len({*own}) > 1
        mean = sum(own) / len(own)
        assert row["validation_loss"] == pytest.approx(mean, rel=1e-5)
    assert next(losses, None) is None


def test_what_cannot_go_on(pretrain, text, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "run")
    flags = [*TINY, "--data", text, "--steps", "6", "--checkpoint-every", "2"]
    flags += ["--out", out, "--every", "none", "--resume"]

    def kill():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        # As if killed, after training and before the end.
        patched.setattr(ks.StableCausalLM, "evaluate", lambda *a, **k: kill())
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(flags)
    assert ks.read_run(out)["status"] == "running"
    for change, message in {
        "--learning-rate 1e-2": "--learning-rate is 0.003 there and 0.01 here",
        "--seed 3 --size 10m": "--size is '1m' there and '10m' here; --seed",
    }.items():
        with pytest.raises(SystemExit) as refused:
            pretrain.main([*flags, *change.split()])
        assert message in str(refused.value)
    with pytest.raises(SystemExit):
        pretrain.main(["--resume"])
    assert "--resume needs --out" in capsys.readouterr().err

    before = Path(text).read_text()
    Path(text).write_text(before.replace("question", "questiom"))
    with pytest.raises(SystemExit, match="belongs to other batches"):
        pretrain.main(["--resume", "--out", out])
    Path(text).unlink()
    with pytest.raises(SystemExit, match="No file at or matching"):
        pretrain.main(["--resume", "--out", out])
    Path(text).write_text(before)

    # Trained to the end: what is left is done without another step.
    pretrain.main(["--resume", "--out", out])
    run = ks.read_run(out)
    assert run["status"] == "finished" and run["steps_done"] == 6
    assert math.isfinite(run["last_batch_loss"])
    pretrain.main(["--resume", "--out", out])
    assert "has finished" in capsys.readouterr().out

    # Killed before its first checkpoint: begins again, records and all.
    run.update(status="running")
    (Path(out) / "run.json").write_text(json.dumps(run))
    shutil.rmtree(Path(out) / "checkpoints")
    pretrain.main(["--resume", "--out", out])
    steps, _ = ks.read_health(out).series("loss")
    assert steps.tolist() == list(range(1, 7))
    assert "Goes on after step 0" in capsys.readouterr().out

    # None good: no new beginning.
    run.update(status="running")
    (Path(out) / "run.json").write_text(json.dumps(run))
    for state in Path(out).glob("checkpoints/*/state.json"):
        state.write_text("{}")
    with pytest.raises(SystemExit, match="No checkpoint in"):
        pretrain.main(["--resume", "--out", out])
    (Path(out) / "run.json").write_text("[]")
    with pytest.raises(SystemExit, match="is no record of a run"):
        pretrain.main(["--resume", "--out", out])


BAD = {
    "--variant qk_nrom": "Did you mean 'qk_norm'",
    "--size 10mm": "Unknown size. Did you mean '10m'",
    "--precision fp16": "Unknown precision",
    "--backend jaxx": "unknown backend 'jaxx'",
    "--schedule cosin": "Did you mean 'cosine'",
    "--distribution dat": "Did you mean 'data'",
    "--tokenizer bytes": "Did you mean 'byte'",
    "--tokenizer bpe:9": "from 257",
    "--tokenizer nowhere/tokenizer.json": "No tokenizer at 'nowhere",
    "--tokenizer BINARY": "No tokenizer at",
    "--data hf:EMPTY?colum=x": "Unknown key",
    "--cache EMPTY": "Cannot write tokens to the cache",
    "--cycles 9 --schedule constant": "nothing to restart",
    "--hidden-dim 15": "multiple of `num_heads`",
    "--data nowhere.txt": "No file at or matching",
    "--data EMPTY": "No text in",
    "--data BINARY": "is not UTF-8",
    "--batch-size 4000": "do not fill one batch",
    "--tokens 3": "less than one batch",
    "--weight-decay -1": "`weight_decay` must be at least 0",
    "--dropout 1": "`dropout` must be in",
    '--variant {"nam":"x"}': "Did you mean 'name'",
    "--beta-2 1": "`beta_2` must be at least 0 and less than 1",
    "--decay couplet": "Did you mean 'coupled'",
    "--save nothing": "Unknown what to --save",
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
        "--weights 1 2": "2 numbers for 1 corpora",
        "--data a --data b --weights 1": "1 numbers for 2 corpora",
        "--data a --weights 0": "invalid positive number value: '0'",
        "--z-loss inf": "invalid positive number value: 'inf'",
        "--cycles 0": "invalid positive integer value: '0'",
        "--clip-norm 0": "positive number or none value: '0'",
        "--variant {": "a name or JSON, not value: '{'",
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
