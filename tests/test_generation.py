"""Decoding with a cache equals the whole forward pass; samplers; scores."""

import keras
import keras_hub
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import VARIANTS

VOCABULARY = 31


def numpy(x):
    return keras.ops.convert_to_numpy(x)


def small(name="baseline", seed=0, **kwargs):
    """Weights large enough that logits differ, windows shorter than rows."""
    variant = ks.get_variant(name)
    if variant.architecture.sliding_window:
        windows = variant.architecture.sliding_window
        windows = tuple(w and 3 for w in windows)
        variant = variant.replace(sliding_window=windows, name=name)
    backbone = ks.StableBackbone(
        VOCABULARY, 2, 4, 32, num_key_value_heads=2, variant=variant, **kwargs
    )
    lm = ks.StableCausalLM(backbone)
    rng = np.random.default_rng(seed)
    for w in lm.weights:
        if not w.path.endswith("/u"):
            w.assign(numpy(w) + 0.2 * rng.normal(size=w.shape))
    return lm


def rows(batch=2, length=9, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCABULARY, (batch, length)).astype("int32")


def prompts(lengths=(4, 4), total=12):
    ids = rows(len(lengths), total)
    mask = np.arange(total) < np.array(lengths)[:, None]
    return {"token_ids": ids * mask, "padding_mask": mask.astype("int32")}


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_is_the_whole_forward_pass(name):
    lm, ids = small(name), rows()
    expected = numpy(lm({"token_ids": ids}))
    assert np.abs(expected).max() > 1
    cache, found = lm.backbone.make_cache(*ids.shape), []
    for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
        hidden, cache = lm.backbone.decode(ids[:, start:end], cache, start)
        logits = lm.backbone.token_embedding(hidden, reverse=True)
        found.append(numpy(logits))
    np.testing.assert_allclose(
        np.concatenate(found, axis=1), expected, atol=1e-5
    )


def greedy(lm, inputs):
    """Token after token by whole forward passes."""
    ids = inputs["token_ids"].copy()
    for t in range(1, ids.shape[1]):
        best = numpy(lm({"token_ids": ids}))[:, t - 1].argmax(-1)
        prompt = inputs["padding_mask"][:, t] != 0
        ids[:, t] = np.where(prompt, ids[:, t], best)
    return ids


@pytest.mark.parametrize("name", ["baseline", "qk_norm_cap", "gpt2", "gemma3"])
def test_greedy_generation_of_ragged_prompts(name):
    lm = small(name)
    lm.compile(sampler="greedy")
    inputs = prompts((5, 2))
    found = lm.generate(inputs, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, greedy(lm, inputs))


@pytest.mark.parametrize(
    "sampler", ["random", "top_k", "top_p", "beam", "contrastive"]
)
def test_samplers_keep_prompts_and_fill_rows(sampler):
    lm = small("qkv_norm")
    lm.compile(sampler=sampler)
    inputs = prompts()
    out = lm.generate(inputs, stop_token_ids=None)
    assert out["token_ids"].shape == inputs["token_ids"].shape
    mask = inputs["padding_mask"] != 0
    np.testing.assert_array_equal(
        out["token_ids"][mask], inputs["token_ids"][mask]
    )
    assert out["padding_mask"].all()
    assert ((out["token_ids"] >= 0) & (out["token_ids"] < VOCABULARY)).all()


def test_a_beam_is_at_least_as_likely_as_greedy():
    lm, inputs = small(), prompts()
    likelihoods = []
    for sampler in ("greedy", keras_hub.samplers.BeamSampler(4)):
        lm.compile(sampler=sampler)
        ids = lm.generate(inputs, stop_token_ids=None)["token_ids"]
        losses = lm.score(
            ids[:, :-1], scoring_mode="loss", target_ids=ids[:, 1:]
        )
        likelihoods.append(-numpy(losses)[:, 3:].sum(-1))
    assert (likelihoods[1] >= likelihoods[0] - 1e-3).mean() >= 0.5


def test_speculative_decoding_is_greedy_whatever_the_assistant():
    lm = small("qk_norm")
    inputs = prompts()
    expected = greedy(lm, inputs)
    lm.compile(sampler=keras_hub.samplers.SpeculativeSampler(3))
    stranger = small("baseline", seed=7)
    for assistant in (stranger, lm):
        out = lm.generate(inputs, stop_token_ids=None, assistant=assistant)
        np.testing.assert_array_equal(out["token_ids"], expected)


def test_bad_requests_are_refused():
    lm = small("gpt2", max_sequence_length=10)
    lm.compile(sampler="greedy")
    with pytest.raises(ValueError, match="max_sequence_length=12"):
        lm.generate(prompts(), stop_token_ids=None)
    with pytest.raises(ValueError, match="prompt is empty"):
        lm.generate(prompts((4, 0), 8), stop_token_ids=None)
    bad = prompts((4, 4), 8)
    bad["token_ids"][0, 0] = VOCABULARY
    with pytest.raises(ValueError, match="ids from 0 to 31"):
        lm.generate(bad, stop_token_ids=None)
    with pytest.raises(ValueError, match="used by `SpeculativeSampler` alone"):
        lm.generate(prompts((4, 4), 8), stop_token_ids=None, assistant=small())
    lm.compile(sampler=keras_hub.samplers.SpeculativeSampler(3))
    with pytest.raises(ValueError, match="needs a smaller model"):
        lm.generate(prompts((4, 4), 8), stop_token_ids=None)
    with pytest.raises(ValueError, match="prompts of one length"):
        lm.generate(
            prompts((4, 2), 8), stop_token_ids=None, assistant=small()
        )


@pytest.mark.parametrize("name", ["baseline", "gemma2"])
def test_scores_are_logits_and_losses(name):
    lm, ids = small(name), rows()
    logits = numpy(lm({"token_ids": ids}))
    np.testing.assert_allclose(numpy(lm.score(ids)), logits, atol=1e-5)
    targets = rows(seed=3)
    z = logits.astype("float64")
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    found = lm.score(ids, scoring_mode="loss", target_ids=targets)
    np.testing.assert_allclose(numpy(found), expected, atol=1e-5)
    seen = []

    def intercept(x, i):
        seen.append(i)
        return x * 0 if i == 0 else x

    cut = numpy(lm.score(ids, layer_intercept_fn=intercept))
    assert seen == [-1, 0, 1]
    # What block 0 put out was replaced: tokens no longer matter.
    np.testing.assert_allclose(cut, cut[:1, :1] + 0 * cut, atol=1e-5)
    with pytest.raises(ValueError, match="needs `target_ids`"):
        lm.score(ids, scoring_mode="loss")
    with pytest.raises(ValueError, match="scoring_mode"):
        lm.score(ids, scoring_mode="losss")
