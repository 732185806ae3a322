"""Feeds: batches by their number, and `fit` on them in place of its own."""

import json

import grain
import keras
import numpy as np
import pytest
from test_backups import Batches
from test_backups import language_model
from test_backups import pairs
from test_backups import same
from test_backups import tiny
from test_backups import values

import keras_stable as ks
from keras_stable.feed import Feed
from keras_stable.watch import watch

BACKEND = keras.backend.backend()
TOKENS = np.random.default_rng(0).integers(0, 32, 2000)


def places(feed, count):
    return [feed.next()[0] for _ in range(count)]


# Numbers.


def test_skipped_places_are_passed_over():
    feed = Feed(list(range(100, 105)))
    feed.skip(2, 3)
    assert [feed.next() for _ in range(4)] == [
        *[(0, 100), (1, 101), (4, 104), (5, 100)],
    ]
    feed.seek(1)
    feed.skip(1, 1)
    feed.skip(3, 6)
    assert places(feed, 2) == [7, 8]


@pytest.mark.parametrize("seed", range(20))
def test_places_after_are_those_of_next(seed):
    rng = np.random.default_rng(seed)
    feed = Feed([np.zeros((2, 1))])
    for _ in range(rng.integers(0, 6)):
        first = int(rng.integers(0, 20))
        feed.skip(first, first + int(rng.integers(0, 5)))
    begin = int(rng.integers(0, 10))
    feed.seek(begin)
    for count in range(20):
        after = feed.place_after(begin, count)
        assert after == feed.place_after(feed.position, 0)
        assert feed.next()[0] == after
    inside = [(e["first"], e["last"]) for e in feed.ledger]
    feed.seek(0)
    found = places(feed, 30)
    expected = [p for p in range(99) if not any(a <= p <= b for a, b in inside)]
    assert found == expected[:30]


def test_the_ledger_names_samples_and_is_json():
    data = ks.TokenBatches(TOKENS, 4, 8, vocabulary_size=32)
    feed = Feed(data, position=3)
    feed.skip(5, 7)
    assert feed.ledger == [{"first": 5, "last": 7, "samples": [20, 32]}]
    state = json.loads(json.dumps(feed.state()))
    other = Feed(data)
    other.restore(state)
    assert other.state() == state and other.position == 3
    assert places(other, 4) == [3, 4, 8, 9]
    # A state is no view of what goes on.
    feed.skip(9, 9)
    assert len(state["ledger"]) == 1


@pytest.mark.parametrize("state", [None, {}, {"position": -1, "ledger": []}])
def test_foreign_states_are_refused(state):
    feed = Feed([1, 2])
    with pytest.raises(ValueError, match="Feed.state"):
        feed.restore(state)
    assert feed.position == 0


@pytest.mark.parametrize("arguments", [(-1, 2), (3, 2), (0.0, 1)])
def test_what_cannot_be_skipped(arguments):
    with pytest.raises(ValueError, match="must be an integer"):
        Feed([1]).skip(*arguments)


# Data.


def test_token_batches_count_from_the_first_pass():
    data = ks.TokenBatches(TOKENS, 4, 8, vocabulary_size=32)
    expected = [data[i][1] for i in range(2 * len(data))]
    data.set_state(data.get_state(step=5))
    feed = Feed(data, position=3)
    for place, targets in enumerate(expected[3:], start=3):
        found, (_, y) = feed.next()
        assert found == place
        np.testing.assert_array_equal(y, targets)


def test_mixed_batches():
    data = ks.MixedBatches([TOKENS, TOKENS[::-1]], 4, 8)
    feed = Feed(data, position=2)
    np.testing.assert_array_equal(feed.next()[1][1], data[2][1])
    assert feed.data.batch_size == 4


def test_grain_shuffles_each_pass_anew():
    data = grain.MapDataset.range(10).seed(0).shuffle().batch(2)
    feed = Feed(data)
    passes = [[feed.next()[1].tolist() for _ in range(5)] for _ in range(2)]
    assert passes[0] != passes[1]
    for found in passes:
        assert sorted(sum(found, [])) == list(range(10))
    repeated = Feed(data.repeat(2))
    assert [repeated.next()[1].tolist() for _ in range(10)] == sum(passes, [])


def test_others_begin_again():
    batches = pairs(3)
    for data in (batches, Batches(batches)):
        feed = Feed(data)
        for i in range(7):
            assert feed.next()[1] is batches[i % 3]


class Endless:
    def __getitem__(self, number):
        return np.full((2, 1), number)


def test_objects_with_numbers():
    feed = Feed(Endless(), position=1000)
    place, batch = feed.next()
    assert place == 1000 and batch[0, 0] == 1000


@pytest.mark.parametrize(
    "data",
    [
        (x for x in [1]),
        np.zeros((3, 2)),
        (np.zeros(3), np.zeros(3)),
        {"x": np.zeros(3)},
        grain.MapDataset.range(3).to_iter_dataset(),
        None,
    ],
    ids=lambda x: type(x).__name__,
)
def test_data_without_numbers_is_refused(data):
    with pytest.raises(ValueError, match="by their number.*TokenBatches"):
        Feed(data)


