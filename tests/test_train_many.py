"""Several runs in one program: the numbers, verdicts and files they have alone.

The truth is `fit` of each run by itself.
"""

import importlib.util
import json
import sys
from pathlib import Path

import grain
import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import losses
from keras_stable import many

BACKEND = keras.backend.backend()
jax_only = pytest.mark.skipif(
    BACKEND != "jax", reason="several runs in one program are for jax"
)
RECIPES = Path(__file__).parents[1] / "recipes"
TOKENS = np.frombuffer(Path(many.__file__).read_bytes(), "uint8")
STEPS = 12
# Matrices of a layer this wide are not chaotic in so few steps.
SHAPE = {"num_layers": 1, "num_heads": 8, "hidden_dim": 64}
# What is put on a model, its optimizer and its monitor meanwhile.
WRAPPED = {
    *("compute_loss", "compute_metrics", "make_train_function", "train_step"),
    *("stateless_apply", "compute_loss_and_updates", "_make_function"),
    "_begin_watch",
}
GRID = [(rate, seed) for rate in (1e-3, 4e-3) for seed in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def kept_programs(tmp_path_factory):
    """Single runs of one shape are compiled once, and without much ado."""
    if BACKEND != "jax":
        yield
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


def run(
    rate,
    seed,
    path=None,
    variant="baseline",
    steps=STEPS,
    model=(),
    bad=None,
    **kwargs,
):
    """Model, batches and monitor of a run; `bad` is a step with NaN."""
    adam = kwargs.pop("adam", {})
    keras.utils.set_random_seed(seed)
    shape = {**SHAPE, "seed": seed, **dict(model)}
    lm = ks.StableCausalLM(ks.StableBackbone(256, variant=variant, **shape))
    lm.compile(ks.AdamW(rate, **adam))
    data = ks.TokenBatches(TOKENS, 4, 16, seed=seed)[:steps]
    if bad is not None:
        data = poisoned(data, bad)
    kwargs = {"every": 1, "verbose": 0, **kwargs}
    return lm, data, ks.StabilityMonitor(path, **kwargs)


def poisoned(data, bad):
    """Batches with weights of tokens: one, and NaN in one step from 1 on."""
    ones = np.ones((4, 16), "float32")
    return grain.MapDataset.source(
        [
            (*batch, ones * (np.nan if step == bad else 1))
            for step, batch in enumerate(data, 1)
        ]
    )


def fit(lm, data, monitor):
    """A run by itself; the `TrainingHalted` that ended it, or None."""
    try:
        lm.fit(data, callbacks=[monitor], verbose=0)
    except ks.TrainingHalted as halted:
        return halted
    return None


def values(lm):
    variables = [*lm.variables, *lm.optimizer.variables]
    return [np.array(v, "float64") for v in variables]


def check_equal(ours, theirs, tolerance=2e-5, others=2e-4):
    """Whether two runs have the same weights, slots, seeds and records.

    Where a gradient is less than its rounding, Adam's update is +-rate: a
    share `others` of a variable may be otherwise, three in its 16384 here, or
    one number of a small one.
    """
    for a, b in zip(values(ours[0]), values(theirs[0]), strict=True):
        most = np.nanmax(np.abs(b), initial=1e-3)
        near = np.isclose(a, b, 0, tolerance * most, equal_nan=True)
        assert np.sum(~near) <= max(1, others * near.size)
    a, b = ours[2], theirs[2]
    assert (a.step, a.verdict, a.worst) == (b.step, b.verdict, b.worst)
    a, b = ks.read_health(a.path), ks.read_health(b.path)
    assert a.layout == b.layout
    assert [s["step"] for s in a.steps] == [s["step"] for s in b.steps]
    for one, other in zip(a.steps, b.steps):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                value = pytest.approx(value, 20 * tolerance, nan_ok=True)
            assert one[name] == value, name
    assert a.tables.keys() == b.tables.keys()
    for step, table in b.tables.items():
        for name in ("tensors", "variables"):
            # Written with five digits; means of positive and negative numbers
            # have the noise of what cancels.
            np.testing.assert_allclose(
                a.tables[step][name], table[name], 100 * tolerance, 1e-6
            )
        for one, other in zip(a.tables[step]["heads"], table["heads"]):
            np.testing.assert_allclose(one, other, 100 * tolerance, 1e-6)
    for one, other in zip(a.events, b.events, strict=True):
        for name in ("step", "onset", "detector", "series"):
            assert getattr(one, name) == getattr(other, name)
    assert a.verdicts == b.verdicts
    assert [x.name for x in a.black_boxes] == [x.name for x in b.black_boxes]


def both(tmp_path, specs, vectorised=None, near=(), **common):
    """Trains runs alone and together, and compares them.

    Returns:
        `(runs, halted)`: of those trained together.
    """
    alone, together = (
        [
            run(path=tmp_path / f"{kind}-{i}", **{**common, **spec})
            for i, spec in enumerate(specs)
        ]
        for kind in ("alone", "together")
    )
    ended = [fit(*each) for each in alone]
    halted = ks.train_many(*zip(*together), vectorised=vectorised)
    for mine, theirs, a, b in zip(together, alone, halted, ended, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.step, a.verdict) == (b.step, b.verdict)
            assert (a.event.detector, a.event.onset) == (
                b.event.detector,
                b.event.onset,
            )
        check_equal(mine, theirs, *near)
    return together, halted


# Each run has the numbers that it has alone.


# The other tests are of the baseline; the rest is in `make test-full`.
QUICK = ("sigma_reparam", "qk_norm_cap")


@jax_only
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=[] if v in QUICK else pytest.mark.slow)
        for v in ks.PAPER
    ],
)
def test_runs_are_as_alone(tmp_path, variant):
    specs = [{"rate": rate, "seed": seed} for rate, seed in GRID]
    runs, _ = both(tmp_path, specs, vectorised=True, variant=variant)
    ends = [values(lm)[0] for lm, _, _ in runs]
    for i, end in enumerate(ends):
        assert all(np.abs(end - x).max() > 1e-3 for x in ends[:i])
    assert {m.verdict for _, _, m in runs} == {ks.Verdict.OK}


