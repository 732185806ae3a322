"""The table of lost runs of sweeps: its labels, its replay, its numbers."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from test_outcomes import falling
from test_outcomes import make_run

import keras_stable as ks

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.append(str(RECIPES))
import detection  # noqa: E402
import detection_sweeps  # noqa: E402

STEPS = 400

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Reads files: the same on all backends.",
)


def sweep(path):
    """Good, stuck since step 100 with collapsed attention, and slow."""
    arms = [ks.Arm(name, "baseline") for name in ("good", "stuck", "slow")]
    flags = {"steps": STEPS, "warmup_steps": 20}
    ks.Sweep(path, arms, ks.Ladder((1e-3, 1e-2)), flags=flags)
    good = falling(2.0, STEPS)
    stuck = np.where(np.arange(STEPS) < 100, good, good[100] + 0.9)
    runs = (
        *(("good", 1e-3, good, 0.5), ("good", 1e-2, good + 0.01, 0.5)),
        *(("stuck", 1e-3, good, 0.5), ("stuck", 1e-2, stuck, 0.001)),
        *(("slow", 1e-3, good + 0.1, 0.5), ("slow", 1e-2, good + 0.4, 0.5)),
    )
    rng = np.random.default_rng(0)
    for label, rate, losses, entropy in runs:
        make_run(
            path,
            rate,
            losses=losses + 0.02 * rng.normal(size=STEPS),
            label=label,
            record={"validation_loss": float(losses[-1])},
            entropies=lambda step, e=entropy: (e, e if step > 100 else 0.5),
            steps=STEPS,
        )
        file = path / f"{label}/lr-{rate:g}/seed-0/health.jsonl"
        text = file.read_text().replace(
            '"gradient_norm"', '"update_norm": 1.0, "gradient_norm"'
        )
        file.write_text(text)
    return path


def test_what_became_of_runs_and_when_rules_fire(tmp_path, capsys):
    path = sweep(tmp_path / "edge")
    out = tmp_path / "result.json"
    detection_sweeps.main([str(path), "--new", str(path), "--out", str(out)])
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["chosen on"]["rows"]}
    assert [row["label"] for row in rows.values()] == [
        *("converged", "converged", "converged", "diverged"),
        *("converged", "degraded"),
    ]
    lost = rows["edge/stuck/lr-0.01/seed-0"]
    # The middle of 21 losses is the new level ten steps before or after.
    assert abs(lost["onset"] - 101) <= 10
    # Tables at 101, 151, 201: seen at 101, lasting at 201, said at 202. The
    # loss alone is found at once: it gives back what was gained.
    assert lost["verdict"] == "COLLAPSED" and lost["fired"]["ours: halt"] == 202
    assert lost["fired"]["Keras TerminateOnNaN"] is None
    ours = result["new"]["table"][0]
    assert (ours["rule"], ours["missed"], ours["lost"]) == ("ours: halt", 0, 1)
    assert (ours["false"], ours["healthy"]) == (0, 4)
    assert result["chosen on"]["degraded"] == 1
    assert "6 runs, 1 degraded" in capsys.readouterr().out


def test_bad_input_is_one_clear_sentence(tmp_path):
    with pytest.raises(SystemExit, match="detection_sweeps: "):
        detection_sweeps.main([str(tmp_path / "nowhere")])


def test_the_tables_in_the_text_are_the_committed_ones():
    result = json.loads((RECIPES / "results/detection_sweeps.json").read_text())
    text = (RECIPES / "README.md").read_text()
    for name in ("chosen on", "new"):
        table = detection.table(result[name]["table"])
        assert table in text, f"The table {name!r} is stale."
        runs = f"{result[name]['runs']} runs"
        assert runs in text
