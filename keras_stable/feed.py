"""The batches of a training by their number, some of them passed over."""

import json

import grain
import keras

from keras_stable.choices import check_integer
from keras_stable.data import TokenBatches

POSSIBLE = (
    "Batches are asked for by their number, again after going back. Give a "
    "`TokenBatches` or `MixedBatches`, a `grain.MapDataset` of batches, a "
    "`keras.utils.PyDataset`, a list of batches, or any object whose "
    "`data[number]` is a batch. Received: "
)


class Feed:
    """Batches of a training by their place in the data.

    A place is a batch's number, from 0, counted from the first pass over the
    data on: batch `place % len(data)` where data has an end. `TokenBatches`
    and `MixedBatches` count on themselves, whatever their `first_step` is,
    and so do Grain's own datasets, which may shuffle each pass anew. (`fit`
    shuffles a `PyDataset`'s batches by default: here they are in order.)

    Places that are skipped are passed over from then on:

    ```
    next() = first p >= position outside [first, last] of all in the ledger
    ```

    Args:
        data: `TokenBatches`, `MixedBatches`, `grain.MapDataset` of batches,
            `keras.utils.PyDataset`, list of batches, or whatever has
            `data[number]`. A batch is what Keras takes for one: an array, a
            dictionary, or `(x, y)` or `(x, y, weights)` of such.
        position: int. The place of the next batch. Defaults to 0.

    Attributes:
        position: int.
        ledger: list of `{"first": p, "last": q, "samples": [p B, (q + 1) B]}`,
            the places skipped and which of the data's samples these are, in
            the order of the data, the second excluded; B is the batch size.

    Raises:
        ValueError: for data without numbers: generators, `tf.data`, torch
            `DataLoader`s, `grain.IterDataset`s, arrays; and for empty data.

    Example:

    >>> feed = Feed([np.full((2, 1), i) for i in range(3)])
    >>> feed.skip(1, 1)
    >>> [feed.next()[0] for _ in range(4)]
    [0, 2, 3, 4]
    >>> feed.ledger
    [{'first': 1, 'last': 1, 'samples': [2, 4]}]
    """

    def __init__(self, data, position=0):
        self._length = _length(data)
        self.data = data
        self.position = check_integer(position, "`position`", 0)
        self.ledger = []

    def batch(self, place):
        """The batch of a place, skipped or not.

        Raises:
            IndexError: if data that does not tell its length has no more.
        """
        data = self.data
        if isinstance(data, TokenBatches):
            # Its own numbers begin where `fit` does.
            return data[place - data.first_step]
        if self._length is None:
            return data[place]
        if isinstance(data, grain.MapDataset) and place >= self._length:
            try:
                return data[place]
            except IndexError:  # Not all of them go on.
                pass
        return data[place % self._length]

    def next(self):
        """The next batch that is not skipped: `(place, batch)`."""
        place = self.place_after(self.position, 0)
        batch = self.batch(place)
        self.position = place + 1
        return place, batch

    def seek(self, place):
        """Lets `next` go on from a place, before or after the present."""
        self.position = check_integer(place, "`place`", 0)

    def skip(self, first, last):
        """Passes over the places from `first` to `last`, both included.

        Raises:
            ValueError: unless 0 <= first <= last.
        """
        first = check_integer(first, "`first`", 0)
        last = check_integer(last, "`last`", first)
        size = self._batch_size(first)
        samples = None if size is None else [first * size, (last + 1) * size]
        self.ledger.append({"first": first, "last": last, "samples": samples})

    def place_after(self, place, count):
        """Where a training from `place` on stands after `count` batches.

        Skipped ones are not counted, nor stood on.
        """
        place = check_integer(place, "`place`", 0)
        left = check_integer(count, "`count`", 0)
        for first, last in sorted((x["first"], x["last"]) for x in self.ledger):
            if last < place:
                continue
            if first > place + left:
                break
            left -= max(first - place, 0)
            place = last + 1
        return place + left

    def _batch_size(self, place):
        size = getattr(self.data, "batch_size", None)
        if isinstance(size, int):
            return size
        first = keras.tree.flatten(self.batch(place))[0]
        shape = getattr(first, "shape", ())
        return int(shape[0]) if len(shape) else None

    def state(self):
        """Position and ledger, as JSON's values."""
        return json.loads(
            json.dumps({"position": self.position, "ledger": self.ledger})
        )

    def restore(self, state):
        """Goes on from what `state` returned.

        Raises:
            ValueError: if it is no such thing.
        """
        try:
            position = check_integer(state["position"], "`position`", 0)
            ledger = []
            for entry in state["ledger"]:
                first = check_integer(entry["first"], "`first`", 0)
                last = check_integer(entry["last"], "`last`", first)
                samples = entry["samples"]
                ledger.append(
                    {"first": first, "last": last, "samples": samples}
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`state` must be from `Feed.state`. Received: {state!r}"
            ) from error
        self.position, self.ledger = position, ledger


def _length(data):
    """The number of batches of a pass, None if there is no saying."""
    kind = type(data).__name__
    plain = isinstance(data, (dict, str, bytes, tuple))
    if plain or hasattr(data, "dtype") or not hasattr(data, "__getitem__"):
        raise ValueError(POSSIBLE + kind)
    if isinstance(data, keras.utils.PyDataset):
        length = data.num_batches
    elif hasattr(data, "__len__"):
        length = len(data)
    else:
        length = None
    if length is not None and length < 1:
        raise ValueError(f"There are no batches in the {kind}.")
    return length
