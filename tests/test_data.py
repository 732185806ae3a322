"""Replayable batches, n-gram entropies."""

import json
import math

import grain
import keras
import keras_hub
import numpy as np
import pytest

from keras_stable.data import TokenBatches
from keras_stable.data import bigram_entropy
from keras_stable.data import unigram_entropy
from keras_stable.tokenizers import ByteTokenizer
from keras_stable.tokenizers import pack


def counted(num_tokens, **kwargs):
    """Batches of tokens that tell their own position."""
    settings = {"batch_size": 3, "sequence_length": 8, **kwargs}
    return TokenBatches(np.arange(num_tokens), **settings)


def row_starts(data, step):
    return data[step][0]["token_ids"][:, 0].tolist()


# Batches.


def test_batches_are_next_token_windows():
    data = counted(1000, vocabulary_size=1000)
    for step in range(2 * len(data)):
        inputs, targets = data[step]
        ids = inputs["token_ids"]
        assert list(inputs) == ["token_ids"]
        assert ids.shape == targets.shape == (3, 8)
        assert ids.dtype == targets.dtype == np.int32
        np.testing.assert_array_equal(targets, ids + 1)
        steps = np.tile(range(8), (3, 1))
        np.testing.assert_array_equal(ids - ids[:, :1], steps)


@pytest.mark.parametrize("num_tokens", [32, 33, 40, 41, 1000, 1003])
def test_a_pass_predicts_every_token_at_most_once(num_tokens):
    data = counted(num_tokens, seed=3)
    shifts = set()
    for e in range(20):
        steps = range(e * len(data), (e + 1) * len(data))
        targets = np.concatenate([data[s][1].ravel() for s in steps])
        assert len(set(targets.tolist())) == len(targets)
        # What is left out: the ends, and windows that fill no batch.
        assert num_tokens - len(targets) <= 2 * 8 + 2 * 8
        assert targets.min() >= 1 and targets.max() < num_tokens
        (shift,) = {(t - 1) % 8 for s in steps for t in data[s][1][:, 0]}
        shifts.add(shift)
    # Grids move, so that no border between windows is always the same.
    assert shifts == set(range(8))


def test_order_depends_on_seed_and_pass():
    orders = {}
    for seed in range(3):
        data = counted(2000, seed=seed)
        for e in range(3):
            steps = range(e * len(data), (e + 1) * len(data))
            samples = np.concatenate([data.sample_indices(s) for s in steps])
            assert (samples // data.num_windows == e).all()
            order = samples % data.num_windows
            assert len(set(order)) == len(order)
            orders[seed, e] = tuple(order)
    assert len(set(orders.values())) == 9
    assert all(list(order) != sorted(order) for order in orders.values())
    np.testing.assert_array_equal(
        counted(2000, seed=1)[5][1], counted(2000, seed=1)[5][1]
    )


def test_sample_indices_are_global_and_lead_to_the_tokens():
    data = counted(500)
    steps = 4 * len(data)
    samples = [data.sample_indices(s) for s in range(steps)]
    assert all(s.dtype == np.int64 and s.shape == (3,) for s in samples)
    assert len(set(np.concatenate(samples))) == 3 * steps
    for step in (0, 1, steps - 1):
        rows = data.windows(samples[step])
        np.testing.assert_array_equal(rows[:, :-1], data[step][0]["token_ids"])
    # Samples of several passes at once.
    mixed = np.concatenate([samples[-1], samples[0]])
    np.testing.assert_array_equal(
        data.windows(mixed)[:, 1:],
        np.concatenate([data[steps - 1][1], data[0][1]]),
    )
    data.set_state(data.get_state(7))
    np.testing.assert_array_equal(data.sample_indices(2), samples[2])


def test_evaluation_takes_windows_in_order_in_every_pass():
    data = counted(8 * 3 * 4 + 1, shuffle=False)
    assert len(data) == 4
    targets = np.concatenate([batch[1].ravel() for batch in data])
    np.testing.assert_array_equal(targets, np.arange(1, 8 * 3 * 4 + 1))
    assert row_starts(data, 0) == row_starts(data, 4) == [0, 8, 16]
    assert len(list(data)) == len(list(data)) == 4


def test_documents_are_masked():
    tokens = pack(["abc", "de", "", "fghi"], ByteTokenizer())
    data = TokenBatches(
        tokens,
        1,
        len(tokens) - 1,
        shuffle=False,
        mask_documents=True,
        separator_id=0,
    )
    inputs, targets, weights = data[0]
    # a b c 0 d e 0 0 f g h i | 0
    assert inputs["padding_mask"].tolist() == [
        [1, 1, 1, 1, 2, 2, 2, 3, 4, 4, 4, 4]
    ]
    assert weights.tolist() == [[1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1]]
    assert targets.tolist() == [tokens[1:].tolist()]
    assert inputs["padding_mask"].dtype == np.int32
    assert weights.dtype == np.float32


def test_masks_agree_with_documents_at_any_offset():
    # Tokens count documents: 1 1 1 0 2 2 0 3 0 ...
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 7, 200)
    pieces = [[i + 1] * n + [0] for i, n in enumerate(lengths)]
    owner = np.concatenate([[i] * len(piece) for i, piece in enumerate(pieces)])
    tokens = np.concatenate(pieces)
    settings = {"mask_documents": True, "separator_id": 0, "seed": 5}
    data = TokenBatches(tokens, 4, 16, **settings)
    # The same windows, of the tokens' positions.
    where = TokenBatches(np.arange(len(tokens)), 4, 16, seed=5)
    for step in range(3 * len(data)):
        inputs, targets, weights = data[step]
        places, next_places = where[step]
        document = owner[places["token_ids"]]
        mask = inputs["padding_mask"]
        assert mask.min() == 1
        np.testing.assert_array_equal(
            mask[:, :, None] == mask[:, None, :],
            document[:, :, None] == document[:, None, :],
        )
        np.testing.assert_array_equal(weights, document == owner[next_places])


