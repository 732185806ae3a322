"""Processes with slots, devices and claims; on this machine and on Ray."""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import keras
import pytest

import keras_stable as ks
from keras_stable import processes

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "jax",
        reason="Engines start processes: the same on all backends.",
    ),
    # Ray forks to start others, where earlier tests have made jax's threads.
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]
HAS_RAY = importlib.util.find_spec("ray") is not None
NAMES = (
    "OMP_NUM_THREADS PJRT_NPROC CUDA_VISIBLE_DEVICES "
    "XLA_PYTHON_CLIENT_MEM_FRACTION XLA_PYTHON_CLIENT_PREALLOCATE "
    "JAX_COMPILATION_CACHE_DIR"
).split()
# Prints those, and waits until it may end.
TELLS = f"""
import json, os, pathlib, sys, time
print(json.dumps({{n: os.environ.get(n) for n in {NAMES!r}}}), flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
sys.exit(int(sys.argv[2]))
"""
# Saves when it is told to, as pretrain.py does.
SAVES = """
import signal, sys, time
def save(*args):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module", autouse=True)
def plain():
    """Without what the environment of the tests asks for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def signals():
    yield
    # Ray leaves a handler of its own behind, also where there is no cluster.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def task(folder, *command):
    folder.mkdir(exist_ok=True)
    return ks.Task((folder.name,), [str(c) for c in command], [folder])


def wait(workers):
    ended = []
    while workers.tasks:
        ended += workers.ended()
        time.sleep(0.01)
    return ended


def wait_for(text, folder):
    file = folder / processes.OUTPUT
    while not file.exists() or text not in file.read_text():
        time.sleep(0.01)


def environments(tmp_path, **options):
    """Of processes that fill all slots at once, by the order of starting."""
    workers = ks.workers("local", **options)
    go = tmp_path / "go"
    tasks = [
        task(tmp_path / str(i), "-c", TELLS, go, i)
        for i in range(workers.capacity)
    ]
    for each in tasks:
        assert workers.start(each)
    assert workers.ended() == []
    go.touch()
    ended = wait(workers)
    assert {*ended} == {*tasks}
    assert [t.exit_code for t in tasks] == [*range(len(tasks))]
    return [json.loads(t.tail()) for t in tasks]


