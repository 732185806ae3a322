"""The table of lost runs of sweeps: its labels, its replay, its numbers."""

import json
import math
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
            record={
                "validation_loss": float(losses[-1]),
                "started": f"2026-01-0{1 + (label == 'slow')}T00:00:00+00:00",
            },
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


def test_what_was_started_later_is_new_too(tmp_path):
    out = tmp_path / "result.json"
    path, until = sweep(tmp_path / "edge"), "2026-01-01T12"
    detection_sweeps.main([str(path), "--until", until, "--out", str(out)])
    result = json.loads(out.read_text())
    assert (result["chosen on"]["runs"], result["new"]["runs"]) == (4, 2)
    # Judged beside the whole sweep, and none of them ended by the monitor.
    assert result["new"]["degraded"] == 1 and result["new"]["ended"] == 0
    behind = [row["behind"] for row in result["new"]["rows"]]
    assert np.allclose(behind, (0.1, 0.4), atol=0.03)


def test_what_was_started_last_is_by_itself(tmp_path):
    out = tmp_path / "result.json"
    path, later = str(sweep(tmp_path / "edge")), "2026-01-01T12"
    how = ["--until", "2025", "--new", path, "--later", later]
    detection_sweeps.main([path, *how, "--out", str(out)])
    result = json.loads(out.read_text())
    assert "chosen on" not in result
    assert (result["new"]["runs"], result["later"]["runs"]) == (8, 4)


def test_bad_input_is_one_clear_sentence(tmp_path):
    with pytest.raises(SystemExit, match="detection_sweeps: "):
        detection_sweeps.main([str(tmp_path / "nowhere")])


def test_the_tables_in_the_text_are_the_committed_ones():
    result = json.loads((RECIPES / "results/detection_sweeps.json").read_text())
    text = (RECIPES / "README.md").read_text()
    names = ("chosen on", "new", "later")
    for name in names:
        table = detection.table(result[name]["table"])
        assert table in text, f"The table {name!r} is stale."
        degraded = result[name]["degraded"]
        runs = f"{result[name]['runs']} runs, {degraded} degraded"
        assert runs in text
    text = " ".join(text.split())
    ours = [result[name]["table"][0] for name in names]
    false, healthy = (sum(o[k] for o in ours) for k in ("false", "healthy"))
    bound = detection.upper_bound(false, healthy)
    assert f"{false} of {healthy} healthy runs is stopped" in text
    assert f"(at most {bound:.1%} of such" in text
    lost = sum(o["lost"] for o in ours)
    stopped = lost - sum(o["missed"] for o in ours)
    assert f"{stopped} of {lost} lost ones" in text
    steps = sum(result[name]["healthy_steps"] for name in names)
    assert f"no loss spike is found in {steps} healthy steps" in text
    assert not any(result[n]["spikes_in_10000_healthy_steps"] for n in names)
    rows = [r for r in result["later"]["rows"] if r["label"] == "diverged"]
    assert f"Of the {len(rows)} lost ones of the last table" in text
    assert all(row["ended"] == bool(row["verdict"]) for row in rows)
    # What was ended as it was recorded, and where it stood then.
    rows = result["new"]["rows"]
    ended = [row for row in rows if row["ended"]]
    assert f"{len(ended)} of the new runs were ended" in text
    far = sum(row["behind"] > 0.5 for row in ended)
    assert f"{far} of them were over 0.5 behind" in text
    assert all(row["behind"] > 0.25 for row in ended)
    rows = [r for r in rows if r["label"] == "diverged" and not r["ended"]]
    halts = [row["fired"]["ours: halt"] is not None for row in rows]
    assert f"the {len(rows)} lost runs that went on" in text
    assert f"stops {sum(halts)}." in text


