"""Decoding with a cache of keys and values.

B batch, T tokens at a time, L padded length, V vocabulary.
"""

import keras
import keras_hub
from keras import ops


def decode(lm, token_ids, cache, start):
    """Logits (B, T, V), hidden states (B, T, D) and the next cache."""
    hidden_BTD, cache = lm.backbone.decode(token_ids, cache, start)
    logits_BTV = lm.backbone.token_embedding(hidden_BTD, reverse=True)
    return logits_BTV, hidden_BTD, cache


def make_next(lm):
    """What samplers ask: logits for the token at `index`, and its state."""

    def next(prompt_BL, cache, index):
        last_B1 = ops.slice(prompt_BL, (0, index - 1), (prompt_BL.shape[0], 1))
        logits, hidden, cache = decode(lm, last_B1, cache, index - 1)
        return logits[:, 0], hidden[:, 0], cache

    return next


def make_draft(assistant, values):
    """`make_next` of the model that drafts, its variables' values given.

    KerasHub's compiled function knows the variables of one model; another
    one's would be constants in it, and old ones after training.
    """

    def draft_next(prompt_BL, cache, index):
        # Two tokens: a draft that was accepted whole ends with a token that
        # the assistant has not seen.
        start = ops.maximum(index - 2, 0)
        last_B2 = ops.slice(prompt_BL, (0, start), (prompt_BL.shape[0], 2))
        with keras.StatelessScope(zip(assistant.variables, values)):
            logits, hidden, cache = decode(assistant, last_B2, cache, start)
        where = index - 1 - start
        return (
            ops.take(logits, where, axis=1),
            ops.take(hidden, where, axis=1),
            cache,
        )

    return draft_next


def make_verify(lm):
    """What speculative decoding asks: logits for k drafted tokens and one."""

    def verify_next(prompt_BL, cache, index, k):
        B, L = prompt_BL.shape
        if L <= k:
            raise ValueError(
                "`max_length` must be larger than the number of drafted "
                f"tokens. Received: max_length={L}, num_speculative_tokens={k}"
            )
        # At the end of the row the window moves back: tokens before it are
        # decoded once more, to the same values.
        start = ops.minimum(index - 1, L - k - 1)
        window = ops.slice(prompt_BL, (0, start), (B, k + 1))
        logits, hidden, cache = decode(lm, window, cache, start)
        behind = index - 1 - start
        where = ops.minimum(ops.arange(k + 1) + behind, k)
        logits, hidden = (ops.take(x, where, axis=1) for x in (logits, hidden))
        return logits, hidden, cache

    return verify_next


def prefill(lm, token_ids):
    """Hidden states and cache of whole rows (B, L).

    What stands behind a prompt is computed too, and overwritten before a
    token sees it.
    """
    cache = lm.backbone.make_cache(*token_ids.shape)
    return lm.backbone.decode(token_ids, cache, 0)


def continue_prompts(lm, inputs, stop_token_ids=None, assistant=None):
    """Continues every prompt of a batch up to its padded length.

    Args:
        lm: `StableCausalLM` with a sampler.
        inputs: dictionary of `"token_ids"` and `"padding_mask"` (B, L); the
            mask is 1 on prompts.
        stop_token_ids: ids after which a row is finished, or None.
        assistant: `StableCausalLM` that drafts for a `SpeculativeSampler`.

    Returns:
        Dictionary of the same shape, the mask ending with the stop token.
    """
    token_ids = ops.cast(inputs["token_ids"], "int32")
    prompt_BL = ops.cast(inputs["padding_mask"], "bool")
    lengths = ops.sum(ops.cast(prompt_BL, "int32"), axis=-1)
    if stop_token_ids is not None:
        # Samplers look for stops in the whole row, and the padding may be
        # one: the byte tokenizer's zero is both.
        stops = set(stop_token_ids)
        other = next(i for i in range(len(stops) + 1) if i not in stops)
        token_ids = ops.where(prompt_BL, token_ids, other)

    hidden_BLD, cache = prefill(lm, token_ids)
    how = {}
    if assistant is not None:
        values = inputs["assistant"]
        with keras.StatelessScope(zip(assistant.variables, values)):
            draft_cache = prefill(assistant, token_ids)[1]
        how = {
            "draft_next": make_draft(assistant, values),
            "draft_cache": draft_cache,
            "verify_next": make_verify(lm),
        }
    token_ids = lm.sampler(
        next=make_next(lm),
        prompt=token_ids,
        cache=cache,
        index=ops.min(lengths),
        mask=prompt_BL,
        stop_token_ids=stop_token_ids,
        hidden_states=hidden_BLD,
        model=lm,
        **how,
    )
    mask = ops.ones_like(prompt_BL)
    if stop_token_ids is not None:
        ends = ops.zeros_like(prompt_BL)
        for stop in stop_token_ids:
            ends = ops.logical_or(ends, ops.equal(token_ids, stop))
        ends = ops.logical_and(ends, ops.logical_not(prompt_BL))
        ends = ops.cast(ends, "int32")
        mask = ops.equal(ops.cumsum(ends, axis=-1) - ends, 0)
    return {"token_ids": token_ids, "padding_mask": mask}


def check_assistant(lm, assistant):
    """Raises unless a sampler that needs a drafting model has one."""
    speculative = isinstance(lm.sampler, keras_hub.samplers.SpeculativeSampler)
    if speculative and assistant is None:
        raise ValueError(
            "`SpeculativeSampler` needs a smaller model that drafts tokens: "
            "generate(..., assistant=another_lm)."
        )
    if assistant is None:
        return
    if not speculative:
        raise ValueError(
            "An assistant is used by `SpeculativeSampler` alone: compile with "
            "sampler=keras_hub.samplers.SpeculativeSampler(). Received: "
            f"sampler={type(lm.sampler).__name__}"
        )
    ours, theirs = (
        model.backbone.token_embedding.input_dim for model in (lm, assistant)
    )
    if ours != theirs:
        raise ValueError(
            "The assistant must have the model's vocabulary. Received: "
            f"{theirs} tokens for {ours}"
        )


def check_prompts(inputs, assistant=None):
    """Raises unless every row has a token to continue.

    With an assistant, which only speculative sampling has, rows must also
    have equally many.
    """
    mask = ops.convert_to_numpy(inputs["padding_mask"]) != 0
    lengths = mask.sum(-1)
    if lengths.min() == 0:
        raise ValueError(
            "A prompt is empty, and the tokenizer has no start token: there "
            "is nothing to continue. Give at least one token."
        )
    if assistant is not None and lengths.min() != lengths.max():
        raise ValueError(
            "KerasHub's `SpeculativeSampler` writes over the end of longer "
            "prompts: give prompts of one length, or one at a time. Received: "
            f"{lengths.min()} to {lengths.max()} tokens"
        )
