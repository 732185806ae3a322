"""The entropy penalty against its formula in float64, row by row."""

import math

import keras
import numpy as np
import pytest
from keras import ops
from reference import gradient

from keras_stable.choices import Entropy
from keras_stable.entropy import THETA_INIT
from keras_stable.entropy import entropy_penalty
from keras_stable.entropy import row_entropy

B, K, G, T = 2, 2, 3, 7
FLOOR = Entropy(weight=1.0, floor=0.9)
TOLERANCE = Entropy(weight=1.0, tolerance=0.2)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
THETA = np.array([0.1, 0.4, 0.9, 0.5, 0.6, 0.3], "float32")
FORMS = [(FLOOR, None), (TOLERANCE, THETA)]
forms = pytest.mark.parametrize("entropy, theta", FORMS, ids=["floor", "theta"])


def logits(size=2.0, seed=0, shape=(B, K, G, T, T)):
    rng = np.random.default_rng(seed)
    return (size * rng.normal(size=shape)).astype("float32")


def causal(segments=None):
    mask = np.tril(np.ones((T, T), "bool"))[None, None, None]
    if segments is not None:
        same = segments[:, :, None] == segments[:, None, :]
        mask = mask & same[:, None, None]
    return mask


MASKS = {
    "all": np.ones((1, 1, 1, 1, T), "bool"),
    "causal": causal(),
    "packed": causal(SEGMENTS),
    # Two keys for all queries, then none for the last but one.
    "empty": causal()[..., ::-1, :] & (np.arange(T) < 2),
}


def formula(z, mask, entropy, theta=None, segments=None):
    """A loop over queries, each with its visible keys only."""
    z, rows = np.asarray(z, "float64"), []
    mask = np.broadcast_to(mask, z.shape)
    for b, k, g, t in np.ndindex(z.shape[:-1]):
        own = z[b, k, g, t][mask[b, k, g, t]]
        if len(own) < 2 or (segments is not None and segments[b, t] == 0):
            continue
        p = np.exp(own - own.max())
        p = p[p > 0] / p.sum()
        H, log_n = -(p * np.log(p)).sum(), math.log(len(own))
        if entropy.floor is not None:
            rows.append(max(entropy.floor * log_n - H, 0.0) ** 2)
        else:
            d = H - float(theta[k * z.shape[2] + g]) * log_n
            rows.append(d**2 if abs(d) > entropy.tolerance * log_n else 0.0)
    return np.mean(rows) if rows else 0.0


@forms
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("size", [0.0, 0.3, 2.0, 30.0])
def test_is_its_formula(entropy, theta, mask, segments, size):
    z = logits(size)
    expected = formula(z, mask, entropy, theta, segments)
    found = entropy_penalty(z, mask, entropy, theta, segments)
    assert found.shape == ()
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    np.testing.assert_allclose(float(found), expected, rtol=2e-5, atol=1e-9)


@forms
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gradient_is_that_of_finite_differences(entropy, theta, mask):
    z = logits(1.5)
    found = gradient(
        lambda z: entropy_penalty(z, mask, entropy, theta, SEGMENTS), z
    )
    rng, h = np.random.default_rng(1), 1e-6
    for _ in range(8):  # in random directions
        v = rng.normal(size=z.shape)
        up, down = (
            formula(z + s * h * v, mask, entropy, theta, SEGMENTS)
            for s in (1, -1)
        )
        expected = (up - down) / (2 * h)
        np.testing.assert_allclose((found * v).sum(), expected, atol=1e-5)
    assert np.abs(found).max() > 1e-3
    assert not found[~np.broadcast_to(mask, z.shape)].any()


def test_gradient_of_theta():
    z, mask = logits(1.5), causal()
    found = gradient(lambda t: entropy_penalty(z, mask, TOLERANCE, t), THETA)
    for n in range(K * G):
        step = 1e-6 * (np.arange(K * G) == n)
        up, down = (
            formula(z, mask, TOLERANCE, THETA.astype("float64") + s * step)
            for s in (1, -1)
        )
        np.testing.assert_allclose(found[n], (up - down) / 2e-6, atol=1e-5)