def test_batch_errors():
    with pytest.raises(ValueError, match="31 tokens do not fill.*take 32"):
        counted(31)
    assert len(counted(32)) == 1
    with pytest.raises(ValueError, match="24 tokens do not fill.*take 25"):
        counted(24, shuffle=False)
    assert len(counted(25, shuffle=False)) == 1
    with pytest.raises(ValueError, match=r"\[0, 99\).*Received: 99 at .* 99"):
        counted(100, vocabulary_size=99)
    with pytest.raises(ValueError, match="not be negative. Received: -1"):
        TokenBatches(np.arange(-1, 99), 1, 8)
    empty = np.array([], "int32")
    for tokens in (np.ones(99), np.ones((9, 9), "int32"), empty):
        with pytest.raises(ValueError, match="`tokens` must be a non-empty"):
            TokenBatches(tokens, 1, 8)
    for name in ("batch_size", "sequence_length"):
        for value in (0, -1, 1.0, "2", None, True):
            with pytest.raises(ValueError, match=f"`{name}`.*{value!r}"):
                counted(100, **{name: value})
    for seed in (-1, 2**32, 0.5, None):
        with pytest.raises(ValueError, match=f"`seed` must be.*{seed}"):
            counted(100, seed=seed)
    with pytest.raises(ValueError, match="needs `separator_id`.*end_token_id"):
        counted(100, mask_documents=True)
    with pytest.raises(ValueError, match="`step` must be.*at least 0.*-1"):
        counted(100).sample_indices(-1)


# State.


def test_state_is_json_and_moves_the_beginning():
    data = counted(500)
    first = [row_starts(data, i) for i in range(3 * len(data))]
    assert data.get_state()["step"] == 0
    state = json.loads(json.dumps(data.get_state(len(data) + 2)))
    # It holds in another process, and for another dtype of the same tokens.
    other = TokenBatches(np.arange(500, dtype="uint16"), 3, 8)
    other.set_state(state)
    assert other.get_state() == state
    assert other.first_step == len(data) + 2
    resumed = [row_starts(other, i) for i in range(2 * len(data) - 2)]
    assert resumed == first[len(data) + 2 :]


