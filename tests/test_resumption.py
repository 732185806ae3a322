"""Training that stops, by whatever cause, goes on as if it had not."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import snapshots
from keras_stable.backend import saving

BACKEND = keras.backend.backend()
RECIPES = Path(__file__).parents[1] / "recipes"
TOKENS = np.random.default_rng(0).integers(0, 31, 600)


def values(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def at(step, action):
    """A callback that does something before a step, counted from 0."""
    return keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: (
            action() if batch == step else None
        )
    )


def tiny(rate=0.01, units=4):
    keras.utils.set_random_seed(3)
    x = keras.Input((3,))
    hidden = keras.layers.Dense(units, name="hidden")(x)
    model = keras.Model(x, keras.layers.Dense(2, name="out")(hidden))
    model.compile(keras.optimizers.Adam(rate, beta_1=0.8), "mse")
    return model


def fit(model, *callbacks, batches=8, **kwargs):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4 * batches, 3)), rng.normal(size=(4 * batches, 2))
    kwargs = {"verbose": 0, "shuffle": False, "batch_size": 4, **kwargs}
    model.fit(x, y, callbacks=list(callbacks), **kwargs)


def complete(directory):
    every = snapshots.steps(directory)
    return [s for s in every if snapshots.is_sealed(directory, s)]


def nothing_left():
    """Whether signals do what they did before any training."""
    return (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )


# It goes on.


def train(path, steps, seed, distribution="none", every=3, dropout=0.1):
    """A language model up to a step, from the newest checkpoint if any."""
    keras.utils.set_random_seed(seed)
    if distribution != "none":
        import jax

        two = 2 if "tensor" in distribution else None
        ks.set_distribution(distribution, 4, two, jax.devices()[:4])
    data = ks.TokenBatches(TOKENS, 4, 8, vocabulary_size=32)
    backbone = ks.StableBackbone(
        32, 1, 2, 16, variant="sigma_reparam", dropout=dropout
    )
    lm = ks.StableCausalLM(backbone)
    lm.compile(ks.AdamW(ks.WarmupSchedule(1e-2, 12)))
    monitor = ks.StabilityMonitor(path, every=every, verbose=0)
    checkpoints = ks.Checkpoints(
        path / "checkpoints", every=5, data=data, monitor=monitor
    )
    begin = checkpoints.restore(lm)
    batches = data.repeat()[: steps - begin]
    lm.fit(batches, callbacks=[monitor, checkpoints], verbose=0)
    assert checkpoints.step == checkpoints.saved == monitor.step == steps
    return lm, begin


# Another program where some steps measure all layers and some do not.
SLOW = [pytest.mark.slow] if BACKEND != "torch" else []


@pytest.mark.parametrize("every", [1, pytest.param(3, marks=SLOW)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(tmp_path, every):
    whole, _ = train(tmp_path / "whole", 10, seed=0, every=every)
    train(tmp_path / "parts", 7, seed=0, every=every)
    # What was made after the newest checkpoint is made again.
    shutil.rmtree(tmp_path / "parts/checkpoints/00000007")
    parts, begin = train(tmp_path / "parts", 10, seed=5, every=every)
    assert begin == 5
    for a, b in zip(values(whole), values(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    health = [
        (tmp_path / name / "health.jsonl").read_text()
        for name in ("whole", "parts")
    ]
    assert health[0] == health[1]
    states = [
        json.loads((tmp_path / name / "monitor.json").read_text())
        for name in ("whole", "parts")
    ]
    assert states[0] == states[1]


@pytest.mark.skipif(BACKEND != "jax", reason="jax alone has meshes")
@pytest.mark.parametrize(
    "before, after",
    [
        ("fsdp", "none"),
        pytest.param("fsdp+tensor", "data", marks=pytest.mark.slow),
        pytest.param("none", "tensor", marks=pytest.mark.slow),
    ],
)
def test_another_mesh(tmp_path, before, after):
    """Four simulated devices, or one: other shards than were saved."""
    how = {"dropout": 0.0, "every": None}
    train(tmp_path / "whole", 8, seed=0, **how)
    for steps, seed, name in ((5, 0, before), (8, 5, after)):
        ks.set_distribution("none", 4)
        lm, begin = train(tmp_path / "parts", steps, seed, name, **how)
        devices = 1 if name == "none" else 4
        assert len(lm.weights[0].value.sharding.device_set) == devices
    assert begin == 5
    losses = [
        ks.read_health(tmp_path / name).series("loss")[1]
        for name in ("whole", "parts")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_seeds_go_on(tmp_path):
    import random

    def draw():
        default = keras.random.uniform((2,))
        found = [random.random(), np.random.random()]
        return found + keras.ops.convert_to_numpy(default).tolist()

    drawn = []
    take = at(6, lambda: drawn.append(draw()))
    fit(tiny(), ks.Checkpoints(tmp_path, every=4), take)
    snapshots.remove(tmp_path, 8)
    for _ in range(3):
        draw()
    model, again = tiny(), ks.Checkpoints(tmp_path, every=4)
    assert again.restore(model) == 4
    take = at(2, lambda: drawn.append(draw()))
    fit(model, again, take, batches=4)
    assert drawn[0] == drawn[1]


def test_several_epochs_and_fits(tmp_path):
    model, checkpoints = tiny(), ks.Checkpoints(tmp_path, every=5)
    fit(model, checkpoints, epochs=2)
    assert complete(tmp_path) == [10, 15, 16]
    fit(model, checkpoints, epochs=1)
    assert complete(tmp_path) == [16, 20, 24]
    other = ks.Checkpoints(tmp_path)
    assert other.restore(tiny()) == 24 and other.epoch == 1


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has none on torch")
def test_several_steps_in_one_execution(tmp_path):
    model = tiny()
    model.compile("adam", "mse", steps_per_execution=3)
    checkpoints = ks.Checkpoints(tmp_path, every=4, keep_last=9)
    fit(model, checkpoints, epochs=2)
    assert complete(tmp_path) == [6, 8, 14, 16]


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    fit(tiny(), ks.Checkpoints(tmp_path))

    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    assert ks.Checkpoints(tmp_path).restore(tiny()) == 8


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 3, 7])
def test_a_signal_saves_after_the_step(tmp_path, number, step, capsys):
    model, checkpoints = tiny(), ks.Checkpoints(tmp_path)
    stop = at(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        fit(model, checkpoints, stop)
    assert isinstance(caught.value, ks.TrainingInterrupted)
    assert caught.value.code == 75
    assert caught.value.step == caught.value.saved == step + 1
    assert nothing_left()
    assert f"after step {step + 1}" in capsys.readouterr().out
    other = tiny(0.01)
    assert ks.Checkpoints(tmp_path).restore(other) == step + 1
    for a, b in zip(values(model), values(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_second_interrupt_ends_at_once(tmp_path):
    """The system's own handler: it works while compiled code runs, too."""
    found = []

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        found.append(signal.getsignal(signal.SIGINT))

    with pytest.raises(ks.TrainingInterrupted):
        fit(tiny(), ks.Checkpoints(tmp_path), at(2, twice))
    assert found == [signal.SIG_DFL] and nothing_left()