def test_what_is_said_of_caps_is_in_the_file():
    result = json.loads((RECIPES / "results/detection_sweeps.json").read_text())
    text = " ".join((RECIPES / "README.md").read_text().split())
    chosen, held = list(result["chosen on"]["rows"]), []
    arms = {}
    for row in result["new"]["rows"]:
        sweep, arm, *_ = row["name"].split("/")
        known = arms.setdefault(sweep, {})
        place = known.setdefault(arm, len(known))
        # Of `paper-lr` only what was started late is among them.
        odd = place % 2 == 1 or sweep == "paper-lr"
        (held if odd else chosen).append(row)

    def caps(rows, label):
        found = sorted(r["caps"] for r in rows if r["label"] == label)
        return [x for x in found if x > 1]

    def stopped(rows, label):
        return [r for r in rows if r["label"] == label and r["verdict"]]

    first, second = caps(chosen, "converged"), caps(held, "converged")
    assert f"of {len(first)} healthy runs with a cap stays" in text
    assert f"within {math.ceil(10 * first[-1]) / 10} caps" in text
    degraded = caps(chosen, "degraded")
    assert f"of {len(degraded)} degraded ones within" in text
    assert f"within {math.ceil(degraded[-1])}, and" in text
    lost = caps(chosen, "diverged")
    assert f"the {len(lost)} lost ones pass 430" in text and lost[0] > 430
    assert f"other half, {len(held)} runs" in text
    # One is lost since lower rates were run, and is not found.
    beside, *lost = caps(held, "diverged")
    assert f"finds {len(lost)} of {1 + len(lost)} that were missed" in text
    assert f"stays within {math.ceil(beside)} caps" in text
    healthy = [row for row in held if row["label"] == "converged"]
    assert f"none of {len(healthy)} healthy runs is stopped" in text
    assert stopped(held, "converged") == []
    behind = [f"{r['behind']:.2f}" for r in stopped(held, "degraded")]
    assert behind == ["0.57", "0.58"] and " and ".join(behind) in text
    assert f"{len(second)} healthy ones with a cap stay" in text
    assert f"within {math.ceil(second[-1])} caps" in text
    assert "lost ones that are found pass 158" in text and lost[0] > 158
    delays = [
        row["fired"]["ours: halt"] - row["onset"]
        for row in stopped(held, "diverged")
        if row["caps"] > 1
    ]
    assert len(delays) == len(lost)
    assert f"{np.median(delays):.0f} steps after the onset" in text
    missed = [
        row["name"]
        for row in [*chosen, *held]
        if row["label"] == "diverged" and not row["verdict"]
    ]
    assert f"Of the {len(missed)} that are missed" in text
    assert not any("cap=" in n and "inf" not in n for n in missed)


def test_what_is_said_of_runs_with_the_rule_at_work_is_in_the_file():
    result = json.loads((RECIPES / "results/detection_cap.json").read_text())
    text = " ".join((RECIPES / "README.md").read_text().split())
    rows = [row for row in result["new"]["rows"] if row["caps"] > 1]
    healthy, degraded, lost = (
        [row for row in rows if row["label"] == label]
        for label in ("converged", "degraded", "diverged")
    )
    ended = [row for row in rows if row["ended"]]
    assert ended == [row for row in lost if row["verdict"] == "COLLAPSED"]
    assert f"Of {len(lost)} lost runs with a cap it ended {len(ended)}," in text
    halts = [row["fired"]["ours: halt"] for row in ended]
    assert f"at steps {min(halts)} to {max(halts)} of 400" in text
    delays = [halt - row["onset"] for halt, row in zip(halts, ended)]
    assert f"{np.median(delays):.0f} after the onset in the median" in text
    behind = [row["behind"] for row in ended]
    assert f"{min(behind):.2f} to {max(behind):.2f} behind" in text
    kinds = (healthy, degraded)
    most = [math.ceil(max(row["caps"] for row in kind)) for kind in kinds]
    found = f"Of {len(healthy)} healthy ones with a cap, within {most[0]} caps"
    assert found in text
    assert f"and {len(degraded)} degraded ones, within {most[1]}," in text
    (missed,) = (row for row in lost if not row["ended"])
    assert f"at most {math.ceil(missed['caps'])} caps" in text
    assert f"{missed['behind']:.2f} behind at the end" in text
    assert missed["name"] == "cap-again/cap=5/lr-0.02/seed-3"


def test_what_is_said_of_the_sweep_of_clips_is_in_its_file():
    result = json.loads((RECIPES / "results/detection_clip.json").read_text())
    text = " ".join((RECIPES / "README.md").read_text().split())
    rows = result["new"]["rows"]
    healthy, degraded, lost = (
        [row for row in rows if row["label"] == label]
        for label in ("converged", "degraded", "diverged")
    )
    ended = [row for row in lost if row["ended"]]
    delays = [row["fired"]["ours: halt"] - row["onset"] for row in ended]
    stopped = sorted(row["behind"] for row in degraded if row["ended"])
    assert not any(row["ended"] for row in healthy)
    found = (
        f"it ended {len(ended)} of {len(lost)} lost ones, "
        f"{np.median(delays):.0f} steps after the onset in the median, none of "
        f"{len(healthy)} healthy ones, and {len(stopped)} of {len(degraded)} "
        f"degraded ones, {stopped[0]:.2f} and {stopped[1]:.2f} behind."
    )
    assert found in text
    assert {row["name"].split("/")[2] for row in lost if not row["ended"]} == {
        "lr-0.02"
    }
    fired = {
        rule: [
            sum(row["fired"][rule] is not None for row in kind)
            for kind in (lost, healthy)
        ]
        for rule in rows[0]["fired"]
    }
    # Of the tools; the largest logit is ours to compare with.
    for rule in ("ours: halt", "largest logit over 1000"):
        del fired[rule]
    stops = fired.pop("OLMo-core 6 sigma (skips)")
    assert f"stops {stops[0]} of the lost and {stops[1]} of the healthy" in text
    assert set(map(tuple, fired.values())) == {(0, 0)}