@pytest.mark.parametrize("level", [0.0, -3.3, 1e4])
def test_uniform_attention_has_the_entropy_log_n(level):
    z = np.full((B, K, G, T, T), level, "float32")
    H = ops.convert_to_numpy(row_entropy(z, causal()))
    log_n = np.log(np.arange(1, T + 1))
    np.testing.assert_allclose(H, np.broadcast_to(log_n, H.shape), rtol=2e-7)
    # Exactly: also a floor of all the entropy there is asks for no more.
    for floor in (0.5, 1.0):
        strict = Entropy(weight=1.0, floor=floor)
        assert float(entropy_penalty(z, causal(), strict)) == 0
        pull = gradient(lambda z: entropy_penalty(z, causal(), strict), z)
        assert not pull.any()


def collapsed():
    z = np.zeros((B, K, G, T, T), "float32")
    z[..., 0] = 1e4  # all look at the first key
    return z


def test_collapsed_attention_pays_the_floor():
    log_n = np.log(np.arange(2, T + 1))
    found = float(entropy_penalty(collapsed(), causal(), FLOOR))
    np.testing.assert_allclose(found, np.mean((0.9 * log_n) ** 2), rtol=1e-6)
    # One key looks at itself, and H is exactly 0 there and here.
    H = row_entropy(collapsed(), causal())
    assert not ops.convert_to_numpy(H).any()


@forms
@pytest.mark.parametrize("size", [1e2, 1e4, 1e20])
def test_large_logits_are_finite(entropy, theta, size):
    for z in (logits(size), collapsed() * size / 1e4, -collapsed()):
        for mask in MASKS.values():
            value = float(entropy_penalty(z, mask, entropy, theta))
            pull = gradient(
                lambda z: entropy_penalty(z, mask, entropy, theta), z
            )
            assert math.isfinite(value) and np.isfinite(pull).all()


def test_a_collapsed_row_has_no_gradient():
    # As documented: the pull vanishes as p does, and is not wrong there.
    pulls = []
    for gap in (1.0, 10.0, 50.0, 200.0):
        z = np.array([gap, 0.0], "float32").reshape(1, 1, 1, 1, 2)
        mask = np.ones((1, 1, 1, 1, 2), "bool")
        found = gradient(lambda z: entropy_penalty(z, mask, FLOOR), z).ravel()
        p = 1 / (1 + np.exp(-np.float64(gap)))
        q = np.exp(-np.float64(gap)) * p
        H = -p * np.log(p) - q * np.log(q)
        slope = -q * (np.log(q) + H)  # dH/dz of the lower key
        row = 2 * max(0.9 * math.log(2) - H, 0)
        np.testing.assert_allclose(
            found[1], -row * slope, rtol=1e-5, atol=1e-37
        )
        # Of the larger one as a difference, to the digits of float32.
        np.testing.assert_allclose(found[0], row * slope, atol=2e-7)
        pulls.append(abs(found[1]))
    assert pulls[1] > pulls[2] > pulls[3] == 0


@forms
def test_padding_does_not_count(entropy, theta):
    z, mask = logits(), causal(SEGMENTS)
    with_junk = z.copy()
    with_junk[0, ..., 5:, :] = logits(50.0, seed=2)[0, ..., 5:, :]
    found = [
        float(entropy_penalty(x, mask, entropy, theta, SEGMENTS))
        for x in (z, with_junk)
    ]
    assert found[0] == found[1] > 0
    counted = float(entropy_penalty(with_junk, mask, entropy, theta))
    assert abs(counted - found[0]) > 1e-3
    pull = gradient(
        lambda z: entropy_penalty(z, mask, entropy, theta, SEGMENTS), z
    )
    assert not pull[0, ..., 5:, :].any()


@forms
def test_nothing_to_penalise_is_zero(entropy, theta):
    z = logits()
    one_key = np.eye(T, dtype="bool")
    padding = np.zeros((B, T), "int32")
    for mask, segments in (
        (one_key, None),
        (np.zeros((T, T), "bool"), None),
        (causal(), padding),
    ):

        def penalty(z):
            return entropy_penalty(z, mask, entropy, theta, segments)

        assert float(penalty(z)) == 0
        assert not gradient(penalty, z).any()