@jax_only
@pytest.mark.parametrize(
    "vectorised", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_all_that_a_run_has_of_its_own(tmp_path, monkeypatch, vectorised):
    """Schedules, decay, dropout, chunks of the loss, lengths."""
    monkeypatch.setattr(losses, "TOKENS", 16)
    schedules = [
        ks.WarmupSchedule(1e-3, 8, warmup_steps=2),
        ks.WarmupSchedule(4e-3, 12, shape="linear", cycles=2),
    ]
    variant = ks.get_variant("sigma_reparam").replace(z_loss=1e-2)
    both(
        tmp_path,
        [
            {"rate": schedule, "seed": seed, "steps": schedule.total_steps}
            for seed, schedule in enumerate(schedules)
        ],
        vectorised,
        variant=variant,
        model={"dropout": 0.2},
        adam={
            "decay": "independent",
            "global_clipnorm": 0.5,
            "gradient_accumulation_steps": 2,
        },
    )


@jax_only
@pytest.mark.parametrize(
    "precision",
    [
        "mixed_bfloat16",
        pytest.param("mixed_float16", marks=pytest.mark.slow),
    ],
)
def test_mixed_precision(tmp_path, precision):
    keras.config.set_dtype_policy(precision)
    specs = [{"rate": rate, "seed": 0} for rate in (1e-3, 4e-3)]
    near = (5e-3, 1e-3)
    runs, _ = both(tmp_path, specs, True, near, variant="qk_norm", steps=6)
    assert runs[0][0].backbone.compute_dtype == precision[6:]
    assert all(v.dtype == "float32" for v in runs[0][0].trainable_variables)


# One that is lost.


@jax_only
def test_a_lost_run_ends_as_alone_and_the_others_go_on(tmp_path):
    specs = [
        {"seed": 0, "bad": 5},
        {"seed": 1, "bad": -1},
        {"seed": 2, "bad": 7, "policy": "observe"},
        {"seed": 3, "bad": STEPS},
    ]
    runs, halted = both(tmp_path, specs, rate=1e-3, policy="halt")
    lost, healthy, watched, late = (monitor for _, _, monitor in runs)
    assert halted[0].verdict is ks.Verdict.NONFINITE
    assert halted[0].step == lost.step == 5
    assert halted[0].black_box.exists()
    assert halted[1] is None and healthy.step == STEPS
    assert healthy.verdict is ks.Verdict.OK
    # It is observed to the end.
    assert halted[2] is None and watched.step == STEPS
    assert watched.verdict is ks.Verdict.NONFINITE
    assert halted[3].step == late.step == STEPS
    # The step after it was under way.
    iterations = [int(lm.optimizer.iterations) for lm, _, _ in runs]
    assert iterations == [6, STEPS, STEPS, STEPS]


@jax_only
def test_a_program_without_those_that_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(many, "WORTH", 0.0)
    widths = []
    step = many._Group._step

    def spy(group, *args):
        widths.append(len(group.rows))
        return step(group, *args)

    monkeypatch.setattr(many._Group, "_step", spy)
    bad = (-1, 3, 3, 6)
    specs = [{"seed": i, "bad": step} for i, step in enumerate(bad)]
    both(tmp_path, specs, rate=1e-3, policy="halt")
    assert len(widths) == STEPS
    assert [*dict.fromkeys(widths)] == [4, 2, 1]


# Monitors.


@jax_only
def test_one_interval_for_all_and_more_tables_for_one_that_warns(tmp_path):
    runs = [
        run(1e-3, 0, tmp_path / str(bad), every="auto", steps=64, bad=bad)
        for bad in (4, -1, -2)
    ]
    budgets = [monitor._budget for _, _, monitor in runs]
    ks.train_many(*zip(*runs))
    overheads = [monitor.overhead for _, _, monitor in runs]
    assert overheads[0]["every"] >= 10
    assert overheads[0] == overheads[1] == overheads[2]
    for (_, _, monitor), budget in zip(runs, budgets):
        assert monitor._budget is budget
        (written,) = ks.read_health(monitor.path).overheads
        assert written["every"] == overheads[0]["every"]
    lost, *healthy = (ks.read_health(m.path).tables for _, _, m in runs)
    # Five light steps and five full ones in turn, after two pairs.
    measured = {step for i in range(16, 56, 10) for step in range(i, i + 5)}
    measured |= {1, 6}
    for tables in healthy:
        assert measured <= {*tables} <= measured | {*range(51, 65)}
    # Seen a step later, it is looked at from the sixth step on.
    assert {*lost} == {1, *range(6, 65)}


@jax_only
def test_models_and_monitors_are_left_whole(tmp_path):
    def stop(event):
        raise KeyboardInterrupt

    runs = [
        run(1e-3, 0, tmp_path / "0", bad=-1),
        run(1e-3, 1, tmp_path / "1", bad=5, on_event=stop),
    ]
    with pytest.raises(KeyboardInterrupt):
        ks.train_many(*zip(*runs))
    for lm, _, monitor in runs:
        left = {*vars(lm), *vars(lm.optimizer), *vars(monitor)}
        assert not WRAPPED & left
        assert not [x for x in lm._flatten_layers() if "call" in vars(x)]
    done = int(runs[0][0].optimizer.iterations)
    assert 4 < done < STEPS
    assert len(ks.read_health(tmp_path / "0").steps) in (done - 1, done)
    # It can be trained on, with the same monitor.
    assert fit(*runs[0]) is None
    assert int(runs[0][0].optimizer.iterations) == done + STEPS


@jax_only
def test_it_goes_on_where_models_are():
    """From any number of updates, as `fit` does."""
    whole, parts = run(1e-3, 0), run(1e-3, 0)
    fit(*whole)
    fit(parts[0], parts[1][:5], parts[2])
    ks.train_many([parts[0]], [parts[1][5:]], [parts[2]])
    for a, b in zip(values(parts[0]), values(whole[0])):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert parts[2].step == 12


# Evaluation.


@jax_only
def test_losses_are_those_of_evaluate():
    models = [run(1e-3, seed)[0] for seed in range(3)]
    data = ks.TokenBatches(TOKENS, 4, 16, shuffle=False)[:5]
    before = [values(lm) for lm in models]
    for vectorised in (True, False):
        found = ks.losses_of_many(models, data, vectorised)
        assert found.shape == (3, 5)
        for lm, each in zip(models, found):
            whole = lm.evaluate(data, verbose=0, return_dict=True)["loss"]
            assert each.mean() == pytest.approx(whole, 1e-5)
            one = lm.evaluate(*data[3], verbose=0, return_dict=True)["loss"]
            assert each[3] == pytest.approx(one, 1e-5)
    for lm, old in zip(models, before):
        # But for the metrics, which `evaluate` counts with.
        count = len(lm.trainable_variables)
        for a, b in zip(values(lm)[:count], old[:count]):
            np.testing.assert_array_equal(a, b)


# What is refused.


REFUSED = {
    "variant": (dict(variant="qk_norm"), "share the model"),
    "width": (dict(model={"hidden_dim": 32}), "share the model"),
    "dropout": (dict(model={"dropout": 0.1}), "share the model"),
    "beta": (dict(adam={"beta_2": 0.99}), "share the optimizer"),
    "schedule": (dict(rate=ks.WarmupSchedule(1, 9)), "share the optimizer"),
    "callable": (dict(rate=lambda: 1e-3), "must be a number or a schedule"),
    "interval": (dict(every=2), "share the monitor's every"),
    "layers": (dict(watch="mlp"), "share the monitor's every"),
    "unwatched": (dict(every=None), "measures nothing"),
    "guarded": (dict(policy="guard"), "none can go back"),
    "empty": (dict(steps=0), "Dataset 1 has no batches"),
}


@jax_only
@pytest.mark.parametrize("spec, message", REFUSED.values(), ids=REFUSED)
def test_runs_that_share_no_program(spec, message):
    runs = [run(1e-3, 0), run(**{"rate": 1e-3, "seed": 1, **spec})]
    with pytest.raises(ValueError, match=message):
        ks.train_many(*zip(*runs))


@jax_only
def test_more_that_is_refused(tmp_path):
    a, b = (run(1e-3, seed, tmp_path / "same") for seed in (0, 1))
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    plain.compile("adam", "mse")
    short = ks.TokenBatches(TOKENS, 4, 8)
    models, data, monitors = zip(a, b)
    for arguments, message in (
        (((), (), ()), "one at least"),
        ((models, data[:1], monitors), "2 models, 1 datasets"),
        (([models[0]] * 2, data, monitors), "same model is given twice"),
        ((models, data, [monitors[0]] * 2), "monitor of its own"),
        ((models, data, monitors), "write to one directory"),
        ((models, (data[0], short), (monitors[0], run(1, 1)[2])), "the batch"),
        (([plain], data[:1], monitors[:1]), "must be `StableCausalLM`s"),
    ):
        with pytest.raises(ValueError, match=message):
            ks.train_many(*arguments)
    ks.set_distribution("data", 8)
    with pytest.raises(ValueError, match="without a distribution"):
        ks.train_many(models[:1], data[:1], monitors[:1])


@pytest.mark.skipif(BACKEND == "jax", reason="there it works")
def test_other_backends_name_the_way_out():
    with pytest.raises(ValueError, match="in a process of its own"):
        ks.train_many(*zip(run(1e-3, 0)))
    with pytest.raises(ValueError, match="in a process of its own"):
        ks.losses_of_many([run(1e-3, 0)[0]], run(1e-3, 0)[1])


# The recipe.


@pytest.fixture(scope="module")
def recipes():
    sys.path.append(str(RECIPES))  # What `python recipes/...` has by itself.
    found = []
    for name in ("pretrain", "pretrain_many", "sweep"):
        spec = importlib.util.spec_from_file_location(
            name, RECIPES / f"{name}.py"
        )
        found.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(found[-1])
    return found


@jax_only
def test_the_recipe_writes_ordinary_run_directories(
    recipes, tmp_path, monkeypatch, capsys
):
    pretrain, pretrain_many, _ = recipes
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 60)
    flags = "--num-layers 1 --num-heads 2 --hidden-dim 16 --batch-size 4 "
    flags += f"--sequence-length 16 --steps 9 --every 4 --data {text} "
    flags = [*flags.split(), "--variant", "qk_norm", "--resume"]
    runs = [("0.003", "0"), ("0.003", "1"), ("0.01", "1")]
    alone = tmp_path / "alone"
    own = ["--learning-rate", "0.003", "--seed", "1", "--out", str(alone)]
    pretrain.main([*flags, "--save", "none", *own])
    for rate, seed in runs:
        out = str(tmp_path / f"{rate}-{seed}")
        flags += ["--run", rate, seed, out]
    # One was killed in its third step.
    killed = tmp_path / "0.003-0"
    killed.mkdir()
    record = ks.read_run(alone) | {"status": "running"}
    record["config"] |= {"seed": 0, "out": str(killed)}
    (killed / "run.json").write_text(json.dumps(record))
    lines = (alone / "health.jsonl").read_text().splitlines(True)
    (killed / "health.jsonl").write_text("".join(lines[:3]))
    pretrain_many.main(flags)
    for rate, seed in runs:
        found = ks.read_run(tmp_path / f"{rate}-{seed}")
        assert found["status"] == "finished" and found["steps_done"] == 9
        assert found["config"]["seed"] == int(seed)
        assert found["config"]["learning_rate"] == float(rate)
        health = ks.read_health(tmp_path / f"{rate}-{seed}")
        assert [s["step"] for s in health.steps] == [*range(1, 10)]
        assert [*health.tables] == [*ks.read_health(alone).tables] == [1, 5, 9]
    assert ks.read_run(killed)["resumed"][0]["step"] == 0
    ours, theirs = ks.read_run(tmp_path / "0.003-1"), ks.read_run(alone)
    assert ours.keys() - {"resumed"} == theirs.keys() - {"resumed"}
    for name in ("validation_loss", "last_batch_loss", "perplexity"):
        assert ours[name] == pytest.approx(theirs[name], 1e-5)
    assert ours["validation_batch_losses"] == pytest.approx(
        theirs["validation_batch_losses"], 1e-5
    )
    for name in ("verdict", "worst_verdict", "parameters"):
        assert ours[name] == theirs[name]
    # Asked again, it has nothing to do.
    capsys.readouterr()
    before = (tmp_path / "0.01-1/run.json").read_bytes()
    pretrain_many.main(flags)
    assert capsys.readouterr().out.count("has finished") == 3
    assert (tmp_path / "0.01-1/run.json").read_bytes() == before