def test_signals_after_an_error_in_fit(tmp_path):
    checkpoints = ks.Checkpoints(tmp_path, every=2)

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tiny(), checkpoints, at(5, fail))
    checkpoints.close()
    assert nothing_left() and complete(tmp_path) == [2, 4]


# What is saved, and kept.


def test_what_is_kept(tmp_path):
    checkpoints = ks.Checkpoints(tmp_path, every=1, keep_last=2, keep_every=3)
    fit(tiny(), checkpoints)
    assert complete(tmp_path) == [3, 6, 7, 8]


def test_without_checkpoints_but_when_it_is_stopped(tmp_path):
    fit(tiny(), ks.Checkpoints(tmp_path / "a", every=None))
    assert not (tmp_path / "a").exists()
    checkpoints = ks.Checkpoints(tmp_path / "b", every=None)
    stop = at(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(ks.TrainingInterrupted) as stopped:
        fit(tiny(), checkpoints, stop)
    assert stopped.value.step == stopped.value.saved
    assert complete(tmp_path / "b") == [stopped.value.step]


def fabricate(directory, step, verdict="OK", sealed=True):
    path = snapshots.folder(directory, step)
    (path / "arrays/d").mkdir(parents=True)
    (path / "arrays/d/data").write_bytes(bytes(range(200)))
    (path / "arrays/_METADATA").write_text('{"a": 1}')
    (path / "state.json").write_text(json.dumps({"verdict": verdict}))
    if sealed:
        snapshots.seal(directory, step)


def test_the_last_calm_one_is_kept(tmp_path):
    for step in range(1, 5):
        fabricate(tmp_path, step)
    for step in range(5, 9):
        fabricate(tmp_path, step, verdict="WARN")
    fabricate(tmp_path, 7_000, sealed=False)
    fabricate(tmp_path, 6_000, sealed=False)
    gone = snapshots.prune(tmp_path, 8, keep_last=2, keep_every=None)
    assert gone == [1, 2, 3, 5, 6] and complete(tmp_path) == [4, 7, 8]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, capsys):
    model = tiny()
    checkpoints = ks.Checkpoints(tmp_path, every=2, keep_last=1)

    def poison():
        if hasattr(model, "jax_state_sync"):
            model.jax_state_sync()
        slot = model.optimizer.variables[-1]
        slot.assign(np.full(slot.shape, np.nan, "float32"))

    fit(model, checkpoints, at(4, poison))
    assert complete(tmp_path) == [4] and checkpoints.saved == 4
    printed = capsys.readouterr().out
    assert "No checkpoint of step 6" in printed and "not finite" in printed


