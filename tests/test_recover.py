"""Runs that break, and go on: `StabilityMonitor` with guard and recover."""

import dataclasses
import json

import grain
import keras
import numpy as np
import pytest

import keras_stable as ks

STEPS = 260
# Everything sooner, so that tests are short; no warm-up, to compare bits.
QUICK = ks.Rescue(
    every=20, certify=10, margin=10, skip=15, rewarmup=0, back_off=1.0
)
DIRECTIONS = np.random.default_rng(9).normal(size=(8, 4))


def good_batch(place):
    rng = np.random.default_rng([1, int(place)])
    x = rng.normal(size=(64, 8))  # Enough for losses of little noise.
    y = (x @ DIRECTIONS).argmax(1)
    return x.astype("float32"), y.astype("int32")


def source(bad=(), how=lambda x, y: (x * np.float32(np.nan), y)):
    def batch(place):
        x, y = good_batch(place)
        return how(x, y) if place in bad else (x, y)

    return grain.MapDataset.range(2000).map(batch)


def build(rate=3e-3, **kwargs):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.BatchNormalization(),
            # Without a seed it would draw, on torch, from numbers that a
            # new `fit` draws from too.
            keras.layers.Dropout(0.1, seed=5),
            keras.layers.Dense(4),
        ]
    )
    schedule = ks.WarmupSchedule(rate, STEPS, warmup_steps=20)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(ks.AdamW(schedule), loss, **kwargs)
    return model


