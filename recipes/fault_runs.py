"""One training in a process of its own, and what it leaves: for `faults.py`."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint  # noqa: E402, F401  Once, for all who are forked.

import keras_stable as ks  # noqa: E402

# A checkpoint every 10 of 60 steps. What may be done twice: those, and the
# steps made while a checkpoint was being written.
STEPS, EVERY, SECONDS = 60, 10, 0.01


def train(path, at=None, config=None, join=None):
    """Trains from the newest checkpoint in a directory to the last step.

    Args:
        path: of the run. Gets `result.json` at the end.
        at: dictionary from steps to functions called before them.
        config: dictionary, of the run.
        join: arguments of `ks.join_processes`.
    """
    if join is not None:
        ks.join_processes(*join)
    keras.utils.set_random_seed(0)
    if join is not None:
        ks.set_distribution("data", 4)
    documents = ks.load_corpus(str(path / "text.txt"))
    tokens = ks.pack(documents, ks.ByteTokenizer())
    data = ks.TokenBatches(tokens, 4, 8)
    lm = ks.StableCausalLM(ks.StableBackbone(256, 1, 1, 8, dropout=0.1))
    lm.compile(ks.AdamW(1e-2))
    monitor = ks.StabilityMonitor(path, every=None, verbose=0)
    checkpoints = ks.Checkpoints(
        path / "checkpoints",
        every=EVERY,
        data=data,
        monitor=monitor,
        config=config or {"run": 1},
    )
    begin = checkpoints.restore(lm)
    print(f"BEGINS AFTER {begin}", flush=True)

    def before(batch, logs):
        time.sleep(SECONDS)
        action = (at or {}).get(begin + batch)
        if action is not None:
            action(lm)

    pace = keras.callbacks.LambdaCallback(on_train_batch_begin=before)
    if begin < STEPS:
        callbacks = [monitor, checkpoints, pace]
        lm.fit(data.repeat()[: STEPS - begin], callbacks=callbacks, verbose=0)
    digest = hashlib.sha256()
    for variable in [*lm.variables, *lm.optimizer.variables]:
        digest.update(
            np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
        )
    result = {"begin": begin, "weights": digest.hexdigest()}
    (path / "result.json").write_text(json.dumps(result))


def poison(lm, rng):
    """Makes one number of a matrix, of weights or slots, NaN."""
    if hasattr(lm, "jax_state_sync"):
        lm.jax_state_sync()
    variables = [*lm.trainable_variables, *lm.optimizer.variables]
    variable = rng.choice([v for v in variables if len(v.shape) == 2])
    value = np.array(keras.ops.convert_to_numpy(variable))
    value.flat[rng.randrange(value.size)] = np.nan
    variable.assign(value)


def start(path, **how):
    """Forks a process that trains; returns its id.

    Nothing was computed before, so that a fork is as good as a new process,
    without the seconds that imports take.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(path / "log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)
        train(path, **how)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def finish(pid, seconds=300):
    """The exit code of a process, minus a signal; None if it does not end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def until(condition, pid):
    """Waits until something holds, or a process has ended."""
    while not condition() and Path(f"/proc/{pid}").exists():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)


def log(path):
    file = path / "log.txt"
    return file.read_text(errors="replace") if file.exists() else ""


def last_step(path):
    """The last step that the monitor recorded."""
    try:
        steps, _ = ks.read_health(path).series("loss")
    except OSError:
        return 0
    return int(steps[-1]) if len(steps) else 0


def numbered(path):
    """Directories of checkpoints, oldest first."""
    return sorted(p for p in path.glob("checkpoints/*/") if p.name.isdecimal())


def completed(path):
    """Steps of checkpoints that were completed."""
    return [
        int(p.name) for p in numbered(path) if (p / "manifest.json").exists()
    ]


def outcome(path, reference, made, saved, message=None):
    """Starts the run once more and tells how that went.

    Args:
        reference: digest of the weights of an undisturbed run.
        made: int. Steps made before the fault.
        saved: int. Step of the newest checkpoint that must be good.
        message: what must be said.
    """
    size = len(log(path))
    code = finish(start(path))
    said = log(path)[size:]
    if code != 0:
        return {"result": "failed", "code": code, "log": said[-2000:]}
    result = json.loads((path / "result.json").read_text())
    wrong = []
    if result["weights"] != reference:
        wrong.append("other weights")
    if result["begin"] < saved:
        wrong.append(f"a good checkpoint of {saved} was not used")
    if message is not None and message not in said:
        wrong.append(f"no message {message!r}")
    return {
        "result": "; ".join(wrong) or "resumed",
        "lost": max(made - result["begin"], 0),
        **({"log": said[-2000:]} if wrong else {}),
    }


def refusal(path, messages, **how):
    """Starts a run that must be refused, with one of some messages."""
    size = len(log(path))
    code = finish(start(path, **how))
    said = log(path)[size:]
    right = code == 1 and any(message in said for message in messages)
    right = right and "BEGINS" not in said
    if right:
        return {"result": "refused"}
    return {"result": "not refused", "code": code, "log": said[-2000:]}