def test_a_run_that_is_lost_is_not_saved(tmp_path, capsys, monkeypatch):
    monitor = ks.StabilityMonitor(every=None, verbose=0)
    checkpoints = ks.Checkpoints(tmp_path, every=2, monitor=monitor)

    def lose():
        monitor._diagnosis.judge.verdict = ks.Verdict.DIVERGED
        monkeypatch.setattr(
            type(monitor), "verdict", property(lambda m: ks.Verdict.DIVERGED)
        )

    fit(tiny(), monitor, checkpoints, at(3, lose))
    assert complete(tmp_path) == [2]
    assert "it is DIVERGED" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["arrays", "seal", "state"])
def test_a_full_disk(tmp_path, monkeypatch, capsys, where):
    """Training goes on, and says so; what was saved before stays."""
    module, name = {
        "arrays": (saving, "save_arrays"),
        "seal": (snapshots, "seal"),
        "state": (ks.resumption, "write_json"),
    }[where]
    original, calls = getattr(module, name), []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) in (2, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, full)
    model = tiny()
    fit(model, ks.Checkpoints(tmp_path, every=2, keep_last=1))
    printed = capsys.readouterr().out
    assert "step 4 could not be written" in printed
    assert "No space left" in printed and "newest is of step 2" in printed
    assert snapshots.steps(tmp_path) == [8]
    other = tiny()
    assert ks.Checkpoints(tmp_path).restore(other) == 8
    np.testing.assert_array_equal(values(model)[0], values(other)[0])


# What is damaged is found, and not used.


def test_every_flipped_bit_cut_and_missing_file_is_found(tmp_path):
    fabricate(tmp_path, 3)
    assert snapshots.verify(tmp_path, 3) is None
    path = snapshots.folder(tmp_path, 3)
    rng = np.random.default_rng(0)
    for file in [p for p in path.rglob("*") if p.is_file()]:
        content = file.read_bytes()
        for i in range(len(content)):
            flipped = bytearray(content)
            flipped[i] ^= 1 << int(rng.integers(8))
            file.write_bytes(flipped)
            found = _verified(tmp_path)
            # White space between JSON's values means nothing.
            same = file.suffix == ".json" and _same(content, flipped)
            assert same or found is not None, (file, i)
            if i % 7 == 0:
                file.write_bytes(content[:i])
                assert _verified(tmp_path) is not None
        file.unlink()
        assert _verified(tmp_path) is not None
        file.write_bytes(content)
    assert snapshots.verify(tmp_path, 3) is None
    (path / "more").write_text("")
    assert "does not belong" in snapshots.verify(tmp_path, 3)
    (path / "more").unlink()
    (path / "arrays/link").symlink_to("/etc/hostname")
    assert snapshots.verify(tmp_path, 3) is not None


def _verified(directory):
    try:
        return snapshots.verify(directory, 3)
    except ValueError as error:
        return error


def _same(content, flipped):
    try:
        return json.loads(content) == json.loads(flipped)
    except ValueError:
        return False


def test_a_damaged_one_is_passed_over(tmp_path, capsys):
    checkpoints = ks.Checkpoints(tmp_path, every=2)
    fit(tiny(), checkpoints)
    assert complete(tmp_path) == [4, 6, 8]
    state = tmp_path / "00000008/state.json"
    state.write_bytes(state.read_bytes()[:-9])
    (tmp_path / "00000006/manifest.json").unlink()
    model, again = tiny(), ks.Checkpoints(tmp_path, every=2, keep_last=2)
    assert again.restore(model) == 4
    printed = capsys.readouterr().out
    assert "step 8 passed over: state.json has" in printed
    assert "step 6 passed over: it was never completed" in printed
    fit(model, again, batches=6)
    # What was damaged is not among those that are kept.
    assert complete(tmp_path) == [8, 10]
    assert (tmp_path / "00000008.damaged").exists()


