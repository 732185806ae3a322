"""Run directories as outcomes: what is read, how it is scored, what is wrong.

Directories are written here by hand; the last tests read one of the monitor's.
"""

import json
import math
import warnings

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable.health import HealthWriter
from keras_stable.records import write_json

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="no backend takes part"
)
STEPS = 200
LAYERS = [
    f"block_{i}/{layer}"
    for i in range(2)
    for layer in (
        *("attention/query", "attention/key", "attention/value"),
        *("attention/output", "mlp/fc1", "mlp/fc2"),
    )
]
CONFIG = {
    **{"variant": "baseline", "label": "a", "seed": 0, "steps": STEPS},
    **{"batch_size": 4, "sequence_length": 32, "data": ["python"]},
    **{"tokenizer": "byte", "weight_decay": 0.1},
}
VERSIONS = {"python": "3.11.7", "keras": "3.15.1", "numpy": "2.4", "jax": "1"}


def falling(final=2.0, steps=STEPS):
    return final + 3.5 * np.exp(-np.arange(steps) / 20)


def diverging(steps=STEPS):
    losses = falling(steps=steps)
    losses[steps // 2 :] += np.linspace(0, 3, steps - steps // 2)
    return losses


def make_run(
    sweep,
    rate,
    seed=0,
    losses=None,
    norms=None,
    record=None,
    entropies=lambda step: (0.2, 0.4),
    **config,
):
    """Writes a run directory as `pretrain.py` does; its path."""
    config = {**CONFIG, "learning_rate": rate, "seed": seed, **config}
    path = sweep / f"{config['label']}/lr-{rate:g}/seed-{seed}"
    losses = falling() if losses is None else losses
    path.mkdir(parents=True)
    found = {
        **{"schema": 2, "status": "finished", "config": config},
        **{"backend": "jax", "versions": VERSIONS, "verdict": "OK"},
        "corpus": {"unigram_entropy": 3.2, "training_tokens": 1000},
        "validation_loss": float(losses[-1]),
        "validation_batch_losses": [1.5, 2.5],
        "steps_done": len(losses),
        **(record or {}),
    }
    write_json(path / "run.json", found)
    writer = HealthWriter(path)
    writer.write(
        "layout",
        schema=2,
        tensors=LAYERS,
        heads={"block_0/attention": 2},
        variables=[],
        tensor_statistics=["l2", "rms"],
        head_statistics=["max_logit", "max_logit_capped", "entropy"],
        variable_statistics=["gradient_rms"],
    )
    norms = np.ones(len(losses)) if norms is None else norms
    for i, (loss, norm) in enumerate(zip(losses, norms)):
        step = {"step": i + 1, "loss": float(loss), "max_logit": i / 10}
        writer.write("step", **step, gradient_norm=float(norm))
        if i % 50 == 0:
            tensors = np.arange(24.0) + i + 1
            heads = [np.array([[1.0, 2], [1, 2], entropies(i + 1)])]
            writer.write(
                "table", step=i + 1, tensors=tensors, heads=heads, variables=[]
            )
    writer.close()
    return path


def read(path, **kwargs):
    """Outcomes of directories with which nothing is wrong."""
    problems = []
    found = ks.read_outcomes(path, problems=problems, **kwargs)
    assert problems == []
    return found


def endings(path, **kwargs):
    found = read(path, **kwargs)
    return {(o.learning_rate, o.seed): o.ending for o in found}


def test_what_is_read(tmp_path):
    path = make_run(tmp_path, 3e-3, seed=2)
    (found,) = read(tmp_path)
    assert (found.label, found.learning_rate, found.seed) == ("a", 3e-3, 2)
    assert found.ending == "converged" and found.stable
    assert found.loss == float(falling()[-1])
    assert found.initial == 5.5
    assert found.steps == found.steps_done == STEPS
    assert found.tokens_per_step == 128
    assert found.batch_losses == (1.5, 2.5)
    assert found.max_logit == 19.9
    assert math.isnan(found.spike_score_paper)  # Shorter than its window.
    assert found.spike_score_olmo_core == 0.0
    assert found.verdict == "OK" and found.path == str(path)
    assert found.entropy == pytest.approx(0.3) and found.collapsed == 0.0
    np.testing.assert_array_equal(ks.read_losses(path), falling())
    # A run by itself, and one without a label.
    other = make_run(tmp_path / "x", 1e-2, label=None, variant="soft_cap")
    assert [o.label for o in read(other)] == ["soft_cap"]
    value = ks.get_variant("qk_norm").replace(name="mine").to_dict()
    other = make_run(tmp_path / "y", 1e-2, label=None, variant=value)
    assert [o.label for o in read(other)] == ["mine"]


def test_endings_are_those_of_the_criterion(tmp_path):
    spiked = falling()
    spiked[150] += 1.0
    bad = falling()
    bad[20] = math.nan
    nan_gradient = np.ones(STEPS)
    nan_gradient[7] = math.inf
    make_run(tmp_path, 1e-3)
    make_run(tmp_path, 2e-3, losses=spiked)
    record = {"validation_loss": 2.4}
    make_run(tmp_path, 3e-3, losses=diverging(), record=record)
    make_run(tmp_path, 4e-3, losses=bad)
    make_run(tmp_path, 5e-3, record={"validation_loss": "nan"})
    make_run(tmp_path, 6e-3, norms=nan_gradient)
    # Above what counting reaches.
    make_run(tmp_path, 7e-3, record={"validation_loss": 3.3})
    assert endings(tmp_path) == {
        (1e-3, 0): "converged",
        (2e-3, 0): "spiked",
        (3e-3, 0): "diverged",
        (4e-3, 0): "nonfinite",
        (5e-3, 0): "nonfinite",
        (6e-3, 0): "nonfinite",
        (7e-3, 0): "diverged",
    }
    # Scored anew, of the same files.
    mild = ks.Thresholds(rise=5.0)
    assert endings(tmp_path, thresholds=mild)[3e-3, 0] == "degraded"
    found = ks.stability_interval(read(tmp_path))
    assert (found.low, found.high) == (2e-3, 3e-3)


def test_attention_on_single_keys_is_no_stable_ending(tmp_path):
    make_run(tmp_path, 1e-3, entropies=lambda step: (0.005, 0.5))
    # Came back, and did not.
    make_run(tmp_path, 2e-3, entropies=lambda step: (0.0, 0.02 * (step > 150)))
    make_run(tmp_path, 3e-3, entropies=lambda step: (0.009, 0.0099))
    record = {"status": "diverged", "verdict": "COLLAPSED", "steps_done": 150}
    how = {"losses": falling(steps=150), "record": record}
    make_run(tmp_path, 4e-3, entropies=lambda step: (0.0, 0.0), **how)
    make_run(
        tmp_path, 5e-3, losses=diverging(), entropies=lambda step: (0.0, 0.0)
    )
    # Ended for logits far beyond a cap.
    make_run(tmp_path, 6e-3, entropies=lambda step: (0.9, 0.9), **how)
    found = endings(tmp_path)
    assert found == {
        (1e-3, 0): "converged",
        (2e-3, 0): "converged",
        (3e-3, 0): "collapsed",
        (4e-3, 0): "collapsed",
        (5e-3, 0): "diverged",
        (6e-3, 0): "diverged",
    }
    assert [o.collapsed for o in read(tmp_path)] == [0.5, 0.5, 1, 1, 1, 0]
    interval = ks.stability_interval(read(tmp_path))
    assert (interval.low, interval.high) == (2e-3, 3e-3)


def test_a_run_that_the_monitor_ended_is_not_stable(tmp_path):
    # Its curve alone would do.
    short = falling(steps=120)
    record = {"status": "diverged", "validation_loss": 2.1}
    make_run(tmp_path, 1e-3, losses=short, record=record)
    # With policy "observe" it went on, and came back.
    make_run(tmp_path, 2e-3, record={"status": "diverged"})
    assert endings(tmp_path) == {
        (1e-3, 0): "diverged",
        (2e-3, 0): "converged",
    }


def test_degraded_is_above_the_best_rate_alone(tmp_path):
    for rate, loss in ((1e-3, 2.6), (3e-3, 2.0), (1e-2, 2.2), (3e-2, 2.3)):
        make_run(tmp_path, rate, losses=falling(loss))
    assert endings(tmp_path) == {
        (1e-3, 0): "converged",  # Slow, and not unstable.
        (3e-3, 0): "converged",
        (1e-2, 0): "converged",
        (3e-2, 0): "degraded",
    }
    strict = ks.Thresholds(gap=0.1)
    assert endings(tmp_path, thresholds=strict)[1e-2, 0] == "degraded"
    # A seed that was run near the edge alone is compared with the others;
    # one that was run at the best rate with itself.
    make_run(tmp_path, 3e-2, seed=1, losses=falling(2.3))
    make_run(tmp_path, 3e-2, seed=2, losses=falling(2.3))
    make_run(tmp_path, 3e-3, seed=2, losses=falling(2.1))
    found = endings(tmp_path)
    assert found[3e-2, 1] == "degraded" and found[3e-2, 2] == "converged"
    # Another label has its own best.
    make_run(tmp_path, 3e-2, label="b", losses=falling(2.6))
    assert len([e for e in read(tmp_path) if e.ending == "degraded"]) == 2


def test_degrade_leaves_what_was_lost_alone():
    outcomes = [
        ks.Outcome("a", 1e-3, 0, "converged", loss=2.0),
        ks.Outcome("a", 2e-3, 0, "spiked", loss=2.3),
        ks.Outcome("a", 3e-3, 0, "diverged", loss=2.9),
        ks.Outcome("a", 4e-3, 0, "nonfinite"),
        ks.Outcome("a", 5e-3, 0, "failed"),
    ]
    found = [o.ending for o in ks.degrade(outcomes)]
    assert found == [
        *("converged", "degraded", "diverged", "nonfinite", "failed"),
    ]
    assert ks.degrade([]) == [] and ks.degrade(outcomes[3:]) == outcomes[3:]


def test_runs_that_go_on_are_no_outcomes_and_failures_are(tmp_path):
    for status in ("running", "interrupted"):
        make_run(tmp_path, 1e-3, label=status, record={"status": status})
    assert read(tmp_path) == []
    # It failed in the end: before `run.json`, and after.
    early = tmp_path / "b/lr-0.002/seed-1"
    early.mkdir(parents=True)
    late = make_run(tmp_path, 4e-3, label="b", record={"status": "running"})
    done = make_run(tmp_path, 8e-3, label="b")
    for path in (early, late, done):
        write_json(path / "failure.json", {"attempts": 2, "exit_code": 1})
    assert endings(tmp_path) == {
        (2e-3, 1): "failed",
        (4e-3, 0): "failed",
        (8e-3, 0): "converged",  # It has a result since.
    }
    # Outside of a sweep, its run.json says which run it is.
    alone = tmp_path / "alone"
    late.rename(alone)
    (found,) = read(alone)
    assert (found.label, found.learning_rate, found.steps) == ("b", 4e-3, 200)


def test_a_finished_run_is_seen_as_soon_as_it_is_written(tmp_path):
    path = make_run(tmp_path, 1e-3, record={"status": "running"})
    assert read(tmp_path) == []
    record = ks.read_run(path)
    write_json(path / "run.json", {**record, "status": "finished"})
    assert [o.ending for o in read(tmp_path)] == ["converged"]


def test_directories_that_cannot_be_read_are_listed(tmp_path):
    make_run(tmp_path, 1e-3)
    torn = make_run(tmp_path, 2e-3)
    (torn / "run.json").write_text('{"status": "fini')
    foreign = make_run(tmp_path, 3e-3)
    (foreign / "run.json").write_text('{"run": "theirs"}')
    odd = make_run(tmp_path, 4e-3, record={"status": "pending"})
    rate = make_run(tmp_path, 5e-3)
    record = ks.read_run(rate)
    record["config"]["learning_rate"] = None
    write_json(rate / "run.json", record)
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "failure.json").write_text("{}")
    problems = []
    found = ks.read_outcomes(tmp_path, problems=problems)
    assert [o.learning_rate for o in found] == [1e-3]
    for path, why in (
        (torn, "is not JSON"),
        (foreign, "no record of pretrain.py"),
        (odd, "status is 'pending'"),
        (rate, "must be a positive number"),
        (lost, "does not say of which run"),
    ):
        (problem,) = (p for p in problems if p.startswith(f"{path} is left"))
        assert why in problem
    assert len(problems) == 5
    with pytest.warns(UserWarning, match="is left out"):
        ks.read_outcomes(torn)
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        ks.read_outcomes([tmp_path, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    assert read(tmp_path / "empty") == []


def test_whatever_a_record_holds_it_is_listed_or_read(tmp_path):
    path = make_run(tmp_path, 1e-3)
    record = ks.read_run(path)
    wrong = (None, 5, "x", [1, [2]], {"a": 1}, -1, 1e400, True)
    keys = [(key, None) for key in record]
    keys += [("config", key) for key in record["config"]]
    for key, inner in keys:
        for value in wrong:
            damaged = json.loads(json.dumps(record))
            if inner is None:
                damaged[key] = value
            else:
                damaged[key][inner] = value
            write_json(path / "run.json", damaged)
            problems = []
            found = ks.read_outcomes(tmp_path, problems=problems)
            still = damaged["status"] in ("running", "interrupted")
            assert len(found) + len(problems) >= 1 or still, (key, inner)


def test_without_curves_a_run_is_judged_by_its_record(tmp_path):
    for rate, record in (
        (1e-3, {}),
        (2e-3, {"status": "diverged"}),
        (3e-3, {"validation_loss": "inf"}),
    ):
        path = make_run(tmp_path, rate, record=record)
        (path / "health.jsonl").unlink()
    path = make_run(tmp_path, 4e-3)
    (path / "health.jsonl").write_text("theirs\n")
    problems = []
    found = ks.read_outcomes(tmp_path, problems=problems)
    assert [o.ending for o in found] == [
        *("converged", "diverged", "nonfinite", "converged"),
    ]
    assert len(problems) == 4
    assert all("by its run.json alone" in problem for problem in problems)


def test_curves_that_were_cut_off_are_told(tmp_path):
    record = {"steps_done": 200}
    make_run(tmp_path, 1e-3, losses=falling(steps=90), record=record)
    problems = []
    (found,) = ks.read_outcomes(tmp_path, problems=problems)
    assert found.steps_done == 200
    (problem,) = problems
    assert "the curves of 90 steps alone, of 200" in problem


def test_two_of_one_run_and_two_settings_in_one_arm_are_refused(tmp_path):
    make_run(tmp_path / "one", 1e-3)
    make_run(tmp_path / "two", 1e-3)
    with pytest.raises(ValueError, match="Two runs of 'a'.*seed 0.*one.*two"):
        ks.read_outcomes([tmp_path / "one", tmp_path / "two"])
    assert len(read(tmp_path / "one")) == 1
    # The same directory by two paths is one.
    assert len(read([tmp_path / "one", tmp_path / "one" / "a"])) == 1
    make_run(tmp_path / "one", 2e-3, steps=400)
    with pytest.raises(ValueError, match="steps is 200 there and 400 here"):
        ks.read_outcomes(tmp_path / "one")
    make_run(tmp_path / "three", 1e-3, policy="halt", every="10", extra=1)
    # A name and its dictionary are one variant; some flags change nothing.
    value = ks.get_variant("baseline").to_dict()
    make_run(tmp_path / "three", 2e-3, variant=value, policy="observe")
    assert len(read(tmp_path / "three")) == 2
    make_run(tmp_path / "three", 3e-3, variant="qk_norm")
    with pytest.raises(ValueError, match="'a' have different settings.*vari"):
        ks.read_outcomes(tmp_path / "three")


def test_mixtures_are_told(tmp_path):
    make_run(tmp_path, 1e-3)
    other = {"versions": {**VERSIONS, "keras": "3.16.0", "torch": "2.13"}}
    make_run(tmp_path, 2e-3, record=other)
    make_run(tmp_path, 1e-3, label="b", steps=400, batch_size=8)
    corpus = {"unigram_entropy": 3.2, "training_tokens": 999}
    make_run(tmp_path, 2e-3, label="c", record={"corpus": corpus})
    problems = []
    found = ks.read_outcomes(tmp_path, problems=problems)
    assert len(found) == 4
    assert problems == [
        "The runs are of mixed versions: keras is 3.15.1 (3 runs), 3.16.0 "
        "(1 runs).",
        "The arms differ in steps: 200 in a, c; 400 in b.",
        "The arms differ in batch size: 4 in a, c; 8 in b.",
        "The arms differ in training tokens: 1000 in a, b; 999 in c.",
    ]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ks.read_outcomes(tmp_path)
    assert [str(warning.message) for warning in told] == problems


# Growth.


def health_of(tables):
    layout = {"tensors": LAYERS, "tensor_statistics": ["l2", "rms"]}
    tables = {
        step: {"tensors": np.stack([values, 0 * values], axis=1)}
        for step, values in tables.items()
    }
    return ks.Health(layout, [], tables, [], [], [], [])


def test_growth_by_hand():
    # Query, key, value, output, fc1, fc2 of two blocks.
    ones = np.array([2.0, 3, 6, 1, 1, 4, 2, 3, 6, 1, 1, 1])
    run = health_of({1: ones, 100: np.array([*(4.0, 6, 12, 3, 1, 2)] * 2)})
    reference = health_of({1: 0 * ones, 60: ones, 90: ones, 400: 9 * ones})
    step, norms = ks.output_norms(run)
    assert step == 100 and norms["qkv"].tolist() == [14.0, 14.0]
    found = ks.output_growth(run, reference)
    assert (found.step, found.reference_step) == (100, 90)
    assert {k: v.tolist() for k, v in found.ratios.items()} == {
        "qkv": [2.0, 2.0],
        "proj": [3.0, 3.0],
        "fc1": [1.0, 1.0],
        "fc2": [0.5, 2.0],
    }
    assert found.largest()["fc2"] == 2.0 and found.middle()["fc2"] == 1.25
    # Nothing was put out there: no failure, infinity.
    found = ks.output_growth(run, reference, step=1)
    assert (found.step, found.reference_step) == (1, 1)
    assert np.isinf(found.ratios["qkv"]).all()


def test_growth_refuses_what_it_cannot_compare():
    run = health_of({1: np.ones(12)})
    with pytest.raises(ValueError, match="No tables.*--every"):
        ks.output_growth(run, health_of({}))
    with pytest.raises(ValueError, match="Unknown statistic"):
        ks.output_norms(run, statistic="l3")
    short = health_of({1: np.ones(6)})
    short.layout["tensors"] = LAYERS[:6]
    with pytest.raises(ValueError, match="different depth.*2 and 1 blocks"):
        ks.output_growth(run, short)
    short.layout["tensors"] = ["conv_1", *LAYERS[1:6]]
    with pytest.raises(ValueError, match="Received a record of conv_1"):
        ks.output_norms(short)


def test_the_reference_is_the_same_seed_at_a_tenth():
    def outcome(rate, seed=0, label="a", ending="converged"):
        return ks.Outcome(label, rate, seed, ending)

    run = outcome(8e-2, ending="diverged")
    right = outcome(8e-3)
    others = [
        *(outcome(8e-3, seed=1), outcome(8e-3, label="b")),
        *(outcome(6e-3), outcome(2e-2), run),
    ]
    assert ks.reference_of(run, [*others, right]) is right
    # A ladder without a tenth: what is near enough, or nothing.
    assert ks.reference_of(run, others) == outcome(6e-3)
    assert ks.reference_of(run, others, within=1.2) is None
    lost = outcome(8e-3, ending="diverged")
    assert ks.reference_of(run, [lost]) is None


# What the monitor writes.


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "run"
    keras.utils.set_random_seed(0)
    lm = ks.StableCausalLM(ks.StableBackbone(16, 2, 2, 8, seed=0))
    lm.compile(ks.AdamW(1e-2))
    x = np.tile(np.arange(8), (4, 1)).astype("int32")
    x = {"token_ids": x, "padding_mask": np.ones_like(x)}
    config = {**CONFIG, "learning_rate": 1e-2, "steps": 6}
    run = ks.RunDirectory(path, config)
    monitor = ks.StabilityMonitor(path, every=2, verbose=0)
    y = x["token_ids"]
    how = {"batch_size": 4, "epochs": 6, "verbose": 0}
    lm.fit(x, y, callbacks=[monitor], **how)
    run.update(status="finished", validation_loss=1.0, steps_done=6)
    return path


def test_a_real_record_is_read(recorded):
    (found,) = read(recorded)
    health = ks.read_health(recorded)
    assert found.steps_done == 6 and found.initial == health.steps[0]["loss"]
    assert len(ks.read_losses(recorded)) == 6
    assert found.max_logit == max(row["max_logit"] for row in health.steps)
    assert 0.9 < found.entropy <= 1.0 and found.collapsed == 0.0
    # Tables are what takes long: left out, all else is the same.
    light = ks.read_health(recorded, tables=False)
    assert light.tables == {} and light.steps == health.steps
    last = ks.read_health(recorded, tables="last")
    assert max(last.tables) == max(health.tables) and len(last.tables) == 2
    step = max(health.tables)
    for a, b in zip(last.tables[step]["heads"], health.tables[step]["heads"]):
        np.testing.assert_array_equal(a, b)


def test_norms_of_a_real_record_are_those_of_its_tables(recorded):
    health = ks.read_health(recorded)
    step, norms = ks.output_norms(recorded, step=4)
    steps, values = health.table("tensors", "block_1/attention/output", "l2")
    row = steps.tolist().index(step)
    assert abs(step - 4) == np.abs(steps - 4).min()
    assert norms["proj"][1] == values[row]
    parts = [
        health.table("tensors", f"block_0/attention/{name}", "l2")[1][row]
        for name in ("query", "key", "value")
    ]
    assert norms["qkv"][0] == pytest.approx(np.linalg.norm(parts))
    same = ks.output_growth(recorded, health)
    assert all((ratio == 1).all() for ratio in same.ratios.values())


def test_json_of_an_outcome(tmp_path):
    # Reports write them out: plain values only.
    make_run(tmp_path, 1e-3)
    (found,) = read(tmp_path)
    assert json.loads(json.dumps(vars(found)))["label"] == "a"
