"""Several corpora in fixed proportions, as a pure function of the step."""

import json
import math

import grain
import keras
import numpy as np
import pytest

from keras_stable import ByteTokenizer
from keras_stable import MixedBatches
from keras_stable import TokenBatches
from keras_stable import pack
from keras_stable.mixture import assign
from keras_stable.mixture import shares

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="no backend takes part"
)


def mixed(sizes=(500, 900, 3000), **kwargs):
    """Batches of tokens that tell their corpus and position."""
    settings = {"batch_size": 5, "sequence_length": 8, **kwargs}
    corpora = [c * 10_000 + np.arange(n) for c, n in enumerate(sizes)]
    return MixedBatches(corpora, **settings)


def corpora_of(data, step):
    return data[step][0]["token_ids"][:, 0] // 10_000


@pytest.mark.parametrize(
    "weights", [[1], [0.7, 0.3], [1, 1, 1], [5, 0.5, 2, 1], [1e-4, 1], [1] * 9]
)
def test_proportions_hold_after_any_number_of_rows(weights):
    rows = np.arange(20_000)
    corpus, count = assign(rows, shares(weights))
    share = np.array(weights) / sum(weights)
    for c in range(len(weights)):
        mine = corpus == c
        taken = np.cumsum(mine)
        ideal = share[c] * (rows + 1)
        # 1 row; with many corpora, the roundings of those before add up.
        bound = 1 if len(weights) <= 2 else 2
        assert np.abs(taken - ideal).max() <= bound + 20_000 / 2**20
        # The corpus's own rows, one after the other.
        np.testing.assert_array_equal(count[mine], np.arange(mine.sum()))
    # Row by row, as Grain assigns them to what it makes of 0.7 and 0.3.
    ours, _ = assign(np.arange(500), [233, 100])
    theirs = grain.MapDataset.mix(
        [grain.MapDataset.source([c]).repeat() for c in (0, 1)], [0.7, 0.3]
    )
    assert ours.tolist() == [theirs[i] for i in range(500)]
    # Far into a run.
    late, _ = assign(2**42 + np.arange(10_000), shares([0.7, 0.3]))
    assert np.mean(late == 0) == pytest.approx(0.7, abs=2e-4)


def test_rows_of_a_batch_are_of_several_corpora():
    data = mixed(weights=[0.6, 0.2, 0.2])
    for step in range(20):
        counts = np.bincount(corpora_of(data, step), minlength=3)
        assert abs(counts[0] - 3) <= 1 and counts[1:].max() <= 2
    inputs, targets = data[3]
    ids = inputs["token_ids"]
    assert ids.dtype == targets.dtype == np.int32 and ids.shape == (5, 8)
    np.testing.assert_array_equal(targets, ids + 1)
    assert data.weights == pytest.approx([0.6, 0.2, 0.2], abs=1e-5)


