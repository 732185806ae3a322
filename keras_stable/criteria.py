"""Scores and classes of a whole run, from its recorded curves: pure numpy.

Arguments are curves of one number a step, as lists or arrays. What a curve is
too short for is NaN.
"""

import numpy as np

from keras_stable.detectors import SERIES
from keras_stable.detectors import Spike
from keras_stable.events import check

# What endings mean, in the order in which they are looked for, to be read
# beside results. The limits are the defaults of `classify`, `Spike` and
# `collapsed`.
MEANINGS = {
    "failed": "No result after every attempt: it counts nowhere.",
    "nonfinite": "A NaN or infinity among the training losses, the gradient "
    "norms (but for steps that loss scaling left out) or the final validation "
    "loss.",
    "diverged": "The median of the last 2 % of the training losses (20 at "
    "least) rose by more than 0.5 nats above its least value and stayed there "
    "for the last 5 % of the steps or more. Or the final validation loss is "
    "no better than the unigram entropy of the text, or than the loss of the "
    "first step: such a run counts as lost, so that too few steps at a low "
    "rate look like an unstable rate. Or, if it has not collapsed, the "
    "monitor ended it before its last step.",
    "collapsed": "In the last table over half of the attention heads look at "
    "a single key: their normalised entropy is below 0.01.",
    "degraded": "At a higher rate than the best of its label, with a final "
    "validation loss more than 0.25 nats above that: the best with the same "
    "seed, if that was run at the best rate, otherwise with any.",
    "spiked": "After step 64, a training loss was over 6 sigma and 0.4 nats "
    "above the median of the last 128 usual ones, or three of five were over "
    "6 sigma and 0.1 nats.",
    "converged": "None of these.",
}


def _curve(values, what):
    values = np.asarray(values, "float64")
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"`{what}` must be one number for each step. Received: shape "
            f"{values.shape}"
        )
    return values


def _over_windows(statistic, values, window):
    # In pieces: the windows of a long run together would fill the memory.
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    pieces = range(0, len(windows), 4096)
    # A curve may hold infinities, whose difference is NaN.
    with np.errstate(invalid="ignore"):
        return np.concatenate(
            [statistic(windows[i : i + 4096], axis=-1) for i in pieces]
        )


def _moments_before(values, window):
    # Mean and population deviation of the `window` values before each one.
    past = values[:-1]
    mean = _over_windows(np.mean, past, window)
    return mean, _over_windows(np.std, past, window)


def spike_score_paper(values, window=1000, sigma=7.0):
    """OLMo 2's spike score as its paper words it, in percent.

    `100 * mean(|x_t - mean| >= sigma * std)` over all steps, with the mean
    and the population std of the previous `window` values; steps without a
    full window before them are no spikes. The paper does not say what its std
    is taken over. A NaN blinds the score while it is in the window.

    Args:
        values: curve of losses or gradient norms.
        window: int. Defaults to 1000. sigma: float. Defaults to 7.

    >>> spike_score_paper([3.0, 3.1] * 1249 + [9.0, 3.0])  # 1 step of 2500.
    0.04

    Reference:
        [OLMo team, 2024](https://arxiv.org/abs/2501.00656)
    """
    values = _curve(values, "values")
    check("sigma", sigma, 0, above=True)
    if len(values) <= check("window", window, 2):
        return float("nan")
    mean, std = _moments_before(values, window)
    with np.errstate(invalid="ignore"):
        distance = np.abs(values[window:] - mean)
    # A constant window has no deviations to count in.
    spikes = (std >= 1e-10) & (distance >= sigma * std)
    return float(100 * spikes.sum() / len(values))


def spike_score_olmo_core(loss, gradient_norm, window=128, sigma=6.0):
    """OLMo-core's `spike/SpikeScore (total)`, a fraction of all steps.

    `mean(loss or gradient norm > mean + sigma * std)`: one-sided, mean and
    population std over the previous full window, in which outliers stay, so
    that a NaN blinds it for `window` steps; nothing if the std is < 1e-10.

    Args:
        loss, gradient_norm: curves of the same length.
        window: int. Defaults to 128. sigma: float. Defaults to 6.

    >>> spike_score_olmo_core([3.0, 3.1] * 99 + [4.0, 3.0], [1.0] * 200)
    0.005

    Reference: OLMo-core, `train/callbacks/stability_monitor.py`.
    """
    curves = _curve(loss, "loss"), _curve(gradient_norm, "gradient_norm")
    if len(curves[0]) != len(curves[1]):
        raise ValueError(
            "`loss` and `gradient_norm` must be of the same steps. Received: "
            f"{len(curves[0])} and {len(curves[1])} values"
        )
    check("sigma", sigma, 0, above=True)
    if len(curves[0]) <= check("window", window, 2):
        return float("nan")
    spikes = False
    for values in curves:
        mean, std = _moments_before(values, window)
        spikes |= (std >= 1e-10) & (values[window:] > mean + sigma * std)
    return float(spikes.sum() / len(curves[0]))