def test_state_of_other_batches_is_refused():
    data = counted(500)
    state = counted(500, seed=1).get_state(3)
    with pytest.raises(ValueError, match="seed is 1 there and 0 here"):
        data.set_state(state)
    state = counted(500, batch_size=2).get_state(3)
    with pytest.raises(ValueError, match="batch_size is 2 there and 3 here"):
        data.set_state(state)
    state = counted(500, sequence_length=9).get_state(3)
    with pytest.raises(ValueError, match="sequence_length is 9 there"):
        data.set_state(state)
    state = counted(500, shuffle=False).get_state(3)
    with pytest.raises(ValueError, match="shuffle is False there"):
        data.set_state(state)
    tokens = np.arange(500)
    tokens[[3, 4]] = 4, 3
    state = TokenBatches(tokens, 3, 8).get_state(3)
    with pytest.raises(ValueError, match="other batches: tokens is"):
        data.set_state(state)
    for wrong in (3, None, {}, {"step": 3, "fingerprint": 5}):
        with pytest.raises(ValueError, match="dictionary from `get_state`"):
            data.set_state(wrong)
    state = {**data.get_state(), "step": -3}
    with pytest.raises(ValueError, match="`step` must be.*-3"):
        data.set_state(state)
    assert data.first_step == 0


# Training.


class Sum(keras.layers.Layer):
    """Logits for a vocabulary of two, and a record of what it was fed.

    The record, a weight, is a sum of the batches trained on, each weighted
    with a digit of its own.
    """

    def __init__(self, size):
        super().__init__()
        self.trained = self.add_weight(
            shape=(size,), initializer="zeros", trainable=False
        )
        self.count = self.add_weight(
            shape=(), initializer="zeros", dtype="int32", trainable=False
        )
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, inputs, training=False):
        ids = inputs["token_ids"]
        if training:
            slot = keras.ops.one_hot(self.count, self.trained.shape[0])
            first = keras.ops.cast(ids[0, 0], "float32")
            self.trained.assign(self.trained + slot * first)
            self.count.assign(self.count + 1)
        x = keras.ops.cast(ids, "float32")[..., None] / 1000 * self.scale
        return keras.ops.concatenate([x, -x], -1)


class Recorder(keras.callbacks.Callback):
    """Keeps the state after `at` batches of a fit."""

    def __init__(self, data, at):
        super().__init__()
        self.data, self.at, self.ended, self.state = data, at, 0, None

    def on_epoch_begin(self, epoch, logs=None):
        self.before = self.ended

    def on_train_batch_end(self, batch, logs=None):
        self.ended = self.before + batch + 1
        if self.state is None and self.ended >= self.at:
            self.state = self.data.get_state(self.data.first_step + self.ended)
            self.model.stop_training = True


def make_model(size, weighted=False, **kwargs):
    inputs = {"token_ids": keras.Input((8,), dtype="int32", name="token_ids")}
    if weighted:
        inputs["padding_mask"] = keras.Input(
            (8,), dtype="int32", name="padding_mask"
        )
    layer = Sum(size)
    outputs = layer({"token_ids": inputs["token_ids"]})
    model = keras.Model(inputs, outputs)

    def loss(targets, logits):
        targets = keras.ops.cast(targets, "int32") % 2
        return keras.ops.sparse_categorical_crossentropy(
            targets, logits, from_logits=True
        )

    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss, **kwargs)
    return model, layer


def trained_on(layer):
    starts = keras.ops.convert_to_numpy(layer.trained)
    return starts[: int(layer.count)].astype(int).tolist()


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_resumes_in_the_middle_of_fit(steps_per_execution):
    if steps_per_execution > 1 and keras.backend.backend() == "torch":
        pytest.skip("Keras on torch executes one step at a time")
    data = counted(500)
    steps = len(data)
    settings = {"steps_per_execution": steps_per_execution}
    told = {"steps_per_epoch": steps - steps % 3, "shuffle": False}
    told["verbose"] = 0
    expected = [row_starts(data, i)[0] for i in range(3 * steps)]

    model, layer = make_model(4 * steps, **settings)
    # In the second epoch, between two executions.
    recorder = Recorder(data, at=steps + 4)
    model.fit(data.stream(), epochs=3, callbacks=[recorder], **told)
    trained = trained_on(layer)
    # One execution's worth of batches ended at a time, none unaccounted for.
    assert steps + 4 <= recorder.ended < steps + 4 + steps_per_execution
    assert recorder.state["step"] == recorder.ended
    assert trained[: recorder.ended] == expected[: recorder.ended]

    resumed = counted(500)
    resumed.set_state(json.loads(json.dumps(recorder.state)))
    model, layer = make_model(4 * steps, **settings)
    model.fit(resumed.stream(), epochs=1, **told)
    k = recorder.ended
    assert trained_on(layer) == expected[k : k + told["steps_per_epoch"]]


