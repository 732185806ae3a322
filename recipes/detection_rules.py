"""The stopping rules of other trainers, for detection.py to compare with.

From their sources as of 2025 and 2026. Each takes the series of a run and
gives the first step, from 1, at which it fires, or None.
"""

import numpy as np


def first(fired):
    """The first step of a series of booleans, from 1; None if there is none."""
    fired = np.asarray(fired, bool)
    return int(fired.argmax()) + 1 if fired.any() else None


def terminate_on_nan(run):
    """Keras `TerminateOnNaN`: the mean loss of the epoch so far is not finite.

    The mean is float32, and all of a run is one epoch.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.cumsum(run["loss"], dtype="float32")
        return first(~np.isfinite(total / np.arange(1, len(total) + 1)))


def kill_loss_spike(run, steps=None):
    """llm-foundry `KillLossSpike(log_only=False)`: either of two rules.

    Window: the last max(100, 5 % of the run) losses, outliers among them.
    Spike: five losses in a row (more than its patience of 4), each at least
    2.0 times the window's mean. High loss: after two windows, half of the
    window or more is above min(greatest loss of the first window, 10).
    """
    loss = run["loss"]
    size = max(100, round(0.05 * (steps or len(loss))))
    row = 0
    for i in range(size, len(loss)):
        window = loss[i - size : i]
        # A comparison with NaN is false, as there.
        row = row + 1 if loss[i] >= 2.0 * mean(window) else 0
        cap = min(loss[:size].max(), 10.0)
        high = i + 1 >= 2 * size and (window > cap).sum() >= size / 2
        if row > 4 or high:
            return i + 1
    return None


def spike_detection(run):
    """Lightning `SpikeDetection()`: a loss that is not finite, or at least 3x.

    With m the mean of the last 10 losses, from the second step on: not less
    than the loss before, and |loss - m| >= 2.0 * |m|. Non-finite is a spike.
    """
    loss = run["loss"]
    for i in range(1, len(loss)):
        m = mean(loss[max(0, i - 10) : i])
        worse = loss[i] > loss[i - 1] and abs(loss[i] - m) >= 2.0 * abs(m)
        if worse or not np.isfinite(loss[i]):
            return i + 1
    return None


def megatron(run):
    """Megatron-LM's rerun machine, `check_for_spiky_loss` and NaN checks.

    A loss that is not finite, or at least 10 times the greatest of the first
    100 (and then silent during these).
    """
    loss = np.abs(run["loss"])
    fired = ~np.isfinite(loss)
    if len(loss) > 100:
        greatest = loss[:100].max()
        fired[100:] |= loss[100:] >= 10 * greatest
    return first(fired)


def olmo_core(run):
    """OLMo-core `SkipStepOptimizer`: the first step it would skip, a flag.

    Loss or gradient norm above mean + 6 * std of up to 128 values before,
    once there are 64; torch's std (n - 1), outliers stay in. Nothing fires on
    a NaN, nor while one is in the window.
    """
    found = []
    for name in ("loss", "gradient_norm"):
        x = run[name]
        for i in range(63, len(x)):
            window = x[max(0, i - 128) : i]
            with np.errstate(over="ignore", invalid="ignore"):
                over = x[i] - window.mean() > 6 * window.std(ddof=1)
            if over:
                found.append(i + 1)
                break
    return min(found, default=None)


def mean(values):
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.mean(values))


RULES = {
    "Keras TerminateOnNaN": terminate_on_nan,
    "llm-foundry KillLossSpike": kill_loss_spike,
    "Lightning SpikeDetection": spike_detection,
    "Megatron 10x of first 100": megatron,
    "OLMo-core 6 sigma (skips)": olmo_core,
}
