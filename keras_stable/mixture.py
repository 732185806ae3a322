"""Batches from several corpora at once, in fixed proportions.

B batch, T sequence length, C corpora, r row of the whole run.
"""

import grain
import numpy as np

from keras_stable.choices import check_integer
from keras_stable.choices import check_number
from keras_stable.data import TokenBatches

# Of what weights are whole multiples; r * PARTS stays below 2**63.
PARTS = 2**20


def shares(weights):
    """Weights as positive integers that sum to about `PARTS`.

    Args:
        weights: sequence of positive numbers.

    Raises:
        ValueError: if there are none, or one is not positive and finite.
    """
    if not len(weights):
        raise ValueError("`weights` is empty: give one number a corpus.")
    weights = [w.item() if isinstance(w, np.generic) else w for w in weights]
    for i, weight in enumerate(weights):
        check_number(weight, f"weights[{i}]", low=0)
    total = sum(weights)
    return [max(round(weight / total * PARTS), 1) for weight in weights]


def assign(rows, parts):
    """The corpus of each row, and how many rows that corpus had before.

    ```
    n_c(r) = rows of corpus c among the first r = m - floor(m (P - p_c) / P)
             m what the corpora before c left of r, P the sum of p from c on
    row r is of the corpus whose n_c grows from r to r + 1
    ```

    So after any number of rows each corpus has its share but for 1 row with
    two corpora, and a few with more. The formula is that of
    `grain.MapDataset.mix`, which we do not use: it rounds weights to a
    hundredth of the smallest (0.7 of 1 becomes 0.6997), and its elements do
    not say which they are, so that no `sample_indices` could be told.

    Args:
        rows: int64 array (n,).
        parts: list of C integers p, as from `shares`.

    Returns:
        `(corpus, count)`, two int64 arrays (n,).
    """
    left, left_after = rows, rows + 1
    corpus, count = np.zeros_like(rows), np.zeros_like(rows)
    found = np.zeros(rows.shape, bool)
    total = sum(parts)
    for c, part in enumerate(parts):
        next_left = left * (total - part) // total
        next_after = left_after * (total - part) // total
        before = left - next_left
        mine = ~found & (left_after - next_after > before)
        corpus[mine], count[mine] = c, before[mine]
        found |= mine
        left, left_after, total = next_left, next_after, total - part
    return corpus, count


