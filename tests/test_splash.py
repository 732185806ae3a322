"""The kernels of TPUs, run without one, against the formula of `attend`."""

import importlib.util

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import telemetry
from keras_stable.attend import attend
from keras_stable.choices import Clip
from keras_stable.choices import Softmax

if keras.backend.backend() != "jax":
    pytest.skip("TPUs are driven by jax", allow_module_level=True)

import jax  # noqa: E402
from jax import numpy as jnp  # noqa: E402

from keras_stable.backend import jax as backend  # noqa: E402
from keras_stable.backend import jax_kernels  # noqa: E402
from keras_stable.backend import splash  # noqa: E402

RNG = np.random.default_rng(0)


def tensors(B, T, N, K, H, dtype="float32"):
    """Queries, keys and values of logits of some units, and documents."""
    shapes = [(B, T, n, H) for n in (N, K, K)]
    found = [jnp.asarray(2 * RNG.normal(size=s), dtype) for s in shapes]
    return found, np.sort(RNG.integers(0, 4, (B, T)), axis=1)


def gradients(function, given):
    """What a function of q, k and v gives, and its gradients."""
    weight = RNG.normal(size=given[0].shape).astype("float32")

    def total(*given):
        y = function(*given)
        return (y.astype("float32") * weight).sum(), y

    way = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
    (_, y), found = jax.jit(way)(*given)
    assert y.dtype == given[0].dtype
    return [np.asarray(x, "float32") for x in (y, *found)]


