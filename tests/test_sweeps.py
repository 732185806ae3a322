"""Sweeps: what is declared, run, killed, copied, and found at the end.

Their runs are stand-ins that train nothing, see `stand_in.py`: stable up to
0.02, the arm "weak" up to 0.004.
"""

import csv
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import pytest
import stand_in

import keras_stable as ks
from keras_stable import processes

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "recipes"
sys.path.append(str(RECIPES))  # What `python recipes/...` has by itself.
RATES = (2e-3, 4e-3, 8e-3, 4e-2)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Sweeps start processes and read files: the same on all backends.",
)


def arms(*labels):
    return [ks.Arm(label, "baseline") for label in labels]


def command_of(sweep, seconds=0.0):
    def command(runs):
        words = [str(TESTS / "stand_in.py"), str(seconds)]
        for run in runs:
            words += [str(sweep.path / run.folder), run.label]
            words += [f"{run.learning_rate:g}", str(run.seed)]
        return words

    return command


def work(sweep, slots=2, seconds=0.0, batch=1, stream=None):
    """Runs a sweep; returns its table's rows and what was printed."""
    stream = stream or io.StringIO()
    workers = ks.workers("local", slots=slots)
    command = command_of(sweep, seconds)
    display = ks.Display(stream, seconds=0)
    rows = ks.run_sweep(sweep, workers, command, batch, display, 0.01)
    return rows, stream.getvalue()


def nothing(runs, *more):
    raise AssertionError(f"{runs} are run again")


def folder(sweep, label, rate, seed=0):
    return sweep.path / ks.PlannedRun(label, rate, seed).folder


# What is declared.


def test_a_sweep_is_found_again_as_it_was_declared(tmp_path):
    strong = ks.Arm("a", ks.get_variant("soft_cap").replace(cap=30.0))
    other = ks.Arm("b", "qk_norm", {"beta_2": 0.99})
    for number, search in enumerate(
        (
            ks.Ladder(RATES, (0, 2), (5,)),
            ks.Bisection(1e-3, 1e-1, 1.5, (3, 4)),
            ks.TPESearch(1e-3, 1e-1, 9),
        )
    ):
        path = tmp_path / str(number)
        how = {"flags": {"steps": 7}, "experiment": "e", "question": "?"}
        ks.Sweep(path, [strong, other], search, **how)
        found = ks.Sweep(path)
        assert found.search == search and type(found.search) is type(search)
        assert found.flags == {"steps": 7}
        assert (found.experiment, found.question) == ("e", "?")
        assert [*found.arms] == ["a", "b"]
        assert ks.get_variant(found.arms["a"]["variant"]) == strong.variant
        assert found.arms["b"]["flags"] == {"beta_2": 0.99}
        # Declared again: the same.
        again = ks.Sweep(path, [strong, other], search, **how)
        assert again.arms == found.arms


def test_another_declaration_is_refused_with_what_differs(tmp_path):
    ks.Sweep(tmp_path, arms("a"), ks.Ladder(RATES), flags={"steps": 7})
    before = (tmp_path / "sweep.json").read_text()
    for how, message in (
        ({"flags": {"steps": 8}}, "flags.steps is 7 there and 8 here"),
        ({"flags": {}}, "flags.steps is 7 there and None here"),
        ({"search": ks.Ladder(RATES, (0, 1))}, "search.seeds is"),
        ({"arms": arms("a", "b")}, "arms.b is None there"),
        ({"arms": [ks.Arm("a", "qk_norm")]}, "arms.a.variant.name is"),
        ({"experiment": "e"}, "experiment is None there and 'e' here"),
    ):
        given = {"arms": arms("a"), "search": ks.Ladder(RATES)}
        given |= {"flags": {"steps": 7}, **how}
        with pytest.raises(ValueError, match="declared otherwise") as refused:
            ks.Sweep(tmp_path, **given)
        assert message in str(refused.value)
    assert (tmp_path / "sweep.json").read_text() == before

    # Other rates and more arms are other directories, and may be added.
    given = {"flags": {"steps": 7}, "extend": True}
    two = arms("a", "b")
    sweep = ks.Sweep(tmp_path, two, ks.Ladder(RATES, (0, 1)), **given)
    assert len(sweep.wanted()) == 16
    assert len(ks.Sweep(tmp_path).wanted()) == 16
    with pytest.raises(ValueError, match="arms.a.variant.name is"):
        ks.Sweep(tmp_path, [ks.Arm("a", "qk_norm")], ks.Ladder(RATES), **given)
    # What is there stays, whatever is added.
    more = ks.Ladder((RATES[0], 0.5), (2, 1), at_ends=(7,))
    joined = ks.Sweep(tmp_path, arms("c"), more, **given)
    assert [*joined.arms] == ["a", "b", "c"]
    search = ks.Ladder((*RATES, 0.5), (0, 1, 2), at_ends=(7,))
    assert joined.search == ks.Sweep(tmp_path).search == search
    # A seed for the ends that is a seed of all rates now.
    seven = ks.Ladder(RATES, (7,))
    found = ks.Sweep(tmp_path, arms("a"), seven, **given).search
    assert found == ks.Ladder((*RATES, 0.5), (0, 1, 2, 7))
    other = ks.Bisection(1e-3, 1e-1)
    assert ks.Sweep(tmp_path, arms("a"), other, **given).search == other