class MixedBatches(TokenBatches):
    """`TokenBatches` from several corpora, mixed row by row.

    Row i of the batch of step s is row `r = s B + i` of the run. It belongs
    to a corpus that `assign` finds from r alone, and is that corpus's next
    window: each corpus has shuffled passes of its own, and begins the next
    when it is used up, whatever the others do. So the batch is a pure function
    of the step, as that of `TokenBatches`, and rows of one batch are of
    several corpora.

    The sample of window w in pass e of corpus c is
    `(e * windows_c + w) * C + c`.

    Args:
        corpora: list of integer arrays (N_c,), as from `pack` or
            `tokenize_corpus`, by one tokenizer.
        batch_size: int. B.
        sequence_length: int. T.
        weights: list of C positive numbers, the corpora's shares of the rows;
            they are normalised. Defaults to the corpora's numbers of windows.
        shuffle, seed, mask_documents, separator_id, vocabulary_size: as for
            `TokenBatches`.

    `len` is the number of whole batches before a corpus begins its second
    pass, at least 1. State, `stream`, and `fit` are as for `TokenBatches`.

    Raises:
        ValueError: for arguments out of range, or a corpus of less than one
            window.

    Example:

    >>> code, prose = (np.arange(n) % 256 for n in (1000, 3000))
    >>> data = MixedBatches([code, prose], 8, 16, weights=[0.7, 0.3])
    >>> inputs, targets = data[0]
    """

    def __init__(
        self,
        corpora,
        batch_size,
        sequence_length,
        *,
        weights=None,
        shuffle=True,
        seed=0,
        mask_documents=False,
        separator_id=None,
        vocabulary_size=None,
    ):
        if not isinstance(corpora, (list, tuple)) or not len(corpora):
            raise ValueError(
                "`corpora` must be a list of token arrays, at least one. "
                f"Received: {type(corpora).__name__}"
            )
        if weights is not None and len(weights) != len(corpora):
            raise ValueError(
                "`weights` must be one number a corpus. Received: "
                f"{len(weights)} for {len(corpora)} corpora"
            )
        self.batch_size = check_integer(batch_size, "`batch_size`", 1)
        seed = check_integer(seed, "`seed`", 0, 2**32)
        # One row at a time of each corpus, in an order of its own.
        self.corpora = []
        for c, tokens in enumerate(corpora):
            try:
                part = TokenBatches(
                    tokens,
                    1,
                    sequence_length,
                    shuffle=shuffle,
                    seed=(seed + c) % 2**32,
                    mask_documents=mask_documents,
                    separator_id=separator_id,
                    vocabulary_size=vocabulary_size,
                )
            except ValueError as error:
                raise ValueError(f"corpora[{c}]: {error}") from error
            self.corpora.append(part)
        grain.MapDataset.__init__(self, self.corpora)
        self.sequence_length = self.corpora[0].sequence_length
        self.separator_id = separator_id
        self.mask_documents = mask_documents
        windows = [part.num_windows for part in self.corpora]
        self.num_windows = sum(windows)
        self._parts = shares(windows if weights is None else weights)
        total = sum(self._parts)
        self.weights = [part / total for part in self._parts]
        rows = min(n * total // p for n, p in zip(windows, self._parts))
        self._length = max(rows // self.batch_size, 1)
        self.first_step = 0
        self.fingerprint = {
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "shuffle": bool(shuffle),
            "seed": seed,
            "weights": self.weights,
        }
        for c, part in enumerate(self.corpora):
            for key in ("tokens", "num_tokens"):
                self.fingerprint[f"{key}_{c}"] = part.fingerprint[key]
        # Another version of Grain may shuffle otherwise.
        first = self.sample_indices(0)[:8]
        self.fingerprint["first_samples"] = first.tolist()

    def __len__(self):
        """Steps before a corpus begins its second pass, at least 1."""
        return self._length

    def sample_indices(self, step):
        """The samples of a global training step.

        Args:
            step: int. Batches before it, counted from the first.

        Returns:
            int64 array (B,). No sample of any corpus and pass has another's
            index; `sample_indices % C` are the corpora.
        """
        step = check_integer(step, "`step`", 0)
        rows = step * self.batch_size + np.arange(self.batch_size)
        corpus, count = assign(rows, self._parts)
        samples = np.empty_like(rows)
        for c, part in enumerate(self.corpora):
            mine = np.flatnonzero(corpus == c)
            for i in mine:
                samples[i] = part.sample_indices(int(count[i]))[0]
        return samples * len(self.corpora) + corpus

    def windows(self, sample_indices):
        """The tokens of samples, integer array (n, T + 1).

        Args:
            sample_indices: integer array (n,), as from `sample_indices`.
        """
        samples, corpus = np.divmod(sample_indices, len(self.corpora))
        shape = (len(samples), self.sequence_length + 1)
        # Corpora of other alphabets may have other dtypes.
        dtypes = [part.windows(samples[:0]).dtype for part in self.corpora]
        ids = np.empty(shape, np.result_type(*dtypes))
        for c, part in enumerate(self.corpora):
            mine = corpus == c
            ids[mine] = part.windows(samples[mine])
        return ids

    def __str__(self):
        mixed = ", ".join(
            f"{part.num_windows} at {weight:.4g}"
            for part, weight in zip(self.corpora, self.weights)
        )
        return (
            f"MixedBatches({mixed} windows of {self.sequence_length}, "
            f"{len(self)} batches of {self.batch_size})"
        )
