"""Run directories: what is written is what is read."""

import json
import math

import keras
import numpy as np
import pytest

import keras_stable as ks


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


def test_losses_of_all_steps_are_true(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 31, 300)
    data = ks.TokenBatches(tokens, 4, 8)
    lm = ks.StableCausalLM(ks.StableBackbone(31, 1, 2, 16))
    lm.compile(ks.AdamW(1e-3))
    recorder = ks.LossRecorder(tmp_path)
    history = lm.fit(data, epochs=2, callbacks=[recorder], verbose=0).history
    records = ks.read_health(tmp_path)
    steps = len(data)
    assert [r["step"] for r in records] == list(range(1, 2 * steps + 1))
    losses = np.array([r["loss"] for r in records])
    assert recorder.last_loss == losses[-1]
    # Keras's running means are the means of these.
    for epoch, mean in enumerate(history["loss"]):
        part = losses[epoch * steps : (epoch + 1) * steps]
        assert part.mean() == pytest.approx(mean, rel=1e-5)
        assert part[-1] == pytest.approx(history["batch_loss"][epoch])


def test_health_survives_nan_and_a_torn_line(tmp_path):
    file = tmp_path / "health.jsonl"
    lines = [{"step": 2, "loss": "nan"}, {"step": 1, "loss": 1.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file.write_text(text + '{"step": 3, "lo')
    first, second = ks.read_health(tmp_path)
    assert first == {"step": 1, "loss": 1.5} and math.isnan(second["loss"])
    file.write_text("not json\n" + text)
    with pytest.raises(ValueError):
        ks.read_health(tmp_path)


def test_a_model_without_batch_loss_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="reports `batch_loss`"):
        model.fit(
            np.ones((4, 2)),
            np.ones((4, 1)),
            callbacks=[ks.LossRecorder(tmp_path)],
            verbose=0,
        )