def test_each_corpus_has_shuffled_passes_of_its_own():
    data = mixed((200, 3000), weights=[1, 1], batch_size=4)
    windows = [part.num_windows for part in data.corpora]
    seen = [[], []]
    for step in range(3 * sum(windows) // 4):
        for row in data[step][0]["token_ids"]:
            seen[row[0] // 10_000].append(row[0] % 10_000)
    for c, starts in enumerate(seen):
        passes = len(starts) // windows[c]
        assert passes > (10 if c == 0 else 0)
        orders = set()
        for e in range(passes):
            order = starts[e * windows[c] : (e + 1) * windows[c]]
            assert len(set(order)) == windows[c]
            assert order != sorted(order)
            orders.add(tuple(order))
        assert len(orders) == passes
    # Two equal corpora are not read in the same order.
    twins = MixedBatches([np.arange(999)] * 2, 2, 8)
    assert any(
        row[0, 0] != row[1, 0] for row in (twins[i][1] for i in range(9))
    )


def test_a_pass_ends_before_a_corpus_repeats():
    data = mixed((500, 900), weights=[1, 1])
    samples = np.concatenate([data.sample_indices(s) for s in range(len(data))])
    windows = [part.num_windows for part in data.corpora]
    for c in (0, 1):
        assert (samples[samples % 2 == c] // 2).max() < windows[c]
    assert len(data) == 2 * windows[0] // 5
    # By default in proportion to what there is: everything, once.
    whole = mixed((500, 900))
    assert len(whole) >= sum(windows) // 5 - 1
    assert whole.weights == pytest.approx(np.array(windows) / sum(windows))


def test_samples_are_global_and_lead_to_the_tokens():
    data = mixed()
    steps = 4 * len(data)
    samples = [data.sample_indices(s) for s in range(steps)]
    assert all(s.dtype == np.int64 and s.shape == (5,) for s in samples)
    assert len(set(np.concatenate(samples))) == 5 * steps
    for step in (0, 1, steps - 1):
        np.testing.assert_array_equal(
            data.windows(samples[step])[:, 1:], data[step][1]
        )
        np.testing.assert_array_equal(samples[step] % 3, corpora_of(data, step))
    shuffled = np.random.default_rng(0).permutation(np.concatenate(samples))
    assert data.windows(shuffled[:50]).shape == (50, 9)
    # A pure function: the same anew, in any order, whatever the state.
    again = mixed()
    again.set_state(again.get_state(11))
    for step in (7, 0, 3):
        np.testing.assert_array_equal(again.sample_indices(step), samples[step])
    np.testing.assert_array_equal(again[2][1], data[13][1])
    assert (mixed(seed=1).sample_indices(0) != samples[0]).any()


def test_state_is_json_and_of_these_batches():
    data = mixed(weights=[1, 2, 3])
    state = json.loads(json.dumps(data.get_state(7)))
    other = mixed(weights=[1, 2, 3])
    other.set_state(state)
    assert other.first_step == 7
    stream = iter(other.stream())
    np.testing.assert_array_equal(next(stream)[1], data[7][1])
    with pytest.raises(ValueError, match="weights is"):
        mixed(weights=[1, 2, 4]).set_state(state)
    with pytest.raises(ValueError, match="tokens_1 is.*num_tokens_1 is 900 th"):
        mixed((500, 901, 3000), weights=[1, 2, 3]).set_state(state)
    with pytest.raises(ValueError, match="other batches"):
        TokenBatches(np.arange(500), 5, 8).set_state(state)


def test_is_a_dataset_like_token_batches():
    data = mixed()
    assert isinstance(data, (TokenBatches, grain.MapDataset))
    assert len(data.repeat()[: 3 * len(data)]) == 3 * len(data)
    repeated = data.repeat()[: 3 * len(data)]
    step = 2 * len(data) + 1
    np.testing.assert_array_equal(repeated[step][1], data[step][1])
    assert len(data[1:]) == len(data) - 1
    assert str(data).startswith("MixedBatches(61 at 0.")
    # Of one corpus: its windows, as evaluated in order.
    one = MixedBatches([np.arange(97)], 3, 8, shuffle=False)
    starts = [one[i][0]["token_ids"][:, 0].tolist() for i in range(4)]
    assert starts == [[0, 8, 16], [24, 32, 40], [48, 56, 64], [72, 80, 88]]


def test_documents_are_masked_in_each():
    corpora = [pack(["abc", "de"] * 40, ByteTokenizer())]
    corpora += [pack(["漢字"] * 99, ByteTokenizer()).astype("uint16")]
    settings = {"mask_documents": True, "separator_id": 0}
    data = MixedBatches(corpora, 4, 16, **settings)
    inputs, targets, weights = data[1]
    ends = inputs["token_ids"] == 0
    np.testing.assert_array_equal(weights, 1 - ends)
    assert inputs["padding_mask"].min() == 1 and ends.any(1).all()


def test_errors():
    for corpora in ([], None, np.arange(99)):
        with pytest.raises(ValueError, match="`corpora` must be a list"):
            MixedBatches(corpora, 4, 8)
    with pytest.raises(ValueError, match="one number a corpus.*2 for 3"):
        mixed(weights=[1, 2])
    for weight in (0, -1, math.nan, math.inf, "1", None):
        with pytest.raises(ValueError, match=r"weights\[1\] must be.*Received"):
            mixed(weights=[1, weight, 1])
    with pytest.raises(ValueError, match=r"corpora\[1\]: 9 tokens do not fill"):
        mixed((500, 9, 500))
    with pytest.raises(ValueError, match="`batch_size` must be"):
        mixed(batch_size=0)
    with pytest.raises(ValueError, match="`seed` must be"):
        mixed(seed=-1)
    with pytest.raises(ValueError, match=r"corpora\[2\].*the vocabulary"):
        mixed(vocabulary_size=20_000)
    with pytest.raises(ValueError, match="needs `separator_id`"):
        mixed(mask_documents=True)
    with pytest.raises(ValueError, match="`step` must be"):
        mixed().sample_indices(-1)
