"""Run directories: what is written is what is read."""

import dataclasses
import json

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable.health import HealthWriter
from keras_stable.records import SCHEMA


def test_run_json_grows_and_refuses_a_second_run(tmp_path):
    run = ks.RunDirectory(tmp_path / "a/b", {"variant": "qk_norm"})
    run.update(validation_loss=float("nan"), status="diverged")
    record = ks.read_run(tmp_path / "a/b")
    assert record["config"] == {"variant": "qk_norm"}
    assert record["validation_loss"] == "nan"
    assert record["backend"] == keras.backend.backend()
    assert record["versions"]["keras"] == keras.__version__
    with pytest.raises(FileExistsError, match="another run.*'qk_norm'"):
        ks.RunDirectory(tmp_path / "a/b", {"variant": "baseline"})
    assert ks.read_run(tmp_path / "a/b") == record
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        ks.RunDirectory(file, {})


def test_health_survives_nan_and_torn_lines(tmp_path):
    file = tmp_path / "health.jsonl"
    event = ks.Event(2, 1, "spike", "loss", float("inf"), "It rose.")
    lines = [
        {"kind": "layout", "schema": 2},
        {"kind": "step", "step": 2, "loss": "nan"},
        {"kind": "step", "step": 1, "loss": 9.9},
        # A resumed run repeats a step: the last line counts.
        {"kind": "step", "step": 1, "loss": 1.5},
        {"kind": "event", **dataclasses.asdict(event)},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file.write_text(text + '{"kind": "step", "step": 3, "lo')
    health = ks.read_health(tmp_path)
    assert [r["step"] for r in health.steps] == [1, 2]
    steps, losses = health.series("loss")
    assert steps.tolist() == [1, 2] and losses[0] == 1.5
    assert np.isnan(losses[1])
    assert health.events == [event]
    file.write_text(text + "not json\n")
    with pytest.raises(ValueError, match="line 6, is no record"):
        ks.read_health(tmp_path)


def test_a_writer_goes_on_after_a_torn_line(tmp_path):
    writer = HealthWriter(tmp_path / "run")
    writer.write("layout", schema=SCHEMA)
    writer.write("step", step=1, loss=float("inf"))
    writer.close()
    with open(tmp_path / "run/health.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    writer = HealthWriter(tmp_path / "run")
    writer.write("step", step=2, loss=0.25)
    writer.close()
    steps, losses = ks.read_health(tmp_path / "run").series("loss")
    assert steps.tolist() == [1, 2] and losses.tolist() == [np.inf, 0.25]


def test_foreign_and_impossible_directories_are_left_alone(tmp_path):
    (tmp_path / "health.jsonl").write_text('{"theirs": 1}\n')
    with pytest.raises(FileExistsError, match="not a record of schema"):
        HealthWriter(tmp_path)
    assert (tmp_path / "health.jsonl").read_text() == '{"theirs": 1}\n'
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        HealthWriter(tmp_path / "file")