def test_none_good_is_an_error_and_no_new_beginning(tmp_path):
    assert ks.Checkpoints(tmp_path).restore(tiny()) == 0
    fabricate(tmp_path, 4, sealed=False)
    assert ks.Checkpoints(tmp_path).restore(tiny()) == 0
    fit(tiny(), ks.Checkpoints(tmp_path))
    (tmp_path / "00000008/state.json").unlink()
    with pytest.raises(ks.CheckpointError, match="step 8: state.json is miss"):
        ks.Checkpoints(tmp_path).restore(tiny())
    shutil.rmtree(tmp_path / "00000008")
    with pytest.raises(ks.CheckpointError, match="No checkpoint in"):
        ks.Checkpoints(tmp_path).restore(tiny())


def reseal(directory, step, **changes):
    file = snapshots.folder(directory, step) / "state.json"
    state = json.loads(file.read_text())
    for name, change in changes.items():
        state[name].update(change)
    file.write_text(json.dumps(state))
    snapshots.seal(directory, step)


def test_another_run_is_refused_with_what_differs(tmp_path, capsys):
    fit(tiny(), ks.Checkpoints(tmp_path, config={"a": {"b": 1}}))
    how = {"config": {"a": {"b": 1}}}
    cases = {
        "config.a.b is 1 there and 2 here": (tiny(), {"a": {"b": 2}}),
        "model/hidden/kernel is .* there and .* here": (
            tiny(units=5),
            {"a": {"b": 1}},
        ),
    }
    for message, (model, config) in cases.items():
        with pytest.raises(ValueError, match=message):
            ks.Checkpoints(tmp_path, config=config).restore(model)
    model = tiny()
    model.compile(keras.optimizers.Adam(0.01, beta_1=0.7), "mse")
    with pytest.raises(ValueError, match="optimizer.config.beta_1 is 0.8"):
        ks.Checkpoints(tmp_path, **how).restore(model)
    # A learning rate is a variable: it is restored.
    model = tiny(rate=0.5)
    assert ks.Checkpoints(tmp_path, **how).restore(model) == 8
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)

    reseal(tmp_path, 8, versions={"keras": "2.0"})
    capsys.readouterr()
    assert ks.Checkpoints(tmp_path, **how).restore(tiny()) == 8
    assert "keras is '2.0' there" in capsys.readouterr().out
    manifest = tmp_path / "00000008/manifest.json"
    content = json.loads(manifest.read_text())
    content["schema"] = 9
    content["sha256"] = snapshots._digest(content)
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another version of keras_stable"):
        ks.Checkpoints(tmp_path, **how).restore(tiny())


def test_other_data_is_refused(tmp_path):
    data = ks.TokenBatches(TOKENS, 4, 8)
    fit(tiny(), ks.Checkpoints(tmp_path, data=data))
    other = TOKENS.copy()
    other[5] += 1
    data = ks.TokenBatches(other, 4, 8)
    with pytest.raises(ValueError, match="belongs to other batches: tokens"):
        ks.Checkpoints(tmp_path, data=data).restore(tiny())
    assert data.first_step == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"every": 0}, "`every`"),
        ({"keep_last": 0}, "`keep_last`"),
        ({"keep_every": 0}, "`keep_every`"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ks.Checkpoints("nowhere", **arguments)


# Real processes, killed: see `recipes/faults.py`.

GROUPS = [
    "kill_saving",
    pytest.param("kill_training kill_first_step", marks=pytest.mark.slow),
    pytest.param("interrupt two_interrupts", marks=pytest.mark.slow),
    pytest.param("disk_full not_finite", marks=pytest.mark.slow),
    pytest.param("truncated bit_flip half_deleted", marks=pytest.mark.slow),
    pytest.param("all_damaged other_config", marks=pytest.mark.slow),
    pytest.param(
        "other_version data_changed data_removed", marks=pytest.mark.slow
    ),
    pytest.param("one_of_two interrupt_two", marks=pytest.mark.slow),
]


@pytest.mark.skipif(BACKEND != "jax", reason="its recipe is run on jax")
@pytest.mark.parametrize("kinds", GROUPS)
def test_faults(tmp_path, kinds):
    command = [sys.executable, RECIPES / "faults.py", "--repetitions", "2"]
    command += ["--out", tmp_path / "faults.json", "--kinds", *kinds.split()]
    done = subprocess.run(list(map(str, command)), capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert len(rows) == 2 * len(kinds.split())


def test_the_lab_book_has_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import faults

    results = json.loads((RECIPES / "results/faults.json").read_text())
    table = faults.table(results["rows"])
    readme = (RECIPES / "README.md").read_text()
    assert table in readme, f"recipes/README.md is stale; paste:\n{table}"
    right = {"resumed", "refused", "finished before"}
    assert {row["result"] for row in results["rows"]} <= right
    longest = max(row.get("seconds", 0) for row in results["rows"])
    assert f"ended within {longest} s" in readme