@jax_only
def test_the_recipe_refuses(recipes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    _, pretrain_many, _ = recipes
    with pytest.raises(SystemExit, match="--run RATE SEED DIRECTORY"):
        pretrain_many.main(["--steps", "3"])
    run = ["--run", "1e-3", "0", str(tmp_path / "a")]
    for flags, message in (
        ("--every none", "`every=None` measures nothing"),
        ("--save all", "are for single runs: leave out --save all"),
    ):
        with pytest.raises(SystemExit, match=message):
            pretrain_many.main([*run, *flags.split(), "--steps", "3"])


@jax_only
def test_a_sweep_gives_it_what_it_gives_single_runs(recipes, tmp_path):
    import pretrain_flags

    _, pretrain_many, sweep = recipes
    arm = ks.Arm("cap", ks.get_variant("soft_cap").replace(cap=3.0))
    declared = ks.Sweep(
        tmp_path, [arm], ks.Ladder((1e-3, 1e-2), (0, 7)), flags={"steps": 5}
    )
    planned = declared.wanted()
    command = sweep.command_of(declared, ks, 4)
    script, *words = command(planned)
    assert Path(script).name == "pretrain_many.py"
    runs, others = pretrain_many.split(words)
    assert len(runs) == len(planned) == 4
    for one, run in zip(planned, runs):
        ours = pretrain_flags.parse(pretrain_many.of_one(run, others), "", ks)
        script, *words = command([one])
        assert Path(script).name == "pretrain.py"
        assert ours == pretrain_flags.parse(words, "", ks)
    for flag in ({"save": "all"}, {"backend": "torch"}):
        other = ks.Sweep(
            tmp_path / str(flag), [arm], ks.Ladder((1e-3,)), flags=flag
        )
        sweep.command_of(other, ks)
        with pytest.raises(ValueError, match="--together trains with"):
            sweep.command_of(other, ks, 2)