def test_slots_share_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    found = environments(tmp_path, slots=3, cache=tmp_path / "cache")
    for each in found:
        assert each["OMP_NUM_THREADS"] == each["PJRT_NPROC"] == "2"
        assert each["CUDA_VISIBLE_DEVICES"] is None
        # Of a GPU that all of them see, three times 0.3.
        assert each["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.300"
        assert each["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
        folder = each["JAX_COMPILATION_CACHE_DIR"]
        assert Path(folder).parent == tmp_path / "cache"


def test_one_slot_has_the_machine_to_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    (found,) = environments(tmp_path)
    assert found["OMP_NUM_THREADS"] == "8"
    for name in NAMES[2:]:
        assert found[name] is None


def test_slots_take_turns_on_devices(tmp_path):
    found = environments(tmp_path, slots=5, devices=["0", "3"])
    devices = [each["CUDA_VISIBLE_DEVICES"] for each in found]
    assert devices == ["0", "3", "0", "3", "0"]
    # Three at most on one of them.
    assert found[0]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.300"
    assert all(each["OMP_NUM_THREADS"] == "1" for each in found)


def test_a_device_for_each_slot_is_not_shared(tmp_path):
    found = environments(tmp_path, devices=["0", "1"])
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["0", "1"]
    assert found[0]["XLA_PYTHON_CLIENT_MEM_FRACTION"] is None


def test_what_the_caller_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    found = environments(tmp_path, slots=2, devices=["1"])
    for each in found:
        assert each["OMP_NUM_THREADS"] == "7"
        assert each["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        assert each["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_freed_slot_is_used_again(tmp_path):
    workers = ks.workers("local", slots=2, devices=["0", "1"])
    go, stay = tmp_path / "go", tmp_path / "stay"
    first = task(tmp_path / "0", "-c", TELLS, go, 0)
    second = task(tmp_path / "1", "-c", TELLS, stay, 0)
    workers.start(first)
    workers.start(second)
    go.touch()
    while not workers.ended():
        time.sleep(0.01)
    assert workers.tasks == [second]
    third = task(tmp_path / "2", "-c", TELLS, go, 0)
    workers.start(third)
    stay.touch()
    wait(workers)
    devices = [
        json.loads(each.tail())["CUDA_VISIBLE_DEVICES"]
        for each in (first, second, third)
    ]
    assert devices == ["0", "1", "0"]


def test_the_end_of_what_was_printed(tmp_path):
    workers = ks.workers("local")

    def run(text):
        each = task(tmp_path / "0", "-c", text)
        workers.start(each)
        wait(workers)
        return each

    bar = "for i in range(99): print(f'\\rstep {i}', end='')"
    each = run(f"{bar}\nprint()\nprint('word ' * 99)")
    assert each.tail().startswith("step 98\nword word")
    assert each.tail(30) == each.tail()[-30:] and len(each.tail(30)) == 30
    # Of what is appended, its own part alone.
    each = run("1 / 0")
    assert each.tail().endswith("ZeroDivisionError: division by zero")
    assert "word" not in each.tail() and each.exit_code == 1
    each = run("pass")
    assert each.tail() == "" and each.exit_code == 0


def test_stopped_and_killed(tmp_path):
    workers = ks.workers("local", slots=2)
    for how, code in ((workers.stop, 75), (workers.kill, -signal.SIGKILL)):
        place = tmp_path / how.__name__
        each = task(place, "-c", SAVES)
        workers.start(each)
        wait_for("up", place)
        how()
        assert wait(workers) == [each] and each.exit_code == code
        assert ("saved" in each.tail()) == (code == 75)


def test_a_folder_has_one_process(tmp_path):
    workers = ks.workers("local", slots=3)
    go = tmp_path / "go"
    first = task(tmp_path / "0", "-c", TELLS, go, 0)
    assert workers.start(first)
    assert not workers.start(task(tmp_path / "0", "-c", "pass"))
    both = task(tmp_path / "1", "-c", "pass")
    both.folders.append(tmp_path / "0")
    assert not workers.start(both)
    assert workers.tasks == [first]
    # What could not have all of its folders holds none.
    assert workers.start(task(tmp_path / "1", "-c", "pass"))
    go.touch()
    wait(workers)
    assert workers.start(task(tmp_path / "0", "-c", "pass"))
    wait(workers)


def test_a_lock_dies_with_its_process(tmp_path):
    file = tmp_path / "lock"
    first = processes.lock(file)
    assert first is not None and processes.lock(file) is None
    os.close(first)
    second = processes.lock(file)
    assert second is not None
    os.close(second)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(processes.fcntl, "flock", refuse)
    workers = ks.workers("local")
    assert workers.start(task(tmp_path / "0", "-c", "pass"))
    assert wait(workers)[0].exit_code == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"engine": "lokal"}, "Did you mean 'local'"),
        ({"slots": 0}, "`slots` must be an integer, at least 1"),
        ({"slots": 1.5}, "`slots` must be an integer"),
        ({"devices": ["0", "0"]}, "none twice"),
        ({"devices": ["0", ""]}, "names of CUDA devices"),
        ({"devices": ["0", "1"], "slots": 1}, "as many slots"),
        ({"gpus": 1}, "no option of the engine 'local', which takes slots"),
        ({"engine": "ray", "slots": 2}, "no option of the engine 'ray'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ks.workers(**options)


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"keras-stable\[ray\]"):
        ks.workers("ray")


# On Ray.


@pytest.fixture(scope="module")
def ray(plain):
    ray = pytest.importorskip("ray", reason="Ray is not installed.")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield ray
    ray.shutdown()


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed.")
def test_without_a_cluster_the_error_says_how_to_begin_one():
    with pytest.raises(ValueError, match="ray start --head"):
        ks.workers("ray", address="auto")


def test_commands_on_a_cluster(ray, tmp_path):
    workers = ks.workers("ray", cache=tmp_path / "cache")
    assert workers.capacity == 2
    go = tmp_path / "go"
    tasks = [task(tmp_path / str(i), "-c", TELLS, go, i) for i in range(3)]
    for each in tasks:
        assert workers.start(each)
    assert workers.ended() == []
    go.touch()
    assert {*wait(workers)} == {*tasks}
    assert [each.exit_code for each in tasks] == [0, 1, 2]
    found = json.loads(tasks[0].tail())
    assert found["OMP_NUM_THREADS"] == found["PJRT_NPROC"] == "1"
    assert found["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path))


def test_a_cluster_hands_signals_on(ray, tmp_path):
    workers = ks.workers("ray")
    first = task(tmp_path / "0", "-c", SAVES)
    workers.start(first)
    wait_for("up", tmp_path / "0")
    # Another on the same files is told that it was not begun.
    second = task(tmp_path / "0", "-c", "pass")
    workers.start(second)
    while second in workers.tasks:
        workers.ended()
    assert second.exit_code is None
    workers.stop()
    assert wait(workers) == [first]
    assert first.exit_code == 75 and first.tail() == "up\nsaved"


def test_a_cluster_where_the_directory_is_not(ray, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    workers = ks.workers("ray")
    monkeypatch.chdir(tmp_path)
    here.rmdir()
    each = task(tmp_path / "0", "-c", "pass")
    workers.start(each)
    wait(workers)
    assert each.exit_code == 1 and "No such file or directory" in each.tail()


def test_what_does_not_fit_into_a_cluster(ray):
    assert ks.workers("ray", cpus=2).capacity == 1
    with pytest.raises(ValueError, match="3 CPUs and 0 GPUs does not fit"):
        ks.workers("ray", cpus=3)
    with pytest.raises(ValueError, match="0.5 GPUs does not fit"):
        ks.workers("ray", gpus=0.5)


def test_a_sweep_on_a_cluster(ray, tmp_path):
    arms = [ks.Arm("strong", "baseline"), ks.Arm("shaky", "baseline")]
    sweep = ks.Sweep(tmp_path, arms, ks.Ladder((1e-3, 2e-2, 4e-2)))
    stand_in = str(Path(__file__).with_name("stand_in.py"))

    def command(runs):
        (run,) = runs
        place = os.path.abspath(sweep.path / run.folder)
        words = [place, run.label, f"{run.learning_rate:g}", str(run.seed)]
        return [stand_in, "0", *words]

    with open(os.devnull, "w") as nowhere:
        display = ks.Display(nowhere)
        how = (ks.workers("ray"), command, 1, display, 0.05)
        rows = ks.run_sweep(sweep, *how)
    for row in rows:
        assert row["interval"] == "0.02 (1/1) to 0.04 (0/1)"
        assert row["failed"] == 0
