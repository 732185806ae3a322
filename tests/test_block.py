"""The block against its formula, for every variant."""

import dataclasses

import keras
import numpy as np
import pytest
import reference

from keras_stable import PAPER
from keras_stable import VARIANTS
from keras_stable import Placement
from keras_stable import TransformerBlock
from keras_stable import Variant

B, T, D, N = 2, 7, 16, 2
CAUSAL = np.tril(np.ones((T, T), bool))
DOCUMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1] * 7], "int32")


def data(seed=0):
    return np.random.default_rng(seed).normal(size=(B, T, D)).astype("float32")


def built(variant, **kwargs):
    layer = TransformerBlock(N, variant=variant, name="block", **kwargs)
    layer.build((B, T, D))
    reference.randomize(layer)
    if getattr(variant, "name", variant) == "sigma_reparam":
        x = data()
        # Converges on the new kernels: one step of power iteration a call.
        for _ in range(300):
            layer.next_state(training=True)
        assert np.isfinite(numpy(layer(x))).all()
    return layer


def numpy(x):
    return keras.ops.convert_to_numpy(x)


# Shipped models are compared with `transformers` in test_families.py; at
# inference penalties change nothing.
METHODS = [*PAPER, "entropy_floor", "entropy_band"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("packed", [False, True])
def test_block_is_the_formula(name, packed):
    layer, x = built(name), data()
    visible = CAUSAL[None, None]
    segments = None
    if packed:
        segments = DOCUMENTS
        same = DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]
        visible = visible & same[:, None]
    w = reference.weights_of(layer)
    expected = reference.block(x.astype("float64"), w, name, N, visible)
    y = numpy(layer(x, segment_ids=segments))
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branch", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["baseline", "qk_fc_norm", "sigma_reparam"])
def test_an_inner_norm_is_the_formula(name, branch):
    place = dataclasses.replace(
        getattr(VARIANTS[name], branch), inner="layer"
    )
    variant = VARIANTS[name].replace(**{branch: place}, name=name)
    layer, x = built(variant), data()
    w = reference.weights_of(layer)
    width = {"attention": D, "mlp": 4 * D}[branch]
    assert w[f"{branch}/inner_norm/scale"].shape == (width,)
    other = {"attention": "mlp", "mlp": "attention"}[branch]
    assert not any(path.startswith(f"{other}/inner_norm") for path in w)
    expected = reference.block(x.astype("float64"), w, name, N, CAUSAL)
    np.testing.assert_allclose(numpy(layer(x)), expected, atol=1e-5, rtol=1e-5)
    # Not what the block is without it.
    plain = {k: v for k, v in w.items() if "inner_norm" not in k}
    plain = reference.block(x.astype("float64"), plain, name, N, CAUSAL)
    assert np.abs(expected - plain).max() > 0.1
    again = built(variant, remat=branch == "mlp")
    again.set_weights(layer.get_weights())
    again = numpy(again(x, training=False))
    np.testing.assert_allclose(again, expected, atol=1e-5, rtol=1e-5)


INNER = VARIANTS["baseline"].replace(inner="layer")


@pytest.mark.parametrize(
    "name", [*VARIANTS, INNER], ids=lambda v: getattr(v, "name", v)
)
def test_later_tokens_and_other_documents_have_no_gradient(name):
    layer = built(name)
    for segments, token, seen in (
        (None, 3, [0, 1, 2, 3]),
        (DOCUMENTS, 4, [3, 4]),
    ):
        grad = reference.gradient(
            lambda x: keras.ops.sum(
                layer(x, segment_ids=segments)[0, token] ** 2
            ),
            data(),
        )
        size = np.abs(grad[0]).max(-1)
        assert (size[seen] > 0).all()
        assert (np.delete(size, seen) == 0).all()
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("remat", ["mlp", "block"])
@pytest.mark.parametrize("name", ["baseline", "sigma_reparam", "qk_norm_cap"])
def test_remat_changes_nothing(name, remat):
    plain = built(name, dropout=0.2, seed=3)
    again = built(name, dropout=0.2, seed=3, remat=remat)
    again.set_weights(plain.get_weights())
    x = data()
    grads = []
    for layer in (plain, again):
        # Both have made the same calls: the seed and u are the same too.
        state = layer.next_state(training=True)
        grads.append(
            reference.gradient(
                lambda x: keras.ops.sum(
                    layer(x, state=state, training=True) ** 2
                ),
                x,
            )
        )
    np.testing.assert_allclose(*grads, atol=1e-5, rtol=1e-5)
    assert np.abs(grads[0]).max() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_sixteen_bits_are_finite_and_near(name, policy):
    full = built(name)
    half = TransformerBlock(N, variant=name, dtype=policy)
    half.build((B, T, D))
    half.set_weights(full.get_weights())
    y = half(keras.ops.cast(data(), "bfloat16"))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    y = numpy(keras.ops.cast(y, "float32"))
    expected = numpy(full(data()))
    error = np.abs(y - expected).max() / np.abs(expected).max()
    # bfloat16 has 8 bits: 0.4 % a rounding, a dozen roundings in a row.
    assert error < 0.08


def test_placement_is_the_equation():
    place = Placement(
        pre=None, branch="rms_plain", stream="layer_plain", skip=2.0, gain=0.5
    )
    variant = Variant(name="all", attention=place, mlp=place)
    layer, x = built(variant), data()

    def rms(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def norm(x):
        return rms(x - x.mean(-1, keepdims=True))

    for branch in (layer.attention, layer.mlp):
        x = norm(2.0 * x + 0.5 * rms(numpy(branch(x))))
    np.testing.assert_allclose(numpy(layer(data())), x, atol=1e-5)


def test_depth_formulas_are_resolved_by_the_number_of_blocks():
    place = Placement(pre=None, stream="layer", skip="deepnorm")
    variant = Variant(name="deep", attention=place, mlp=place)
    assert variant.at(8, layer=0).attention.skip == pytest.approx(2.0)


def test_the_cap_of_keras_is_not_ours():
    q = keras.ops.convert_to_tensor(data().reshape(B, T, N, D // N))
    # Off TPU this argument is refused; where it is not, the formula differs.
    with pytest.raises(ValueError):
        keras.ops.dot_product_attention(q, q, q, attn_logits_soft_cap=50.0)


def test_remat_by_its_names():
    for given, name in ((True, "block"), (False, "none"), ("mlp", "mlp")):
        assert TransformerBlock(N, remat=given).get_config()["remat"] == name
    with pytest.raises(ValueError, match="'none', 'mlp', 'block'"):
        TransformerBlock(N, remat="all")


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="others do not tell what they keep"
)
def test_remat_keeps_less():
    from jax._src.ad_checkpoint import saved_residuals

    sizes = {}
    for remat in ("none", "mlp", "block"):
        block = built("baseline", remat=remat)
        kept = saved_residuals(lambda x: block(x, training=True), data())
        sizes[remat] = sum(array.size for array, _ in kept)
    assert sizes["block"] < sizes["mlp"] < sizes["none"]
