"""The backbone and the language model, over all variants."""

import os

import fresh
import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import VARIANTS
from keras_stable.losses import z_loss


def small(variant="baseline", **kwargs):
    tokenizer = kwargs.pop("tokenizer", None)
    settings = {
        "vocabulary_size": 31,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        **kwargs,
    }
    preprocessor = None
    if tokenizer is not None:
        preprocessor = ks.StableCausalLMPreprocessor(tokenizer)
    backbone = ks.StableBackbone(variant=variant, **settings)
    return ks.StableCausalLM(backbone, preprocessor)


def samples(rows=4, length=8, vocabulary=31):
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1))
    ids = ids.astype("int32")
    return {"token_ids": ids[:, :-1]}, ids[:, 1:]


def numpy(x):
    return keras.ops.convert_to_numpy(x)


def test_the_papers_model_has_826_million_parameters():
    # Counted without a byte of weights.
    with keras.StatelessScope(initialize_variables=False):
        backbone = ks.StableBackbone(ks.PAPER_VOCABULARY, **ks.SIZES["830m"])
        lm = ks.StableCausalLM(backbone, compile=False)
        matrices = sum(
            int(np.prod(v.shape)) for v in lm.variables if len(v.shape) == 2
        )
        # 24 blocks of 12 D^2, two embeddings of V D.
        assert matrices == 24 * 12 * 1024**2 + 2 * 256_000 * 1024
        norms = sum(
            int(np.prod(v.shape)) for v in lm.variables if len(v.shape) < 2
        )
        # Two norms a block and the last one, gain and bias each.
        assert norms == (2 * 24 + 1) * 2 * 1024
        assert round((matrices + norms) / 1e6, 1) == 826.4


def test_sizes_grow_on_one_dial():
    counts = []
    for size in ks.SIZES.values():
        matrices = 12 * size["num_layers"] * size["hidden_dim"] ** 2
        assert size["hidden_dim"] % size["num_heads"] == 0
        assert size["intermediate_dim"] == 4 * size["hidden_dim"]
        counts.append(matrices)
    assert counts == sorted(counts)
    assert 0.7e6 < counts[0] < 1.3e6 and 7e9 < counts[-1] < 9e9


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
def test_config_round_trip(variant, tied):
    lm = small(variant, tie_embeddings=tied, num_key_value_heads=1)
    config = keras.saving.serialize_keras_object(lm)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == lm.get_config()
    assert [w.path for w in again.weights] == [w.path for w in lm.weights]
    assert again.backbone.variant == VARIANTS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_file_round_trip_keeps_training(variant, tmp_path):
    lm = small(variant)
    lm.compile(ks.AdamW(ks.WarmupSchedule(1e-2, 10), decay="independent"))
    x, y = samples()
    lm.fit(x, y, batch_size=4, verbose=0)
    lm.save(tmp_path / "lm.keras")
    again = keras.models.load_model(tmp_path / "lm.keras")
    assert again.optimizer.get_config() == lm.optimizer.get_config()
    for ours, theirs in zip(
        [*lm.weights, *lm.optimizer.variables],
        [*again.weights, *again.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))
    # Training goes on as if it had not been interrupted.
    for model in (lm, again):
        model.fit(x, y, batch_size=4, verbose=0)
    for ours, theirs in zip(lm.weights, again.weights):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), atol=1e-6)


def test_loads_in_a_fresh_process(tmp_path):
    lm = small("qk_norm_cap", tokenizer=ks.ByteTokenizer(), vocabulary_size=256)
    lm.compile()
    x, y = samples()
    lm.fit(x, y, verbose=0)
    lm.save(tmp_path / "lm.keras")
    np.save(tmp_path / "logits.npy", numpy(lm(x)))
    np.save(tmp_path / "x.npy", x["token_ids"])
    code = (
        "import sys, keras, numpy as np, keras_stable\n"
        "d = sys.argv[1]\n"
        "lm = keras.models.load_model(d + '/lm.keras')\n"
        "x = {'token_ids': np.load(d + '/x.npy')}\n"
        "y = keras.ops.convert_to_numpy(lm(x))\n"
        "np.testing.assert_allclose(y, np.load(d+'/logits.npy'), atol=1e-6)\n"
        "assert type(lm.optimizer).__name__ == 'AdamW', lm.optimizer\n"
        "assert int(lm.optimizer.iterations) == 1\n"
        "assert lm.preprocessor.tokenizer.vocabulary_size() == 256\n"
    )
    fresh.run(code, tmp_path)