CASES = [
    # B, T, N, K, H, cap, window, documents: lengths of blocks and others.
    (2, 128, 2, 2, 16, None, None, False),
    (1, 200, 4, 2, 32, 3.0, None, True),
    (1, 256, 2, 1, 64, None, 50, True),
    (2, 90, 2, 1, 128, 5.0, 7, False),
    (1, 384, 1, 1, 64, 2.0, 1, True),
    (1, 2, 2, 2, 8, 4.0, None, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_the_formula(case):
    *shape, cap, window, documents = case
    given, ids = tensors(*shape)
    where = {
        "segment_ids": ids if documents else None,
        "sliding_window": window,
    }
    scale = 0.7 * shape[-1] ** -0.5
    state = RNG.bit_generator.state
    found = gradients(
        lambda q, k, v: splash.splash(
            q, k, v, scale, cap=cap, interpret=True, **where
        ),
        given,
    )
    RNG.bit_generator.state = state
    # A clip that changes nothing: the formula, not Keras's kernels.
    nothing = Softmax(cap=cap, clip=Clip(zeta=1.0, gamma=0.0))
    expected = gradients(
        lambda *qkv: attend(*qkv, scale=scale, softmax=nothing, **where), given
    )
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_kernel_rounds_like_its_inputs():
    given, ids = tensors(1, 256, 2, 2, 64, "bfloat16")

    def kernel(*qkv):
        return splash.splash(*qkv, 0.125, 5.0, ids, interpret=True)

    state = RNG.bit_generator.state
    found = gradients(kernel, given)
    RNG.bit_generator.state = state
    exact = gradients(kernel, [x.astype("float32") for x in given])
    for a, b in zip(found, exact):
        # Of 8 bits, a few roundings each.
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max()


@pytest.mark.parametrize("rows", [4, 3])
def test_devices_share_sequences_and_heads(rows):
    """Divided over a mesh, and whole where its axes do not divide."""
    given, ids = tensors(rows, 130, 4, 2, 16)

    def kernel(*qkv):
        return splash.splash(*qkv, 0.25, 3.0, ids, 60, interpret=True)

    state = RNG.bit_generator.state
    expected = gradients(kernel, given)
    four = jax.devices()[:4]
    ks.set_distribution("fsdp+tensor", 4, tensor_parallel=2, devices=four)
    RNG.bit_generator.state = state
    found = gradients(kernel, given)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.fixture
def on_tpu(monkeypatch):
    """Everything believes to be on a TPU, and kernels are interpreted."""
    calls, original = [], splash.splash

    def attention(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, interpret=True, **kwargs)

    monkeypatch.setattr(jax_kernels, "platform", lambda: "tpu")
    monkeypatch.setattr(jax_kernels, "splash", attention)
    return calls


@pytest.mark.parametrize("name", ks.VARIANTS)
def test_variants_on_a_tpu_have_the_same_outputs(name, on_tpu, monkeypatch):
    variant = ks.get_variant(name)
    lm = ks.StableCausalLM(ks.StableBackbone(31, 2, 2, 16, variant=variant))
    x = {"token_ids": RNG.integers(0, 31, (2, 20)).astype("int32")}
    found = lm(x)
    fused = variant.softmax.clip is None and variant.softmax.entropy is None
    fused = fused and variant.softmax.logits_dtype == "float32"
    assert len(on_tpu) == (2 if fused or variant.softmax.entropy else 0)
    if fused:
        assert {call["cap"] for call in on_tpu} == {variant.softmax.cap}
    monkeypatch.setattr(jax_kernels, "platform", lambda: "cpu")
    np.testing.assert_allclose(found, lm(x), atol=1e-5, rtol=1e-5)


def test_what_changes_probabilities_takes_the_formula(on_tpu):
    given, _ = tensors(1, 8, 2, 2, 4)
    clip = Softmax(clip=Clip(zeta=1.06, gamma=-0.03))
    attend(*given, scale=0.5, softmax=clip)
    attend(*given, scale=0.5, penalize=lambda z, mask: 0.0)
    attend(*given, scale=0.5, dropout_rate=0.1, seed=np.array([1, 2], "uint32"))
    half = [x.astype("float16") for x in given]
    attend(*half, scale=0.5)
    assert not on_tpu


def test_decoding_on_a_tpu_is_scaled(on_tpu, monkeypatch):
    """By Keras's other path: its kernel would leave the scale out."""
    given, _ = tensors(2, 8, 2, 2, 4)
    q, k, v = given
    asked = []
    original = keras.ops.dot_product_attention

    def watched(*args, **kwargs):
        asked.append(kwargs["flash_attention"])
        return original(*args, **kwargs)

    monkeypatch.setattr(keras.ops, "dot_product_attention", watched)
    last = attend(q[:, 5:6], k, v, scale=0.3, positions=jnp.array([5]))
    assert asked == [False] and not on_tpu
    whole = attend(*given, scale=0.3)
    np.testing.assert_allclose(last[:, 0], whole[:, 5], atol=1e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_what_is_measured_beside_the_kernel_is_exact(cap, window, on_tpu):
    """All queries of what is small: the formula's own statistics."""
    given, ids = tensors(2, 9, 4, 2, 8)
    how = {"scale": 0.4, "segment_ids": ids, "sliding_window": window}
    with telemetry.recording(telemetry.Recorder(True)) as kernel:
        attend(*given, softmax=Softmax(cap=cap), **how)
    nothing = Softmax(cap=cap, clip=Clip(zeta=1.0, gamma=0.0))
    with telemetry.recording(telemetry.Recorder(True)) as formula:
        attend(*given, softmax=nothing, **how)
    assert len(on_tpu) == 1
    (found,), (expected,) = kernel.heads, formula.heads
    assert found.note == expected.note == "exact"
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
@pytest.mark.filterwarnings("ignore")
def test_kernel_compiles_for_tpus():
    devices = backend.devices_of("v5e:2x4")
    ks.set_distribution("fsdp+tensor", 8, tensor_parallel=2, devices=devices)
    spec = jax.sharding.PartitionSpec("batch", None, "model", None)
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    given = [
        jax.ShapeDtypeStruct(
            (8, 200, n, 64),
            "bfloat16",
            sharding=jax.sharding.NamedSharding(mesh, spec),
        )
        for n in (4, 2, 2)
    ]

    def total(q, k, v):
        _, kernel = backend.attention_kernel(q, 50.0, None)
        y, _ = kernel(q, k, v, 0.125, cap=50.0)
        return y.astype("float32").sum()

    way = jax.jit(jax.grad(total, (0, 1, 2)))
    text = way.lower(*given).compile().as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}" in text