def test_an_arm_that_is_not_there(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("a", "weak"), ks.Ladder(RATES))
    assert sweep.outcomes("weak") == []
    with pytest.raises(ValueError, match="Unknown arm. Did you mean 'weak'"):
        sweep.outcomes("week")


def test_what_is_no_sweep(tmp_path):
    ladder = ks.Ladder(RATES)
    with pytest.raises(FileNotFoundError, match="There is no sweep in"):
        ks.Sweep(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one arm at least"):
        ks.Sweep(tmp_path / "a", [], ladder)
    with pytest.raises(ValueError, match="Two arms are called 'A'"):
        ks.Sweep(tmp_path / "a", arms("a", "A"), ladder)
    with pytest.raises(ValueError, match="A label names a directory"):
        ks.Sweep(tmp_path / "a", arms("nan"), ladder)
    with pytest.raises(TypeError, match="must be one of Ladder, Bisection"):
        ks.Sweep(tmp_path / "a", arms("a"), RATES)
    with pytest.raises(ValueError, match="are given together"):
        ks.Sweep(tmp_path / "a", arms("a"))
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        ks.Sweep(tmp_path / "file", arms("a"), ladder)
    ks.Sweep(tmp_path / "b", arms("a"), ladder)
    file = tmp_path / "b/sweep.json"
    good = json.loads(file.read_text())
    for change, message in (
        ({"schema": 9}, "of schema 1, but of 9"),
        ({"search": {"kind": "leap"}}, "Did you mean 'ladder'|Unknown search"),
        ({"search": {"kind": "ladder", "rates": []}}, "at least one"),
        ({"search": {"kind": "ladder"}}, "no declaration of a sweep"),
        ({"arms": [1]}, "no declaration of a sweep"),
        ({"arms": {"a": {"variant": "qk_nrom"}}}, "Did you mean 'qk_norm'"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            ks.Sweep(tmp_path / "b")
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        ks.Sweep(tmp_path / "b")


# What is run.


def test_a_ladder_to_its_end(tmp_path):
    search = ks.Ladder(RATES, (0, 1))
    sweep = ks.Sweep(tmp_path / "s", arms("strong", "weak"), search)
    rows, printed = work(sweep)
    strong, weak = rows
    assert strong["interval"] == "0.008 (2/2) to 0.04 (0/2)"
    assert weak["interval"] == "0.004 (2/2) to 0.008 (0/2)"
    assert strong["counts"] == {
        **{"0.002": [2, 2], "0.004": [2, 2]},
        **{"0.008": [2, 2], "0.04": [0, 2]},
    }
    assert (weak["low"], weak["high"], weak["runs"]) == (4e-3, 8e-3, 8)
    # 5.5 - 3 - 10 * rate + 0.001 * seed, a mean over two seeds.
    assert strong["best_rate"] == 8e-3
    assert strong["best_loss"] == pytest.approx(2.4205)
    assert weak["best_loss"] == pytest.approx(2.4605)
    # min(loss, first loss) over rates: two lost ones have 6 there, cut to the
    # first loss, 5.4 - 10 * rate + 0.001 * seed.
    losses = [2.4805, 2.4605, 5.4 - 0.08 + 5e-4, 5.4 - 0.4 + 5e-4]
    expected = sum(losses) / 4 - losses[1]
    assert weak["lr_sensitivity"] == pytest.approx(expected)
    assert len(printed.splitlines()) == 16
    assert "strong, 0.002, seed 1: finished, loss 2.4810" in printed
    assert "weak, 0.04, seed 0: diverged, loss 6.0000 (DIVERGED)" in printed

    table = json.loads((tmp_path / "s/table.json").read_text())
    assert table["arms"] == json.loads(json.dumps(rows))
    assert len(table["runs"]) == 16
    with open(tmp_path / "s/table.csv") as file:
        read = [*csv.DictReader(file)]
    assert [row["label"] for row in read] == ["strong", "weak"]
    assert float(read[1]["high"]) == 8e-3
    # Nothing is left of who was at work.
    assert (tmp_path / "s/sweep.lock").read_bytes() == b""
    assert not [*(tmp_path / "s").rglob(processes.CLAIM)]
    # No path of this machine is in what is read back.
    for name in ("sweep.json", "table.json", "table.csv"):
        assert str(tmp_path) not in (tmp_path / "s" / name).read_text()

    # It is done, also where it was copied to.
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    for path in (tmp_path / "s", tmp_path / "copy"):
        again = ks.Sweep(path)
        workers = ks.workers("local")
        assert again.wanted() == []
        assert ks.run_sweep(again, workers, nothing) == rows


def test_a_bisection_with_several_slots(tmp_path):
    search = ks.Bisection(1e-3, 1e-1, ratio=1.5, seeds=(0, 1))
    sweep = ks.Sweep(tmp_path, arms("strong", "weak"), search)
    strong, weak = work(sweep, slots=4)[0]
    for row, edge in ((strong, 0.02), (weak, 0.004)):
        assert row["low"] <= edge < row["high"] <= 1.5 * row["low"]
        assert row["counts"][f"{row['low']:g}"] == [2, 2]
        assert row["counts"][f"{row['high']:g}"] == [0, 2]
        assert row["runs"] < 2 * len(search.rates)


def test_several_runs_in_a_process(tmp_path):
    search = ks.Ladder(RATES, (0, 1))
    single = ks.Sweep(tmp_path / "single", arms("strong", "weak"), search)
    many = ks.Sweep(tmp_path / "many", arms("strong", "weak"), search)
    assert work(single)[0] == work(many, batch=3)[0]
    printed = [*(tmp_path / "many").rglob("output.txt")]
    # 8 runs of an arm, 3 at a time.
    assert len(printed) == 6


def test_losses_that_are_not_finite(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("nans"), ks.Ladder((1e-3, 2e-3)))
    (row,), printed = work(sweep)
    assert row["interval"] == "below 0.001 (0/1)"
    assert row["best_rate"] is None and math.isnan(row["best_loss"])
    assert "finished, loss nan" in printed
    text = ks.format_sweep_table([row])
    assert text.splitlines()[1].split() == (
        ["nans", "below", "0.001", "(0/1)", "2", "0", "0.0050"]
    )
    json.loads((tmp_path / "table.json").read_text(), parse_constant=nothing)


# What fails.


def test_a_run_that_fails_once_is_tried_again(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("shaky"), ks.Ladder((1e-3, 2e-3)))
    (row,), printed = work(sweep, slots=1)
    assert (row["runs"], row["failed"]) == (2, 0)
    assert printed.count("FAILED (attempt 1, exit code 3): no memory") == 2
    assert not [*tmp_path.rglob("failure.json")]


def test_a_run_that_fails_twice_is_a_failed_run(tmp_path):
    search = ks.Ladder(RATES, (0, 1))
    sweep = ks.Sweep(tmp_path, arms("strong", "broken"), search)
    strong, broken = work(sweep, slots=1)[0]
    assert (strong["failed"], strong["given_up"]) == (0, False)
    # After three of them, and no result, the arm is given up.
    assert (broken["runs"], broken["failed"]) == (0, 3)
    assert broken["given_up"] and broken["interval"] == "unknown"
    text = ks.format_sweep_table([strong, broken], "markdown")
    assert text.splitlines()[3] == (
        "| broken | unknown | 0 | 3, given up |  |  |  |"
    )
    files = [*tmp_path.rglob("failure.json")]
    assert len(files) == 3
    for file in files:
        failure = json.loads(file.read_text())
        assert (failure["attempts"], failure["exit_code"]) == (2, 3)
        # Of the second attempt alone.
        assert failure["tail"] == "some words\nno memory for it"
    again = ks.Sweep(tmp_path)
    assert again.wanted() == []
    again.retry()
    assert len(again.wanted()) == 8


def test_failures_of_some_seeds_count_nowhere(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("strong"), ks.Ladder((1e-3, 2e-3), (0, 1)))
    run = ks.PlannedRun("strong", 2e-3, 1)
    (tmp_path / run.folder).mkdir(parents=True)
    for _ in range(2):
        sweep.fail(run, -9, "gone")
    (row,), _ = work(sweep)
    assert row["counts"] == {"0.001": [2, 2], "0.002": [1, 1]}
    assert (row["runs"], row["failed"], row["given_up"]) == (3, 1, False)


def test_a_process_that_cannot_start_is_a_failure(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("a"), ks.Ladder((1e-3,)))
    workers = ks.workers("local")
    display = ks.Display(io.StringIO())
    rows = ks.run_sweep(
        sweep, workers, lambda runs: ["nowhere.py"], 1, display, 0.01
    )
    assert rows[0]["failed"] == 1
    failure = sweep.failure(ks.PlannedRun("a", 1e-3, 0))
    assert "nowhere.py" in failure["tail"] and failure["exit_code"] == 2


def test_a_process_that_ends_well_without_a_result_is_a_failure(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("a"), ks.Ladder((1e-3,)))
    workers, display = ks.workers("local"), ks.Display(io.StringIO())
    command = ["-c", "print('done')"]
    rows = ks.run_sweep(sweep, workers, lambda _: command, 1, display, 0.01)
    assert rows[0]["failed"] == 1
    assert sweep.failure(ks.PlannedRun("a", 1e-3, 0))["exit_code"] == 0


def test_a_result_that_cannot_be_read_is_told_and_not_run_again(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("strong"), ks.Ladder((1e-3, 2e-3)))
    work(sweep)
    file = folder(sweep, "strong", 2e-3) / "run.json"
    record = json.loads(file.read_text())
    del record["config"]["batch_size"]
    file.write_text(json.dumps(record))
    again = ks.Sweep(tmp_path)
    (row,) = ks.run_sweep(again, ks.workers("local"), nothing)
    assert (row["runs"], row["failed"]) == (1, 1)
    assert "is left out: 'batch_size'" in again.problems["strong"][0]


def test_a_directory_of_another_run_is_refused(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("strong"), ks.Ladder((1e-3, 2e-3)))
    work(sweep)
    here, there = (folder(sweep, "strong", rate) for rate in (1e-3, 2e-3))
    shutil.rmtree(there)
    shutil.copytree(here, there)
    with pytest.raises(ValueError, match="its learning_rate is 0.001"):
        ks.run_sweep(ks.Sweep(tmp_path), ks.workers("local"), nothing)


def test_directories_that_are_no_runs_are_left_alone(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("strong"), ks.Ladder((1e-3,)))
    for name in ("lr-x/seed-0", "lr-0.0010/seed-0", "lr-0.1/seed-a", "notes"):
        (tmp_path / "strong" / name).mkdir(parents=True)
    assert sweep.runs("strong") == []
    assert work(sweep)[0][0]["runs"] == 1


# Who is at work.


def test_two_sweeps_on_one_directory_are_refused(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("a"), ks.Ladder((1e-3,)))
    with sweep.lock():
        with pytest.raises(ValueError, match="Another sweep is at work") as no:
            ks.run_sweep(ks.Sweep(tmp_path), ks.workers("local"), nothing)
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(
            no.value
        )
    with sweep.lock():
        pass


def test_a_lock_of_another_machine(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("a"), ks.Ladder((1e-3,)))
    file = tmp_path / "sweep.lock"
    owner = {"host": "elsewhere", "pid": 12, "beat": time.time() - 30}
    file.write_text(json.dumps(owner))
    with pytest.raises(ValueError, match="30 s ago: process 12 on elsewhere"):
        with sweep.lock():
            pass
    assert json.loads(file.read_text()) == owner
    # Dead for long, killed on this machine, or not to be read: taken over.
    mine = {"host": socket.gethostname(), "pid": 12, "beat": time.time()}
    for text in (json.dumps(owner | {"beat": 9.0}), json.dumps(mine), "{"):
        file.write_text(text)
        with sweep.lock() as beat:
            beat()
            assert json.loads(file.read_text())["pid"] == os.getpid()
        assert file.read_text() == ""


def test_a_run_that_outlived_its_sweep_is_waited_for(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("strong"), ks.Ladder((1e-3, 2e-3)))
    run = ks.PlannedRun("strong", 1e-3, 0)
    place = tmp_path / run.folder
    place.mkdir(parents=True)
    # As a sweep that was killed left it: half done, and at work.
    orphan = processes.launch(
        ks.Task((run,), command_of(sweep, 1.0)([run]), [place]), {}
    )
    try:
        while not (place / "run.json").exists():
            time.sleep(0.01)
        (row,), printed = work(sweep)
    finally:
        assert orphan.wait() == 0
    assert row["runs"] == 2 and not [*tmp_path.rglob("collision")]
    assert printed.count("at work in a process of a sweep before") == 1


# What ends it.


def send_when(ready, number):
    def watch():
        while not ready():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_runs_save_and_ends(tmp_path, number):
    sweep = ks.Sweep(tmp_path, arms("strong"), ks.Ladder(RATES))
    handler = signal.getsignal(number)
    begun = [folder(sweep, "strong", rate) for rate in RATES[:2]]
    thread = send_when(
        lambda: all((f / "health.jsonl").exists() for f in begun), number
    )
    with pytest.raises(ks.SweepInterrupted) as stopped:
        work(sweep, seconds=60)
    thread.join()
    assert stopped.value.code == 75
    assert signal.getsignal(number) is handler
    for f in begun:
        assert ks.read_run(f)["status"] == "interrupted"
        assert not (f / "failure.json").exists()
    assert (tmp_path / "table.json").exists()
    assert not folder(sweep, "strong", RATES[2]).exists()
    assert (tmp_path / "sweep.lock").read_bytes() == b""
    (row,), _ = work(ks.Sweep(tmp_path))
    assert row["runs"] == 4


def test_a_run_that_others_interrupt_is_begun_again(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("strong"), ks.Ladder((1e-3,)))
    counter = tmp_path / "counter"
    stops = (
        "import sys; from pathlib import Path; "
        f"f = Path({str(counter)!r}); "
        "n = len(f.read_text()) if f.exists() else 0; "
        "f.write_text('x' * (n + 1)); sys.exit(75)"
    )
    workers, display = ks.workers("local"), ks.Display(io.StringIO())
    command = ["-c", stops]
    rows = ks.run_sweep(sweep, workers, lambda _: command, 1, display, 0.01)
    # Three times more, then it is a failure, and the second is the last.
    assert rows[0]["failed"] == 1 and len(counter.read_text()) == 5
    assert sweep.failure(ks.PlannedRun("strong", 1e-3, 0))["exit_code"] == 75


def test_an_error_leaves_no_run_behind(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("strong"), ks.Ladder((1e-3, 2e-3)))
    workers = ks.workers("local", slots=2)
    command = command_of(sweep, 60)

    def second(runs):
        if runs[0].learning_rate == 2e-3:
            while not [*tmp_path.rglob("run.json")]:
                time.sleep(0.01)
            raise RuntimeError("a defect")
        return command(runs)

    with pytest.raises(RuntimeError, match="a defect"):
        ks.run_sweep(sweep, workers, second, 1, ks.Display(io.StringIO()))
    while workers.tasks:
        workers.ended()
        time.sleep(0.01)
    run = ks.read_run(folder(sweep, "strong", 1e-3))
    assert run["status"] == "interrupted"


def test_killed_ten_times_at_random_the_table_is_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, TESTS / "killed_sweeps.py", tmp_path, "10"],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    hit, once, twice = map(int, done.stdout.split())
    # Nearly all found it at work.
    assert hit >= 5
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("table.json", "table.csv"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    table = json.loads((killed / "table.json").read_text())
    assert [row["interval"] for row in table["arms"]] == [
        "0.02 (2/2) to 0.04 (0/2)",
        "0.004 (2/2) to 0.008 (0/2)",
        "0.02 (2/2) to 0.04 (0/2)",
    ]
    # Nor were files of one run ever written by two processes.
    assert not [*tmp_path.rglob("collision")]

    assert (once, twice) == (75, -signal.SIGINT)
    for name in ("once", "twice"):
        # They were asked to end: no failures.
        assert not [*(tmp_path / name).rglob("failure.json")]
        # Ended, with the first Ctrl-C or the second.
        for file in (tmp_path / name).rglob("owner"):
            assert not stand_in.at_work(file.read_text())


# What is shown.


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_table_is_drawn_anew_on_a_terminal(tmp_path):
    sweep = ks.Sweep(tmp_path, arms("strong", "broken"), ks.Ladder(RATES))
    _, drawn = work(sweep, seconds=0.3, stream=Terminal())
    assert "\x1b[3F\x1b[J" in drawn
    assert "(begins)" in drawn or "strong  0.002: 0/0 (" in drawn
    last = drawn.split("\x1b[J")[-2]
    # The last run may have its result, and its process not yet ended.
    assert re.search("[34] ended, 1 running, 3 failed, 0 more known", last)
    assert "0.002: 1/1" in last and re.search(r"0\.0\d+: \d/\d \(", last)
    assert "0.002: 0/0!" in last


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'markdown'"):
        ks.format_sweep_table([], "markdwn")


# The recipe.


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("sweep", RECIPES / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file = tmp_path / "text.txt"
    file.write_text("To be, or not to be: that is the question.\n" * 60)
    return str(file)


TINY = (
    "--num-layers 1 --num-heads 2 --hidden-dim 16 --sequence-length 16 "
    "--batch-size 4 --steps 6 --every none"
).split()


def test_the_recipe_runs_pretrain(recipe, text, tmp_path, capsys):
    out = str(tmp_path / "s")
    declared = ["--out", out, "--variants", "qk_norm", "--rates", "1e-2"]
    given = ["--", *TINY, "--data", text]
    assert recipe.main([*declared, *given]) == 0
    printed = capsys.readouterr().out
    assert "qk_norm, 0.01, seed 0: finished" in printed
    sweep = ks.Sweep(out)
    assert sweep.flags["steps"] == 6 and sweep.flags["data"] == [text]
    place = folder(sweep, "qk_norm", 1e-2)
    run = ks.read_run(place)
    assert run["status"] == "finished" and run["steps_done"] == 6
    assert run["config"]["label"] == run["config"]["variant"] == "qk_norm"
    assert run["config"]["learning_rate"] == 1e-2
    losses = run["validation_batch_losses"]
    assert len(losses) > 1
    assert run["validation_loss"] == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )
    names = {file.name for file in place.iterdir()}
    assert names == {
        *("run.json", "health.jsonl", "monitor.json", "output.txt")
    }
    # It is done: the table and nothing else, however it is asked for.
    assert recipe.main(["--out", out, "--format", "markdown"]) == 0
    assert recipe.main([*declared, *given]) == 0
    assert recipe.main(["--out", out, "--show"]) == 0
    printed = capsys.readouterr().out
    assert "| qk_norm |" in printed and "finished" not in printed


REFUSED = {
    "--out NEW": "There is no sweep in",
    "--out NEW --rates 1e-3": "Say what is compared",
    "--out NEW --extend --rates 1e-3": "There is no sweep in",
    "--out NEW --variants paper --show": "--show changes nothing",
    "--out NEW --extend --show": "--show changes nothing",
    "--out NEW --variants a --experiment b": "not both",
    "--out NEW --variants qk_nrom": "Did you mean 'qk_norm'",
    "--out NEW --variants baseline,baseline": "Two arms are called",
    "--out NEW --variants baseline, --rates 1": "A label names",
    "--out NEW --experiment paper-lt": "Did you mean 'paper-lr'",
    "--out NEW --variants paper --rates papr": "Did you mean 'paper'",
    "--out NEW --variants paper --rates 1e-3,-1": "positive number",
    "--out NEW --variants paper --rates 1e-3,nan": "positive number",
    "--out NEW --variants paper --rates 1e-3,1e-3": "none twice",
    "--out NEW --variants paper --seeds 1,1": "none twice",
    "--out NEW --variants paper --seeds 1,-1": "at least 0",
    "--out NEW --variants paper --search bisct": "Did you mean 'bisect'",
    "--out NEW --variants paper --search bisect --ratio 1": "`ratio`",
    "--out NEW --variants paper --search bisect --rates 1e-3": "less than",
    "--out NEW --variants paper --setup cpy": "Did you mean 'cpu'",
    "--out NEW --variants paper -- --seed 3": "--seed is the sweep's own",
    "--out NEW --variants paper --engine slurm": "Unknown engine",
    "--out NEW --variants paper --format html": "Unknown format",
    "--out NEW --variants paper --slots 0": "`slots`",
    "--out NEW --variants paper --devices 0,0": "none twice",
    "--out NEW --variants paper --gpus 1": "no option of the engine 'local'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_one_clear_sentence(
    recipe, tmp_path, monkeypatch, words
):
    monkeypatch.setattr(ks, "run_sweep", nothing)
    words = words.replace("NEW", str(tmp_path / "new")).split()
    with pytest.raises(SystemExit) as refused:
        recipe.main(words)
    assert str(refused.value).startswith("sweep: ")
    message = REFUSED[" ".join(words).replace(str(tmp_path / "new"), "NEW")]
    assert message in str(refused.value)
    assert not [*tmp_path.rglob("seed-*")]


@pytest.mark.parametrize(
    "words, message",
    {
        "--variants paper": "--out",
        "--out x --variants paper -- --stepz 3": "unrecognized arguments",
        "--out x --variants paper -- --steps 0": "invalid positive integer",
        "--out x --variants paper --steps 3": "sweep: --steps 3. Those of",
        "--out x --variants paper --seeds a": "or 0,4 for those. Received: 'a'",
        "--out x --variants paper --seeds 0": "or 0,4 for those. Received: '0'",
        "--out x --variants paper --rates ,": "or a name. Received: ','",
        "--out x --variants paper --rates 1e-3,,1": "Received: '1e-3,,1'",
    }.items(),
)
def test_bad_words(recipe, words, message, capsys):
    with pytest.raises(SystemExit):
        recipe.main(words.split())
    assert message in capsys.readouterr().err


def test_what_is_added_to_a_sweep_leaves_the_rest(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ks, "run_sweep", lambda *args: None)
    out = ["--out", str(tmp_path / "edge")]
    first = ["--variants", "baseline, qk_norm", "--rates", "1e-3,1e-2"]
    recipe.main([*out, *first, "--seeds", "2", "--", "--steps", "9"])
    before = ks.Sweep(out[1])
    assert "4 runs" not in capsys.readouterr().out  # Of two arms: eight.
    recipe.main([*out, "--extend", "--rates", "3e-2"])
    printed = capsys.readouterr()
    assert "12 runs to make, 0 are there." in printed.out
    assert "12 runs are still wanted." in printed.err
    after = ks.Sweep(out[1])
    assert (after.arms, after.flags) == (before.arms, before.flags)
    assert after.search == ks.Ladder((1e-3, 1e-2, 3e-2), (0, 1))
    recipe.main([*out, "--extend", "--variants", "qkv_norm"])
    more = ks.Sweep(out[1])
    assert [*more.arms] == ["baseline", "qk_norm", "qkv_norm"]
    assert (more.flags, more.search) == (after.flags, after.search)
    with pytest.raises(SystemExit, match="flags.steps is 9 there and 8 here"):
        recipe.main([*out, "--extend", "--seeds", "3", "--", "--steps", "8"])
    recipe.main([*out, "--show"])
    assert ks.Sweep(out[1]).search == more.search


def test_flags_that_an_arm_cannot_have_are_found_first(
    recipe, tmp_path, monkeypatch, capsys
):
    def experiment(flags):
        arm = ks.Arm("a", "baseline", flags)
        monkeypatch.setitem(
            ks.EXPERIMENTS, "e", ks.Experiment("e", "?", (arm,), (1e-3,))
        )
        with pytest.raises(SystemExit) as refused:
            recipe.main(["--out", str(tmp_path / "new"), "--experiment", "e"])
        return str(refused.value) + capsys.readouterr().err

    assert "has no flag --bata-2" in experiment({"bata_2": 0.9})
    assert "sweep: a: error: argument --steps" in experiment({"steps": -3})
    assert "--out is the sweep's own" in experiment({"out": "x"})
    assert not (tmp_path / "new").exists()


def test_every_experiment_can_be_declared(recipe, tmp_path, monkeypatch):
    # Declared, and stopped before the first run.
    monkeypatch.setattr(ks, "run_sweep", lambda *args: None)
    for name, experiment in ks.EXPERIMENTS.items():
        for how in ([], ["--setup", "cpu"]):
            out = str(tmp_path / f"{name}{len(how)}")
            recipe.main(["--out", out, "--experiment", name, *how])
            sweep = ks.Sweep(out)
            assert sweep.experiment == name
            assert [*sweep.arms] == [arm.label for arm in experiment.arms]
            runs = sweep.wanted()
            assert len(runs) == len(experiment.arms) * len(
                experiment.rates
            ) * len(experiment.seeds)
            for run in runs:
                recipe.command_of(sweep, ks)([run])


def test_a_command_says_all_that_was_declared(recipe, tmp_path):
    import pretrain_flags

    arm = ks.Arm("cap", ks.get_variant("soft_cap").replace(cap=3.0))
    arm.flags.update(beta_2=0.9, clip_norm="none", inputs=True)
    flags = {"steps": 5, "data": ["a", "b"], "weights": [0.5, 2.0]}
    sweep = ks.Sweep(tmp_path, [arm], ks.Ladder((1e-3,)), flags=flags)
    (run,) = sweep.wanted()
    script, *words = recipe.command_of(sweep, ks)([run])
    assert Path(script).name == "pretrain.py"
    args, before = pretrain_flags.parse(words, "", ks)
    assert before is None and args.resume and args.save == "none"
    assert ks.get_variant(args.variant) == arm.variant
    assert (args.label, args.learning_rate, args.seed) == ("cap", 1e-3, 0)
    assert (args.beta_2, args.clip_norm, args.inputs) == (0.9, "none", True)
    assert (args.steps, args.data, args.weights) == (5, ["a", "b"], [0.5, 2.0])
    assert args.out == str(tmp_path / run.folder)


@pytest.mark.slow
def test_killed_while_it_trains_the_table_is_the_same(text, tmp_path):
    def start(out):
        command = [sys.executable, str(RECIPES / "sweep.py"), "--out", str(out)]
        command += "--variants baseline,qk_norm --rates 3e-3,0.3".split()
        command += ["--slots", "2", "--", *TINY, "--steps", "400"]
        command += ["--checkpoint-every", "50", "--data", text]
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    for steps in (60, 200, 300):
        process = start(killed)
        # Killed when some run has come so far.
        while process.poll() is None:
            files = [*killed.rglob("health.jsonl")]
            lines = [file.read_bytes().count(b"\n") for file in files]
            if sum(lines) >= steps:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(killed).wait() == 0
    for name in ("table.json", "table.csv"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    again = [ks.read_run(f.parent) for f in killed.rglob("run.json")]
    assert any("resumed" in run for run in again)