@forms
def test_order_of_keys_does_not_matter(entropy, theta):
    z, mask = logits(), np.broadcast_to(causal(), (B, K, G, T, T))
    order = np.random.default_rng(3).permutation(T)
    found = [
        float(entropy_penalty(z[..., i], mask[..., i], entropy, theta))
        for i in (np.arange(T), order)
    ]
    np.testing.assert_allclose(*found, rtol=1e-6)


@forms
def test_invisible_keys_and_shifts_do_not_matter(entropy, theta):
    z = logits()
    base = float(entropy_penalty(z, causal(), entropy, theta))
    other = np.where(causal(), z, 77.0).astype("float32")
    assert float(entropy_penalty(other, causal(), entropy, theta)) == base
    shifted = float(entropy_penalty(z + 8.0, causal(), entropy, theta))
    np.testing.assert_allclose(shifted, base, rtol=1e-5)


def test_heads_are_in_the_order_of_grouped_queries():
    # Uniform attention, d = (1 - theta) log n; head k G + g is at (k, g).
    z = np.zeros((B, K, G, T, T), "float32")
    theta = np.ones(K * G, "float32")
    theta[1 * G + 2] = 0.5
    z_other = z.copy()
    z_other[:, 1, 2, :, 0] = 1e4  # H = 0: now |d| = log n / 2, as before
    expected = np.mean((0.5 * np.log(np.arange(2, T + 1))) ** 2) / (K * G)
    for x in (z, z_other):
        found = float(entropy_penalty(x, causal(), TOLERANCE, theta))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The same heads as multi-head attention and as grouped queries.
    z = logits()
    found = [
        float(
            entropy_penalty(
                z.reshape(B, keys, -1, T, T), causal(), TOLERANCE, THETA
            )
        )
        for keys in (1, 2, 3, 6)
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-6)


def test_a_mean_does_not_depend_on_how_often_a_sequence_occurs():
    z = logits()
    twice = np.concatenate([z, z])
    found = [float(entropy_penalty(x, causal(), FLOOR)) for x in (z, twice)]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_published_code_on_full_rows():
    """Where all is visible, the published sum is this mean times B T."""
    z = logits(3.0)
    p = np.exp(z.astype("float64"))
    p = p / p.sum(-1, keepdims=True)
    H = -(p * np.log(p + 1e-9)).sum(-1)
    d = H - THETA.reshape(K, G, 1) * math.log(T)
    outside = np.abs(d) > 0.2 * math.log(T)
    published = np.where(outside, d, 0.0) ** 2
    published = published.sum() / (K * G)
    found = float(entropy_penalty(z, MASKS["all"], TOLERANCE, THETA))
    np.testing.assert_allclose(found * B * T, published, rtol=1e-5)


def test_theta_may_be_a_variable():
    theta = keras.Variable(np.full(K * G, THETA_INIT), dtype="float32")
    found = ops.stop_gradient(
        entropy_penalty(logits(), causal(), TOLERANCE, theta)
    )
    expected = formula(logits(), causal(), TOLERANCE, [THETA_INIT] * K * G)
    np.testing.assert_allclose(float(found), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_takes_float32_logits_only(dtype):
    with pytest.raises(ValueError, match=f"float32.*Received: dtype {dtype}"):
        entropy_penalty(ops.cast(logits(), dtype), causal(), FLOOR)


def test_is_float32_under_any_policy():
    keras.config.set_dtype_policy("bfloat16")
    found = entropy_penalty(logits(), causal(), TOLERANCE, THETA)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    expected = formula(logits(), causal(), TOLERANCE, THETA)
    np.testing.assert_allclose(float(found), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "entropy, theta, message",
    [
        (TOLERANCE, None, r"needs `theta`.*\(6,\).*Received: None"),
        (TOLERANCE, np.ones(3), r"needs `theta`.*\(6,\).*shape \(3,\)"),
        (TOLERANCE, np.ones((2, 3)), r"needs `theta`.*shape \(2, 3\)"),
        (FLOOR, THETA, r"`theta` belongs to Entropy\(tolerance=\.\.\.\)"),
    ],
)
def test_errors(entropy, theta, message):
    with pytest.raises(ValueError, match=message):
        entropy_penalty(logits(), causal(), entropy, theta)