def spike_rate_robust(losses, height=0.1, window=201):
    """Steps with a loss over the rolling median, in 10,000.

    `1e4 * mean(x_t > median(x_{t-window//2} .. x_{t+window//2}) + height)`
    over the steps that have the whole window around them.

    Args:
        losses: curve, in nats. window: odd int. Defaults to 201.
        height: nats, 0.1; below about five standard deviations of the batch
            loss it counts noise.

    >>> spike_rate_robust([3.0] * 1050 + [3.5] + [3.0] * 1149)  # 1 of 2000.
    5.0

    Reference: the Qwen3.8-Next report (read second-hand).
    """
    losses = _curve(losses, "losses")
    check("height", height, 0)
    if check("window", window, 3) % 2 == 0:
        raise ValueError(f"`window` must be odd. Received: {window}")
    if len(losses) < window:
        return float("nan")
    half = window // 2
    median = _over_windows(np.median, losses, window)
    return float(1e4 * np.mean(losses[half:-half] > median + height))


def time_to_loss(losses, level, window=20):
    """How many steps it took to reach a loss; NaN if it was not reached.

    The first t of which the median of the losses of steps t - window + 1 to t
    is at most `level`; steps count from 1. Times the tokens of a step it is
    the number of tokens.

    Args:
        losses: curve, in nats.
        level: nats.
        window: int. Defaults to 20.

    >>> time_to_loss([5.0 - 0.1 * step for step in range(40)], 3.0, window=5)
    23.0
    """
    losses = _curve(losses, "losses")
    if len(losses) < check("window", window, 1):
        return float("nan")
    smooth = _over_windows(np.median, losses, window)
    reached = np.flatnonzero(smooth <= level)
    return float(reached[0] + window) if len(reached) else float("nan")


def classify(
    losses,
    gradient_norms=None,
    *,
    validation=None,
    initial=None,
    unigram=None,
    best_validation=None,
    window=0.02,
    rise=0.5,
    tail=0.05,
    gap=0.25,
):
    """How a run ended, in one word.

    With s_t the median of the last w = max(20, `window` * steps) losses, m_t
    its least value so far and T the last step, the first that applies of:

    ```
    "nonfinite"   a NaN or infinity among the arguments
    "diverged"    there is a t0 <= T - tail * steps with
                  s_t > m_t0 + rise for all t >= t0,
                  or final >= min(initial, unigram)
    "degraded"    validation > best_validation + gap
    "spiked"      a `detectors.Spike` on the losses found something
    "converged"   otherwise
    ```

    Args:
        losses: training losses, in nats, of every step.
        gradient_norms: without those of steps that loss scaling left out.
        validation: final validation loss; `final` above. Without it, s_T.
        initial: loss at initialisation. Defaults to the first loss.
        unigram: loss of the best constant prediction.
        best_validation: of the same method and seed over learning rates.
        window, tail: fractions of the steps.
        rise, gap: nats.

    Raises:
        ValueError: for an empty curve or a negative threshold.

    >>> classify([5.5 - 0.01 * step for step in range(400)])
    'converged'
    """
    losses = _curve(losses, "losses")
    for name, value in zip(
        ("window", "rise", "tail", "gap"), (window, rise, tail, gap)
    ):
        check(name, value, 0)
    given = (validation, initial, unigram, best_validation)
    given = [number for number in given if number is not None]
    norms = [] if gradient_norms is None else gradient_norms
    everything = [losses, norms, given]
    if not all(np.isfinite(np.asarray(x, float)).all() for x in everything):
        return "nonfinite"
    steps = len(losses)
    w = min(steps, max(20, round(window * steps)))
    smooth = _over_windows(np.median, losses, w)
    lowest = np.minimum.accumulate(smooth)
    least_after = np.minimum.accumulate(smooth[::-1])[::-1]
    starts = np.arange(len(smooth)) <= len(smooth) - 1 - tail * steps
    final = smooth[-1] if validation is None else validation
    chance = losses[0] if initial is None else initial
    chance = chance if unigram is None else min(chance, unigram)
    if (starts & (least_after > lowest + rise)).any() or final >= chance:
        return "diverged"
    if validation is not None and best_validation is not None:
        if validation > best_validation + gap:
            return "degraded"
    spike = Spike("loss", *SERIES["loss"])
    found = [spike.update(step, loss) for step, loss in enumerate(losses)]
    return "spiked" if any(found) else "converged"
