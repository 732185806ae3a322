"""The evaluator of stopping rules, and the runs that it is fed with."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_stable as ks

RECIPES = Path(__file__).parents[1] / "recipes"


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.append(str(RECIPES))  # What `python recipes/...` has by itself.
detection, detection_runs = load("detection"), load("detection_runs")
rules, models = load("detection_rules"), load("detection_models")
NOISE = np.random.default_rng(0).normal(0, 0.02, 2000)


def series(loss, norm=1.0, skipped=()):
    loss = np.asarray(loss, "float64")
    norm = np.broadcast_to(norm, loss.shape).astype("float64")
    empty = np.array([])
    return {
        "loss": loss,
        "gradient_norm": norm,
        "update_norm": empty,
        "max_logit": empty,
        "skipped": np.asarray(skipped, "float64"),
    }


def flat(steps, **changes):
    """Losses of 3, but for `at`: (first step, values)."""
    loss = np.full(steps, 3.0)
    first, values = changes.get("at", (1, []))
    loss[first - 1 : first - 1 + len(values)] = values
    return series(loss)


def healthy(steps=700, end=2.0):
    t = np.arange(1, steps + 1)
    return end + (5.5 - end) / t**0.5 + NOISE[:steps]


def lost(onset=400, steps=700):
    loss = healthy(steps)
    loss[onset - 1 :] = 5.0 + NOISE[onset - 1 : steps]
    return loss


# The rules, restated.


def test_terminate_on_nan_sees_the_first_nan():
    rule = rules.terminate_on_nan
    assert rule(flat(300)) is None
    assert rule(flat(300, at=(120, [math.nan]))) == 120
    assert rule(flat(300, at=(120, [math.inf]))) == 120
    # The epoch's mean overflows float32 where no loss does.
    assert rule(flat(300, at=(120, [3e38, 3e38]))) == 121


def test_kill_loss_spike_needs_five_in_a_row_of_twice_the_mean():
    rule = rules.kill_loss_spike
    assert rule(flat(300, at=(150, [6.0, 6.1, 6.2, 6.3]))) is None
    assert rule(flat(300, at=(150, [6.0, 6.1, 6.2, 6.3, 6.5]))) == 154
    assert rule(flat(300, at=(150, [6.5, 6.5, 3.0, 6.5, 6.5, 6.5]))) is None
    # The window must be full: of 100, or of 5 % of a long run.
    assert rule(flat(300, at=(95, [7.0] * 5))) is None
    assert rule(flat(300, at=(150, [9.0] * 6)), steps=4000) is None
    # NaN is never at least twice the mean.
    assert rule(flat(300, at=(150, [math.nan] * 150))) is None


def test_kill_loss_spike_caps_at_the_first_windows_maximum():
    rule = rules.kill_loss_spike
    # 3.0 is not above the cap of 3.0; the 50th that is 4 completes a half.
    assert rule(flat(400, at=(250, [4.0] * 150))) == 300
    # Not before two windows are over.
    assert rule(flat(400, at=(101, [4.0] * 300))) == 200


def test_spike_detection_needs_three_times_the_last_ten():
    rule = rules.spike_detection
    assert rule(flat(100, at=(50, [8.9]))) is None
    assert rule(flat(100, at=(50, [9.0]))) == 50
    assert rule(flat(100, at=(50, [5.0] * 9 + [13.0]))) is None
    assert rule(flat(100, at=(50, [math.nan]))) == 50
    # The first step is its warm-up; a fall is an improvement, however far.
    assert rule(series([math.nan, 3.0, 3.0])) is None
    assert rule(series([100.0, *[1.0] * 20])) is None


def test_megatron_needs_ten_times_the_first_hundred():
    rule = rules.megatron
    assert rule(flat(300, at=(101, [29.9]))) is None
    assert rule(flat(300, at=(101, [30.0]))) == 101
    assert rule(flat(300, at=(100, [500.0, 500.0]))) is None
    assert rule(flat(300, at=(20, [math.inf]))) == 20


def test_olmo_core_is_six_deviations_above_the_mean():
    rule, wave = rules.olmo_core, np.tile([2.0, 4.0], 150)
    # Mean 3, std 1 (barely more, as n - 1 divides).
    assert rule(series(wave)) is None
    loss = wave.copy()
    loss[199] = 9.0
    assert rule(series(loss)) is None
    loss[199] = 9.1
    assert rule(series(loss)) == 200
    # Below it is no spike, early it is silent.
    for step, value in ((200, -9.1), (63, 99.0)):
        loss = wave.copy()
        loss[step - 1] = value
        assert rule(series(loss)) is None
    norm = wave.copy()
    norm[149] = 99.0
    assert rule(series(wave, norm)) == 150


# The truth.


@pytest.mark.parametrize("onset", [60, 400])
def test_the_onset_of_a_jump_is_its_step(onset):
    assert detection.onset(series(lost(onset))) == onset
    assert detection.label(series(lost(onset)), None) == "diverged"


def test_a_spike_that_comes_back_is_healthy():
    loss = healthy()
    loss[300:330] = 5.0
    assert detection.label(series(loss), 3.1) == "spiked"
    assert detection.label(series(healthy()), 3.1) == "converged"
    assert detection.onset(series(healthy())) is None


def test_the_onset_of_a_nan_is_its_step_or_the_rise_before():
    loss = healthy()
    loss[399:] = math.nan
    assert detection.label(series(loss), None) == "nonfinite"
    assert detection.onset(series(loss)) == 400
    loss[349:399] = 6.0
    assert detection.onset(series(loss)) == 350
    assert detection.onset(series(np.full(200, math.nan))) == 1


def test_norms_count_unless_loss_scaling_skipped_the_step():
    norm = np.ones(700)
    norm[499] = math.inf
    assert detection.label(series(healthy(), norm), None) == "nonfinite"
    assert detection.onset(series(healthy(), norm)) == 500
    run = series(healthy(), norm, skipped=~np.isfinite(norm))
    assert detection.label(run, None) == "converged"
    assert detection.judge(run, 0)["halt"] is None


def test_grey_runs_are_neither_healthy_nor_lost():
    assert detection.label(series(3.1 + NOISE[:700]), 3.0) == "unlearned"
    loss = healthy()
    loss[500:] += 0.4
    assert detection.label(series(loss), 5.0) == "degraded"


# The evaluator.


def logs():
    curves = {
        "a": healthy(),
        "b": healthy(end=2.5),
        "spiked": np.where(np.arange(700) == 500, 6.5, healthy()),
        "jump": lost(400),
        "nan": np.where(np.arange(700) < 599, healthy(), math.nan),
        "chance": 3.1 + NOISE[:700],
    }
    return [
        {
            "name": name,
            "kind": "lm",
            "warmup": 0,
            "chance": 3.0,
            "config": {},
            "made": {"device": "cpu x 1"},
            "series": {
                key: values.astype("float32")
                for key, values in series(loss).items()
            },
        }
        for name, loss in curves.items()
    ]


def test_the_table_of_known_runs(tmp_path, capsys):
    file, out = tmp_path / "logs.npz", tmp_path / "detection.json"
    detection.pack(tmp_path / "first.npz", logs())
    detection.main([str(tmp_path / "first.npz"), "--pack", str(file)])
    result = detection.main([str(file), "--out", str(out)])
    assert json.loads(out.read_text()) == result
    assert result["labels"] == {
        "converged": 2,
        "spiked": 1,
        "diverged": 1,
        "nonfinite": 1,
        "unlearned": 1,
    }
    scores = {score["rule"]: score for score in result["table"]}
    ours = scores["ours: halt"]
    assert (ours["missed"], ours["lost"]) == (0, 2)
    assert (ours["false"], ours["healthy"]) == (0, 3)
    assert ours["bound"] == pytest.approx(1 - 0.05 ** (1 / 3))
    # The jump is above regret 1 no later than 10 + 50 steps after; NaN at once.
    fired = {row["name"]: row["fired"] for row in result["runs"]}
    assert 400 <= fired["jump"]["ours: halt"] <= 460
    assert fired["nan"]["ours: halt"] == 600
    nan = scores["Keras TerminateOnNaN"]
    assert (nan["missed"], nan["delay_median"], nan["lead_median"]) == (1, 0, 0)
    # After the onsets 300 and 100 steps were to be saved.
    assert nan["saved"] == pytest.approx(100 / 400)
    assert fired["jump"]["llm-foundry KillLossSpike"] == 404
    assert scores["Lightning SpikeDetection"]["false"] == 1
    assert scores["OLMo-core 6 sigma (skips)"]["false"] == 1
    printed = capsys.readouterr().out
    assert "6 runs of 1 kinds" in printed
    assert result["devices"] == {"cpu x 1": 6}
    assert "chance (unlearned, 700 steps)" in printed


def test_packed_logs_are_what_was_packed(tmp_path):
    detection.pack(tmp_path / "logs.npz", logs())
    for was, now in zip(logs(), detection.read(tmp_path / "logs.npz")):
        for name, values in was.pop("series").items():
            np.testing.assert_array_equal(now["series"][name], values)
        now.pop("series")
        assert was == now


def test_the_logs_that_are_here_give_the_results_that_are_here():
    results = RECIPES / "results"
    logs = detection.read(results / "detection_logs.npz")
    stored = json.loads((results / "detection.json").read_text())
    assert [log["name"] for log in logs] == [r["name"] for r in stored["runs"]]
    assert detection.replay(logs[::12]) == stored["runs"][::12]
    ours = stored["table"][0]
    assert ours["rule"] == "ours: halt" and ours["false"] == 0
    assert ours["healthy"] >= 20 and ours["lost"] >= 10
    assert len(stored["kinds"]) >= 4


def test_the_bound_is_the_rule_of_three():
    assert detection.upper_bound(0, 60) == pytest.approx(0.0487, abs=1e-4)
    assert detection.upper_bound(1, 20) == pytest.approx(0.2161, abs=1e-4)
    assert detection.upper_bound(3, 3) == 1


def test_no_logs_is_one_clear_sentence(tmp_path):
    with pytest.raises(SystemExit, match="^detection: No run directory in"):
        detection.main([str(tmp_path)])


# The runs.


def test_the_planned_runs():
    runs = detection_runs.planned(seeds=2)
    names = [f"{kind}-{name}" for kind, name, _ in detection_runs.HEALTHY]
    assert len(names) == len(set(names)) >= 20
    lost = [f"{kind}-{name}" for kind, name, _ in detection_runs.LOST]
    assert len(lost) == len(set(lost)) >= 15
    assert len(runs) == 2 * (len(names) + len(lost))
    kinds = {run["kind"] for run in runs.values()}
    assert kinds == set(models.KINDS) and len(kinds) >= 4
    for run in runs.values():
        assert set(detection_runs.DEFAULTS) < set(run)
        assert run["targets"] in models.TARGETS
        changes = (None, "resume", *models.CHANGES)
        assert run["change"] in changes
        ks.get_variant(run["variant"])
        detection_runs.schedule_of(run, keras, ks)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="one is enough")
def test_a_run_from_end_to_end(tmp_path, capsys):
    name = "lost-mlp-nan-weight"
    run = detection_runs.planned(scale="tiny")[name]
    detection_runs.train(name, run, tmp_path)
    (log,) = detection.read(tmp_path)
    assert log["name"] == f"{name}-tiny"
    assert log["made"]["backend"] == "jax" and log["made"]["command"]
    assert log["kind"] == "mlp" and log["chance"] == 1.0
    (row,) = detection.replay([log])
    assert row["label"] == "nonfinite"
    assert row["onset"] == row["fired"]["ours: halt"] == 121
    words = ["--scale", "tiny", "--out", str(tmp_path), "--only", name]
    detection_runs.main(words)
    assert "1 runs, 1 are there already" in capsys.readouterr().out


def test_a_run_is_a_process_and_failures_are_told(tmp_path, capsys):
    runs = ["--out", str(tmp_path), "--scale", "tiny", "--backend", "numpy"]
    with pytest.raises(SystemExit):
        detection_runs.main([*runs, "--only", "lost-mlp-nan"])
    printed = capsys.readouterr().out
    assert "lost-mlp-nan-weight: failed: " in printed
    assert "1 failed, 0 were not finished" in printed
    assert not list(tmp_path.glob("*/run.json"))


def test_it_needs_no_backend_chosen(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("KERAS_BACKEND", None)
    detection.pack(tmp_path / "logs.npz", logs())
    script, out = RECIPES / "detection.py", tmp_path / "detection.json"
    words = [script, tmp_path / "logs.npz", "--out", out]
    subprocess.run([sys.executable, *words], env=environment, check=True)
    assert json.loads(out.read_text())["kinds"] == {"lm": 6}