def train(model, data, monitor=None, steps=STEPS, callbacks=()):
    """All steps, also those that were taken back."""
    made = 0
    callbacks = [*([monitor] if monitor else []), *callbacks]
    while (left := steps + (monitor.undone if monitor else 0) - made) > 0:
        place = monitor.position if monitor else 0
        model.fit(
            data[place : place + left],
            steps_per_epoch=left,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        made += left


def monitor_of(policy, data=None, rescue=QUICK, path=None, **kwargs):
    kwargs = {"every": 50, "verbose": 0, **kwargs}
    return ks.StabilityMonitor(
        path, policy=policy, data=data, rescue=rescue, **kwargs
    )


def weights(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def assert_same(model, other):
    for ours, theirs in zip(weights(model), weights(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def kinds(monitor):
    return [event.detector for event in monitor.events]


def break_weight(model, step):
    """A callback that puts a NaN into a weight, once."""
    made = [0]

    def change(batch, logs=None):
        made[0] += 1
        if made[0] == step:
            if hasattr(model, "jax_state_sync"):
                model.jax_state_sync()
            matrix = model.trainable_variables[0]
            value = np.array(keras.ops.convert_to_numpy(matrix))
            value[0, 0] = np.nan
            matrix.assign(value)

    return keras.callbacks.LambdaCallback(on_train_batch_begin=change)


@pytest.mark.parametrize("policy", ["guard", "recover"])
def test_a_healthy_run_is_not_touched(policy):
    plain, watched = build(), build()
    train(plain, source())
    data = source() if policy == "recover" else None
    monitor = monitor_of(policy, data)
    train(watched, source(), monitor)
    assert_same(plain, watched)
    assert monitor.undone == 0 and monitor.position == STEPS
    assert not {"guard", "back_off", "rewind"} & {*kinds(monitor)}


def test_a_bad_batch_is_left_out():
    places = [place for place in range(STEPS + 1) if place != 120]
    plain, watched = build(), build()
    clean = source()
    train(plain, grain.MapDataset.source(places).map(lambda p: clean[p]))
    monitor = monitor_of("guard")
    train(watched, source({120}), monitor, STEPS + 1)
    assert_same(plain, watched)
    assert kinds(monitor) == ["guard"]
    assert monitor.events[0].step == 121
    assert monitor.verdict is ks.Verdict.OK


def test_a_burst_halts_what_is_only_guarded():
    monitor = monitor_of("guard")
    model = build()
    with pytest.raises(ks.TrainingHalted, match="leaving out updates") as found:
        train(model, source(range(120, 150)), monitor)
    assert found.value.verdict is ks.Verdict.NONFINITE
    assert 125 <= found.value.step <= 127
    assert all(np.isfinite(w).all() for w in weights(model))


@pytest.mark.parametrize("seeks", [True, False])
def test_a_rewind_is_a_run_that_never_saw_what_was_skipped(seeks):
    bad = source(range(120, 130))
    model, monitor = build(), monitor_of("recover", bad if seeks else None)
    train(model, bad, monitor)
    (rewind,) = [e for e in monitor.events if e.detector == "rewind"]
    back, onset = int(rewind.value), rewind.onset
    assert onset == 121 and back == 100
    # The onset's batch and 15 more, from the state's on.
    left_out = range(100, 136)
    clean = source()
    places = [p for p in range(STEPS + 60) if p not in left_out][:STEPS]
    plain = build()
    train(plain, grain.MapDataset.source(places).map(lambda p: clean[p]))
    assert_same(plain, model)
    assert monitor.verdict is ks.Verdict.OK
    assert monitor.position == places[-1] + 1
    made = int(model.optimizer.iterations)
    assert made == STEPS


@pytest.mark.parametrize("files", [False, True])
def test_a_broken_weight_is_mended(tmp_path, files):
    data, rescue = source(), QUICK
    if files:
        rescue = dataclasses.replace(QUICK, directory=tmp_path / "copies")
        # Of another run, which was here before.
        old = monitor_of("recover", data, rescue)
        train(build(3e-2), data, old, steps=120)
        assert len(list((tmp_path / "copies").glob("*.npz"))) == 3
    model, monitor = build(), monitor_of("recover", data, rescue)
    train(model, data, monitor, callbacks=[break_weight(model, 150)])
    assert kinds(monitor).count("rewind") == 1
    assert all(np.isfinite(w).all() for w in weights(model))
    if files:
        other, same = build(), monitor_of("recover", data)
        train(other, data, same, callbacks=[break_weight(other, 150)])
        assert_same(other, model)


def test_back_to_the_very_beginning(tmp_path):
    bad = source(range(8, 20))
    model, monitor = build(), monitor_of("recover", bad, path=tmp_path)
    train(model, bad, monitor, steps=60)
    (rewind,) = [e for e in monitor.events if e.detector == "rewind"]
    assert rewind.value == 0 and int(model.optimizer.iterations) == 60
    clean, plain = source(), build()
    places = range(8 + 16, 8 + 16 + 60)
    data = grain.MapDataset.source(places).map(lambda p: clean[p])
    train(plain, data, steps=60)
    assert_same(plain, model)


def test_after_three_rewinds_it_halts():
    data = source(range(100, 2000))
    model, monitor = build(), monitor_of("recover", data)
    with pytest.raises(ks.TrainingHalted):
        train(model, data, monitor)
    assert kinds(monitor).count("rewind") == 3
    assert all(np.isfinite(w).all() for w in weights(model))


def test_wrong_targets_back_off_and_the_rate_comes_back():
    def wrong(x, y):
        return x, (y + 1) % 4

    rescue = ks.Rescue(recovery=100, rest=16)
    data = source(range(200, 215), wrong)
    model, monitor = build(), monitor_of("guard", rescue=rescue)
    rates = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda *_, **__: rates.append(
            monitor._rescuer.guard.rate
        )
    )
    train(model, data, monitor, callbacks=[note])
    assert kinds(monitor).count("back_off") == 1
    assert min(rates) == pytest.approx(0.5, abs=0.02)
    assert rates[:200] == [1.0] * 200 and rates[-1] > 0.7


def test_the_ledger_is_kept_and_read_again(tmp_path):
    bad = source(range(120, 130))
    monitor = monitor_of("recover", bad, path=tmp_path)
    train(build(), bad, monitor)
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    (entry,) = map(json.loads, lines)
    assert entry == {"first": 100, "last": 135, "samples": [6400, 8704]}
    events = ks.read_health(tmp_path).events
    assert [e.detector for e in events].count("rewind") == 1
    # Begun anew from the start: no batch of these is trained on.
    again = monitor_of("recover", bad, path=tmp_path)
    model = build()
    train(model, bad, again)
    assert "guard" not in kinds(again) and again.undone == 0
    clean = source()
    places = [p for p in range(STEPS + 60) if p not in range(100, 136)][:STEPS]
    plain = build()
    train(plain, grain.MapDataset.source(places).map(lambda p: clean[p]))
    assert_same(plain, model)


def causes(monitor):
    found = [e for e in monitor.events if e.detector == "autopsy"]
    return [e.detail.split(":")[0] for e in found]


@pytest.mark.parametrize(
    "bad, step, cause",
    [(range(120, 130), None, "BAD_DATA"), ((), 150, "BAD_STATE")],
)
def test_autopsies(bad, step, cause):
    data = source(bad)
    model, monitor = build(), monitor_of("recover", data, autopsy=True)
    callbacks = [break_weight(model, step)] if step else []
    train(model, data, monitor, callbacks=callbacks)
    (found,) = [e for e in monitor.events if e.detector == "autopsy"]
    assert found.detail.startswith(cause)
    # What was tried leaves no trace.
    other, without = build(), monitor_of("recover", data)
    callbacks = [break_weight(other, step)] if step else []
    train(other, data, without, callbacks=callbacks)
    assert_same(model, other)


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="see test_replicas"
)
@pytest.mark.parametrize(
    "distribution", ["data", pytest.param("fsdp", marks=pytest.mark.slow)]
)
def test_events_and_autopsies_on_several_devices_are_those_of_one(
    distribution,
):
    """The bad rows are of one device alone; what was tried leaves no trace."""
    import jax

    def spoil(x, y):
        x = x.copy()
        x[-1, 0] = np.nan
        return x, y

    def run(autopsy):
        data = source(range(120, 130), spoil)
        monitor = monitor_of("recover", data, autopsy=autopsy)
        model = build()
        train(model, data, monitor)
        return model, monitor

    def said(monitor):
        return [
            (e.step, e.onset, e.detector, e.detail.split(":")[0])
            for e in monitor.events
        ]

    _, alone = run(True)
    assert causes(alone) == ["BAD_DATA"]
    four = jax.devices()[:4]
    ks.set_distribution(distribution, batch_size=64, devices=four)
    (model, examined), (other, plain) = run(True), run(False)
    assert said(examined) == said(alone)
    assert causes(plain) == []
    assert_same(model, other)
    for variable in model.variables:
        # What the devices hold of the same part is the same.
        shards = {}
        for shard in variable.value.addressable_shards:
            known = shards.setdefault(str(shard.index), shard.data)
            np.testing.assert_array_equal(known, shard.data)
    assert len(model.variables[0].value.sharding.device_set) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"policy": "guard", "every": None}, "every=None"),
        ({"policy": "recover", "every": None}, "every=None"),
        ({"policy": "recover", "autopsy": True}, "`data`"),
        ({"policy": "halt", "data": [1]}, "`data`"),
        ({"policy": "halt", "data": [1], "autopsy": True}, "policy"),
        ({"policy": "recover", "rescue": 0.5}, "`rescue`"),
        ({"policy": "recover", "data": iter([])}, "by their number"),
        ({"policy": "rewind"}, "policy"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ks.StabilityMonitor(**arguments)


class Spoiled(ks.TokenBatches):
    """Batches whose weights are NaN at some places."""

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        inputs, targets = super().__getitem__(index)
        bad = self.first_step + index in range(50, 60)
        weights = np.full(targets.shape, np.nan if bad else 1.0, "float32")
        return inputs, targets, weights


class Killed(Exception):
    pass


def resumable(path, kill=None):
    """A language model that is trained until it is killed, or to its end."""
    keras.utils.set_random_seed(0)
    lm = ks.StableCausalLM(ks.StableBackbone(31, 1, 2, 16, seed=0))
    lm.compile(ks.AdamW(ks.WarmupSchedule(1e-2, 100, warmup_steps=5)))
    tokens = np.random.default_rng(3).integers(0, 31, 4000)
    data = Spoiled(tokens, 4, 8)
    monitor = monitor_of("recover", data, path=path, every=10)
    checkpoints = ks.Checkpoints(
        path / "checkpoints", every=20, data=data, monitor=monitor
    )
    made = checkpoints.restore(lm)

    def end(batch, logs=None):
        if monitor.step >= (kill or 10**9):
            raise Killed

    callbacks = [
        *(monitor, checkpoints),
        keras.callbacks.LambdaCallback(on_train_batch_begin=end),
    ]
    try:
        while (left := 100 + monitor.undone - made) > 0:
            some = data.repeat()[:left]
            lm.fit(some, callbacks=callbacks, verbose=0)
            made += left
            data.set_state(data.get_state(monitor.position))
    except Killed:
        pass
    finally:
        checkpoints.close()
        monitor.close()
    return lm, monitor


SLOW = [pytest.mark.slow] if keras.backend.backend() != "torch" else []


@pytest.mark.parametrize(
    "kill", [pytest.param(45, marks=SLOW), 75, pytest.param(118, marks=SLOW)]
)
def test_resumed_training_is_that_which_was_not_killed(tmp_path, kill):
    whole, monitor = resumable(tmp_path / "whole")
    assert kinds(monitor).count("rewind") == 1 and monitor.undone
    resumable(tmp_path / "killed", kill)
    lm, again = resumable(tmp_path / "killed")
    assert (again.position, again.step) == (monitor.position, monitor.step)
    assert_same(whole, lm)