def test_data_of_backends_is_refused():
    if BACKEND == "tensorflow":
        import tensorflow as tf

        data = tf.data.Dataset.range(3).batch(1)
    elif BACKEND == "torch":
        import torch

        data = torch.utils.data.DataLoader(range(3))
    else:
        import jax

        data = jax.numpy.zeros((3, 2))
    with pytest.raises(ValueError, match="by their number.*TokenBatches"):
        Feed(data)


def test_no_batches():
    with pytest.raises(ValueError, match="no batches"):
        Feed([])


# `fit`.


def fitted(make, data, feed=None, full=True, **fit):
    """A model after `fit`, its history and how many steps were measured."""
    keras.utils.set_random_seed(3)
    model = make()
    with watch(model) as observed:
        observed.full = full
        observed.feed = feed
        history = model.fit(data, shuffle=False, verbose=0, **fit).history
        assert observed.measures
        samples = observed.read()
    return values(model), history, samples


def pair(make, theirs, ours, **fit):
    """`fit` on batches of ours put in place, and `fit` on ours as they are."""
    feed = Feed(ours.batches if isinstance(ours, Batches) else ours)
    replaced = fitted(make, theirs, lambda: feed.next()[1], **fit)
    expected = fitted(make, ours, **fit)
    same(replaced[0], expected[0])
    assert replaced[1] == expected[1]
    losses = [
        [sample.scalars["loss"] for sample in found]
        for found in (replaced[2], expected[2])
    ]
    assert losses[0] == losses[1]
    return feed, losses[0]


def test_fit_on_other_batches():
    ours = Batches(pairs(6, seed=1))
    feed, losses = pair(tiny, Batches(pairs(6)), ours, epochs=2)
    assert feed.position == len(losses) == 12


def test_batches_of_lists_and_other_numbers_of_rows():
    def listed(batches):
        # The last has fewer rows.
        batches[-1] = tuple(x[:3] for x in batches[-1])
        return Batches([list(batch) for batch in batches])

    pair(tiny, listed(pairs(4)), listed(pairs(4, seed=1)))


def test_weights_of_samples():
    def weighted(seed):
        rng = np.random.default_rng(seed)
        return Batches([(*b, rng.uniform(size=4)) for b in pairs(4, seed=seed)])

    pair(tiny, weighted(0), weighted(1))


def test_fit_of_a_language_model_on_other_batches():
    data = ks.TokenBatches(TOKENS, 4, 8, vocabulary_size=32)
    other = ks.TokenBatches(TOKENS, 4, 8, seed=1, vocabulary_size=32)
    feed, losses = pair(language_model, data.repeat()[:5], other.repeat()[:5])
    # Their number is not known to Keras: an epoch ends with `fit`'s data.
    assert len(losses) == feed.position == 5


@pytest.mark.skipif(BACKEND == "torch", reason="torch has single steps")
@pytest.mark.parametrize("count", [6, 5])
def test_several_steps_in_one_execution(count):
    def make():
        return tiny(steps_per_execution=2)

    ours = Batches(pairs(count, seed=1))
    feed, losses = pair(make, Batches(pairs(count)), ours, epochs=2)
    assert feed.position == len(losses) == 2 * count


@pytest.mark.skipif(BACKEND != "jax", reason="jax has meshes")
def test_four_devices():
    import jax

    ks.set_distribution("fsdp+tensor", 4, 2, jax.devices()[:4])
    data = ks.TokenBatches(TOKENS, 4, 8, vocabulary_size=32)
    other = ks.TokenBatches(TOKENS, 4, 8, seed=1, vocabulary_size=32)
    pair(language_model, data.repeat()[:5], other.repeat()[:5])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras refuses these")
def test_parts_of_a_batch_that_are_none():
    def without(seed):
        return Batches([(*b, None) for b in pairs(3, seed=seed)])

    pair(tiny, without(0), without(1))


def test_train_on_batch():
    found = []
    for replaced in (True, False):
        keras.utils.set_random_seed(3)
        model, (theirs, ours) = tiny(), pairs(2)
        with watch(model) as observed:
            if replaced:
                observed.feed = lambda: ours
            model.train_on_batch(*(theirs if replaced else ours))
        found.append(values(model))
    same(*found)


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing")
def test_begun_and_ended_within_fit_nothing_is_compiled_anew():
    traced, model, ours = [], tiny(), pairs(1)[0]
    original = model.compute_loss

    def compute_loss(*args, **kwargs):
        traced.append(1)
        return original(*args, **kwargs)

    model.compute_loss = compute_loss
    with watch(model) as observed:
        observed.full = False

        def turn(batch, logs=None):
            observed.feed = (lambda: ours) if 3 <= batch < 6 else None

        callback = keras.callbacks.LambdaCallback(on_train_batch_begin=turn)
        model.fit(Batches(pairs(9)), callbacks=[callback], verbose=0)
    # Keras itself traces it when it builds.
    assert len(traced) <= 3


def test_an_error_of_ours_is_told_as_it_is():
    model = tiny()

    def broken():
        raise RuntimeError("the disk is gone")

    with watch(model) as observed:
        observed.feed = broken
        with pytest.raises(RuntimeError, match="the disk is gone"):
            model.fit(Batches(pairs(3)), verbose=0)