@pytest.mark.parametrize(
    "precision", ["bfloat16", "mixed_bfloat16", "mixed_float16"]
)
def test_logits_are_float32_and_training_is_finite(precision):
    keras.config.set_dtype_policy(precision)
    lm = small("qk_fc_norm")
    x, y = samples()
    logits = lm(x)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    lm.compile(ks.AdamW(1e-2))
    scaled = type(lm.optimizer) is keras.optimizers.LossScaleOptimizer
    assert scaled == (precision == "mixed_float16")
    history = lm.fit(x, y, batch_size=4, epochs=4, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < history[0]


def test_output_cap():
    capped = ks.get_variant("baseline").replace(output_cap=0.5)
    lm, plain = small(capped), small("baseline")
    for w in plain.weights:
        w.assign(10 * numpy(w))
    lm.set_weights(plain.get_weights())
    x, _ = samples()
    z = numpy(plain(x)).astype("float64")
    assert np.abs(z).max() > 1
    np.testing.assert_allclose(
        numpy(lm(x)), 0.5 * np.tanh(z / 0.5), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_packed_documents_are_as_if_alone(position):
    variant = ks.get_variant("baseline").replace(position=position)
    lm = small(variant)
    for w in lm.weights:
        w.assign(5 * numpy(w))
    (x, _), mask = samples(1, 9), np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    packed = numpy(lm({**x, "padding_mask": mask}))
    ids = x["token_ids"]
    for part in (slice(0, 3), slice(3, 7)):
        alone = numpy(lm({"token_ids": ids[:, part]}))
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-5)


def test_initializers():
    for name, deviation in (("scaled", 0.02 / 8**0.5), ("plain", 0.02)):
        lm = small(num_layers=4, hidden_dim=64, initializer=name)
        for w in lm.weights:
            if w.path.endswith(("output/kernel", "fc2/kernel")):
                assert numpy(w).std() == pytest.approx(deviation, rel=0.1)
            elif w.path.endswith(("kernel", "embeddings")):
                assert numpy(w).std() == pytest.approx(0.02, rel=0.1)


def test_batch_loss_is_the_last_batchs():
    lm = small()
    lm.compile(ks.AdamW(1e-9, weight_decay=0.0))
    x, y = samples(8)
    history = lm.fit(x, y, batch_size=4, verbose=0).history
    last = {"token_ids": x["token_ids"][4:]}
    log_p = numpy(keras.ops.log_softmax(lm(last)))
    expected = -np.take_along_axis(log_p, y[4:, :, None], -1).mean()
    assert history["batch_loss"][0] == pytest.approx(expected, rel=1e-5)
    assert history["loss"][0] != pytest.approx(expected, rel=1e-5)


def test_generate_continues_the_prompt():
    tokenizer = ks.ByteTokenizer()
    lm = small(vocabulary_size=256, tokenizer=tokenizer)
    lm.compile(sampler="greedy")
    text = lm.generate("ab", max_length=8, stop_token_ids=None)
    assert text.startswith("ab")
    # The prompt begins a document, as after a separator in training.
    ids = [0, *tokenizer.tokenize("ab").tolist()]
    while len(ids) < 8:
        logits = numpy(lm({"token_ids": np.array([ids])}))
        ids.append(int(logits[0, -1].argmax()))
    assert text == tokenizer.detokenize(ids)


def test_errors():
    with pytest.raises(ValueError, match="Did you mean 'qk_norm'"):
        small("qk_nrom")
    with pytest.raises(ValueError, match="Unknown size. Did you mean '10m'"):
        ks.StableCausalLM.from_size("10mm", 256)
    with pytest.raises(ValueError, match="multiple of `num_heads`"):
        small(hidden_dim=15)
    with pytest.raises(ValueError, match="must be a multiple"):
        small(num_heads=3, hidden_dim=48, num_key_value_heads=2)
    with pytest.raises(ValueError, match="`num_layers` must be a positive"):
        small(num_layers=0)
    with pytest.raises(ValueError, match="Unknown initializer"):
        small(initializer="scaledd")
    lm = small()
    lm.compile()
    x, y = samples(vocabulary=40)
    with pytest.raises(ValueError, match=r"in \[0, 31\).*ids from"):
        lm.fit(x, y, verbose=0)


def test_generation_stops_at_the_stop_token_and_not_at_padding():
    tokenizer = ks.ByteTokenizer()
    lm = small(vocabulary_size=256, tokenizer=tokenizer)
    lm.compile(sampler="greedy")
    # Padding and stop are both 0 for bytes: only a generated 0 is a stop.
    whole = lm.generate("ab", max_length=8, stop_token_ids=None)
    assert lm.generate("ab", max_length=8) == whole
    logits = numpy(lm({"token_ids": np.array([[0, *b"ab"]])}))
    first = int(logits[0, -1].argmax())
    stopped = lm.generate("ab", max_length=8, stop_token_ids=[first])
    assert stopped == tokenizer.detokenize([0, *b"ab", first])


def test_fit_is_training():
    """What acts in training only acts in `fit`, and not in `evaluate`."""
    variant = ks.get_variant("sigma_reparam").replace(z_loss=1e-3)
    variant = variant.replace(entropy=ks.Entropy(weight=1.0, floor=1.0))
    lm = small(variant, dropout=0.5, seed=1)
    lm.compile(ks.AdamW(1e-9, weight_decay=0.0))
    x, y = samples()
    u = [w for w in lm.weights if w.path.endswith("/u")]
    before = [numpy(w) for w in u]
    plain = lm.evaluate(x, y, return_dict=True, verbose=0)
    logs = lm.fit(x, y, batch_size=4, verbose=0).history
    assert logs["loss"][0] != pytest.approx(plain["loss"], rel=1e-5)
    moved = [np.any(numpy(w) != old) for w, old in zip(u, before)]
    assert len(moved) == 12 and all(moved)
    # About log(31)^2 thousandths at the start, where logits are near zero.
    assert logs["z_loss"][0] == pytest.approx(1e-3 * np.log(31) ** 2, rel=0.1)
    assert logs["entropy_penalty"][0] > 0


@pytest.mark.parametrize("name", ["z_loss", "entropy"])
def test_penalties_are_in_the_gradient_and_not_in_the_loss(name):
    change = {
        "z_loss": {"z_loss": 0.3},
        "entropy": {"entropy": ks.Entropy(weight=30.0, floor=1.0)},
    }[name]
    plain = small("baseline")
    for w in plain.weights:
        w.assign(8 * numpy(w))
    lm = small(ks.get_variant("baseline").replace(**change))
    lm.set_weights(plain.get_weights())
    x, y = samples()
    losses = []
    for model in (plain, lm):
        model.compile(keras.optimizers.SGD(1e-2))
        losses.append(model.fit(x, y, batch_size=4, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    moves = [
        np.abs(numpy(a) - numpy(b)).max()
        for a, b in zip(plain.weights, lm.weights)
    ]
    assert max(moves) > 1e-5


def test_z_loss_is_its_formula():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 3, 5)).astype("float32")
    w = np.array([[1, 0, 1], [1, 1, 0]], "float32")
    square = np.log(np.exp(z.astype("float64")).sum(-1)) ** 2
    assert float(z_loss(z)) == pytest.approx(square.mean(), rel=1e-6)
    assert float(z_loss(z, w)) == pytest.approx((w * square).mean(), rel=1e-6)


def test_programs_are_kept_where_a_compiler_can(monkeypatch, tmp_path):
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        name = "jax_compilation_cache_dir"
        before = getattr(jax.config, name)
        ks.keep_programs(tmp_path)
        # A CPU's programs are not worth it.
        assert getattr(jax.config, name) == before
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        ks.keep_programs(None)
        assert getattr(jax.config, name) == before
        try:
            ks.keep_programs(tmp_path)
            assert getattr(jax.config, name) == str(tmp_path / "jax")
        finally:
            jax.config.update(name, before)
    elif backend == "torch":
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
        ks.keep_programs(tmp_path)
        folder = os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        assert folder == str(tmp_path / "inductor")
        assert os.environ["TRITON_CACHE_DIR"] == "mine"
    else:
        ks.keep_programs(tmp_path)