def test_keras_hub_models_take_it_as_it_is():
    class Model(keras_hub.models.Task):
        """A KerasHub task reduced to the pipeline that feeds it."""

        def preprocess_samples(self, x, y=None, sample_weight=None):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    data = counted(300)
    evaluation = counted(80, shuffle=False)
    plain, layer = make_model(4 * len(data))
    model = Model(plain.inputs, plain.outputs)
    model.compile(
        optimizer="sgd", loss=lambda y, p: keras.ops.mean(p[..., 0], -1)
    )
    data.set_state(data.get_state(5))
    history = model.fit(
        data, epochs=2, validation_data=evaluation, shuffle=False, verbose=0
    )
    expected = [row_starts(data, i)[0] for i in range(2 * len(data))]
    assert trained_on(layer) == expected
    assert len(history.history["val_loss"]) == 2
    assert math.isfinite(history.history["val_loss"][1])


def test_fit_and_evaluate_with_masked_documents():
    tokens = pack(["abc" * 5, "de"] * 40, ByteTokenizer())
    settings = {"mask_documents": True, "separator_id": 0}
    data = TokenBatches(tokens, 3, 8, shuffle=False, **settings)
    model, _ = make_model(2 * len(data), weighted=True)
    told = {"steps": len(data), "verbose": 0}
    loss = model.evaluate(data.stream(), **told)
    # The same from the definition: weighted cross-entropy over all B T.
    total = 0.0
    for i in range(len(data)):
        inputs, targets, weights = data[i]
        x = inputs["token_ids"] / 1000
        sign = 1 - 2 * (targets % 2)
        total += np.mean(weights * np.log1p(np.exp(-2 * x * sign)))
    assert loss == pytest.approx(total / len(data), rel=1e-5)
    # Evaluation begins anew each time.
    assert model.evaluate(data.stream(), **told) == loss


def test_stream_goes_on_past_a_pass():
    data = counted(100)
    data.set_state(data.get_state(2))
    stream = iter(data.stream())
    seen = [next(stream)[0]["token_ids"][0, 0] for _ in range(3 * len(data))]
    assert seen == [row_starts(data, i)[0] for i in range(3 * len(data))]
    assert isinstance(data, grain.MapDataset)
    assert len(data[1:]) == len(data) - 1
    assert str(data) == "TokenBatches(11 windows of 8, 3 batches of 3)"


# Entropies.


def test_entropies_of_small_cases():
    # Frequencies 1/2, 1/4, 1/4.
    assert unigram_entropy([0, 0, 1, 2]) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy([7]) == 0
    # Pairs 00 01 11 10: either token is followed by either, equally often.
    assert bigram_entropy([0, 0, 1, 1, 0]) == pytest.approx(math.log(2))
    assert bigram_entropy([0, 1, 2] * 9) == 0
    # Pairs 01 12 20 02 20: 0 is followed by 1 or 2, each other by one.
    assert bigram_entropy([0, 1, 2, 0, 2, 0]) == pytest.approx(
        2 / 5 * math.log(2)
    )


@pytest.mark.parametrize("size", [3, 5000])
def test_bigram_entropy_is_the_mean_loss_of_counts(size):
    tokens = np.random.default_rng(1).zipf(1.3, 4000) % size
    follows = {}
    for a, b in zip(tokens[:-1], tokens[1:]):
        row = follows.setdefault(int(a), {})
        row[int(b)] = row.get(int(b), 0) + 1
    loss = 0.0
    for row in follows.values():
        for count in row.values():
            loss -= count * math.log(count / sum(row.values()))
    assert bigram_entropy(tokens) == pytest.approx(loss / 3999)
    assert bigram_entropy(tokens) < unigram_entropy(tokens)


def test_entropy_errors():
    with pytest.raises(ValueError, match="needs two tokens"):
        bigram_entropy([1])
    for entropy in (unigram_entropy, bigram_entropy):
        with pytest.raises(ValueError, match="non-empty integer array"):
            entropy([])
        with pytest.raises(ValueError, match="dtype float64"):
            entropy([0.5, 1.0])
