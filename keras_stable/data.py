"""Packed, replayable batches of tokens, and what n-gram models make of them.

B batch, T sequence length, N tokens, W windows of a pass, V vocabulary.
"""

import grain
import numpy as np

from keras_stable import backend
from keras_stable.choices import check_integer
from keras_stable.tokenizers import token_digest


def _check_tokens(tokens, vocabulary_size=None):
    """`tokens` as an unsigned array, and the smallest dtype for them.

    Unsigned ones are not copied, be they larger than memory.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise ValueError(
            "`tokens` must be a non-empty integer array of one dimension, as "
            "`pack(documents, tokenizer)` returns it. Received: shape "
            f"{tokens.shape}, dtype {tokens.dtype}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0:
        raise ValueError(f"Token ids must not be negative. Received: {low}")
    if vocabulary_size is not None:
        vocabulary_size = check_integer(vocabulary_size, "`vocabulary_size`", 1)
        if high >= vocabulary_size:
            raise ValueError(
                f"Token ids must be in [0, {vocabulary_size}), the vocabulary. "
                f"Received: {high} at position {int(tokens.argmax())}. Were "
                "the tokens made by another tokenizer?"
            )
    smallest = np.min_scalar_type(high)
    if tokens.dtype.kind != "u":
        tokens = tokens.astype(smallest)
    return tokens, smallest


class TokenBatches(grain.MapDataset):
    """Training batches as a pure function of the step number.

    The tokens are cut into W disjoint windows. Pass e over them begins at a
    shift s_e < T, different in each of T passes, and takes the windows in a
    shuffled order w_e; both depend on the seed and e alone. Sample `e W + w`:

    ```
    ids     = tokens[s_e + w T : s_e + w T + T + 1]       int32 (B, T + 1)
    inputs  = {"token_ids": ids[:-1]}
    targets = ids[1:]
    ```

    So a pass predicts every token once, except fewer than 2 T at the ends and
    fewer than B windows that fill no batch (others in every pass). Batch b of
    pass e, global step `e len(self) + b`, is made in about 0.1 ms when asked
    for; nothing is drawn before. Where several processes train one model (see
    `set_distribution`), each makes its own rows of batch b and no others.

    With `mask_documents` the tokens of a window see their own document only:

    ```
    inputs["padding_mask"] = 1 + separators before the token in its window
    weights                = 0 where token_ids is a separator, else 1
    ```

    for what follows a separator is another document's first token. A batch is
    then `(inputs, targets, weights)`. Note that Keras's mean over a batch
    divides by B T, not by the sum of the weights, unless the loss is made
    with `reduction="mean_with_sample_weight"`.

    Args:
        tokens: integer array (N,), as from `pack`.
        batch_size: int. B.
        sequence_length: int. T.
        shuffle: bool. False, for evaluation, takes the windows in order
            from the first token on, the same in every pass. Defaults to True.
        seed: int in [0, 2**32). Defaults to 0.
        mask_documents: bool. Defaults to False: documents run together.
        separator_id: int. The tokenizer's `end_token_id`; needed for
            `mask_documents`.
        vocabulary_size: int. If given, ids are checked against it.

    Raises:
        ValueError: for arguments out of range, ids outside the vocabulary, or
            fewer tokens than one batch takes.

    It is a `grain.MapDataset`: KerasHub models, `StableCausalLM` among them,
    take it as it is. Other Keras models do not ask for a dataset's length and
    take `stream()`, with the length told:

    >>> tokens = pack(["some text " * 100], ByteTokenizer())
    >>> data = TokenBatches(tokens, batch_size=4, sequence_length=16)
    >>> inputs, targets = data[0]
    >>> lm.fit(data, epochs=2)                                # doctest: +SKIP
    >>> model.fit(                                            # doctest: +SKIP
    ...     data.stream(), steps_per_epoch=len(data), shuffle=False
    ... )

    To resume, or to go back, move its beginning before the next `fit`:

    >>> state = data.get_state(step=7)      # 7 batches were trained on
    >>> data.set_state(state)               # now data[0] is batch 7
    """

    def __init__(
        self,
        tokens,
        batch_size,
        sequence_length,
        *,
        shuffle=True,
        seed=0,
        mask_documents=False,
        separator_id=None,
        vocabulary_size=None,
    ):
        self.batch_size = check_integer(batch_size, "`batch_size`", 1)
        self.sequence_length = check_integer(
            sequence_length, "`sequence_length`", 1
        )
        seed = check_integer(seed, "`seed`", 0, 2**32)
        if mask_documents and separator_id is None:
            raise ValueError(
                "`mask_documents=True` needs `separator_id`, the id that ends "
                "a document: separator_id=tokenizer.end_token_id. A "
                "`CharacterTokenizer` has one if made with separator=True."
            )
        tokens, smallest = _check_tokens(tokens, vocabulary_size)
        self.separator_id = separator_id
        self.mask_documents = mask_documents

        # One number of windows for all passes, whatever their shift.
        largest_shift = self.sequence_length - 1 if shuffle else 0
        last_start = len(tokens) - 1 - largest_shift
        self.num_windows = max(last_start // self.sequence_length, 0)
        if self.num_windows < self.batch_size:
            needed = self.batch_size * self.sequence_length + 1 + largest_shift
            raise ValueError(
                f"{len(tokens)} tokens do not fill one batch: batch_size="
                f"{batch_size} windows of sequence_length={sequence_length} "
                f"take {needed}. Give more text, or lower one of the two."
            )
        windows = grain.MapDataset.range(self.num_windows)
        shifts = grain.MapDataset.range(largest_shift + 1)
        if shuffle:
            windows = windows.seed(seed).shuffle()
            shifts = shifts.seed(seed).shuffle()
        self._shifts = shifts
        self._order = windows.batch(self.batch_size, drop_remainder=True)
        super().__init__(self._order)

        # All windows at all offsets, as views of `tokens`.
        self._views = np.lib.stride_tricks.sliding_window_view(
            tokens, self.sequence_length + 1
        )
        self.first_step = 0
        self.fingerprint = {
            "tokens": token_digest(tokens, smallest),
            "num_tokens": len(tokens),
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "shuffle": bool(shuffle),
            "seed": seed,
            # Another version of Grain may shuffle otherwise.
            "first_samples": self.sample_indices(0)[:8].tolist(),
        }

    def __len__(self):
        """Steps of one pass."""
        return len(self._order)

    def __getitem__(self, index):
        """The batch of global step `first_step + index`."""
        if isinstance(index, slice):
            return self.slice(index)
        step = self.first_step + index
        samples = self.sample_indices(step)
        ids = self.windows(samples[backend.local_rows(self.batch_size)])
        inputs = {"token_ids": ids[:, :-1].astype("int32")}
        targets = ids[:, 1:].astype("int32")
        if not self.mask_documents:
            return inputs, targets
        ends = ids[:, :-1] == self.separator_id
        # A separator belongs to the document that it ends.
        inputs["padding_mask"] = 1 + np.cumsum(ends, 1, "int32") - ends
        return inputs, targets, 1 - ends.astype("float32")

    def sample_indices(self, step):
        """The samples of a global training step.

        Args:
            step: int. Batches before it, counted from the first pass.

        Returns:
            int64 array (B,), `pass * num_windows + window`: no sample of any
            pass has another's index. It does not depend on `set_state`.
        """
        step = check_integer(step, "`step`", 0)
        windows = np.asarray(self._order[step], "int64")
        return step // len(self) * self.num_windows + windows

    def windows(self, sample_indices):
        """The tokens of samples, integer array (n, T + 1).

        Args:
            sample_indices: integer array (n,), as from `sample_indices`.
        """
        passes, windows = np.divmod(sample_indices, self.num_windows)
        passes, where = np.unique(passes, return_inverse=True)
        shifts = [self._shifts[int(e)] for e in passes]
        shifts = np.array(shifts, "int64")[where]
        return self._views[shifts + windows * self.sequence_length]

    def stream(self):
        """The batches from `first_step` on, pass after pass without end.

        Returns:
            `grain.IterDataset` that reads a few batches ahead.
        """
        # Grain's own default of 500 batches would fill the host's memory.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        return self.repeat().to_iter_dataset(ahead)

    def get_state(self, step=None):
        """What a checkpoint keeps, for `set_state`.

        Trainers read ahead, so only they know how much was trained on.

        Args:
            step: int. Batches trained on since the first pass began: the
                `first_step` at the beginning of `fit` plus the batches that
                `fit` has ended. (Not the optimizer's iterations, which a
                rewind turns back.) Defaults to `first_step`.

        Returns:
            Dictionary that JSON can hold: `"step"` and `"fingerprint"`.
        """
        step = self.first_step if step is None else step
        step = check_integer(step, "`step`", 0)
        return {"step": step, "fingerprint": dict(self.fingerprint)}

    def set_state(self, state):
        """Lets the next `fit` begin at the step of a state.

        Not for use during a `fit`, which has batches read ahead.

        Raises:
            ValueError: if the state is of other tokens or other settings.
        """
        try:
            step, theirs = state["step"], dict(state["fingerprint"])
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                "`state` must be a dictionary from `get_state`. Received: "
                f"{state!r}"
            ) from None
        ours = self.fingerprint
        names = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if names:
            differences = "; ".join(
                f"{k} is {theirs.get(k)!r} there and {ours.get(k)!r} here"
                for k in names
            )
            raise ValueError(
                f"The state belongs to other batches: {differences}. Resume "
                "with the same text and settings, or begin anew without it."
            )
        self.first_step = check_integer(step, "`step`", 0)

    def __str__(self):
        return (
            f"TokenBatches({self.num_windows} windows of "
            f"{self.sequence_length}, {len(self)} batches of {self.batch_size})"
        )


def _entropy(counts):
    """`-sum p log p` in nats, p = counts / total."""
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log(p)))


def unigram_entropy(tokens):
    """H(X) of the tokens' frequencies, in nats a token.

    ```
    H(X) = -sum_x p(x) log p(x),    p(x) = count(x) / N
    ```

    No model without context has a lower mean loss on these tokens: one above
    it has learned less than frequencies.

    Args:
        tokens: integer array (N,), N >= 1.

    Example:

    >>> round(unigram_entropy([0, 1, 0, 1]), 4)
    0.6931
    """
    return _entropy(np.bincount(_check_tokens(tokens)[0]))


def bigram_entropy(tokens):
    """H(X_t | X_t-1) of the tokens' pairs, in nats a token.

    ```
    H(X_t | X_t-1) = H(X_t-1, X_t) - H(X_t-1)    over the N - 1 pairs
    ```

    No model that sees the previous token alone has a lower mean loss on these
    tokens. With many rare pairs it is far below what such a model reaches on
    other text.

    Args:
        tokens: integer array (N,), N >= 2.

    Example:

    >>> bigram_entropy([0, 1, 0, 1])
    0.0
    """
    tokens, _ = _check_tokens(tokens)
    if len(tokens) < 2:
        raise ValueError("`bigram_entropy` needs two tokens. Received: one.")
    size = int(tokens.max()) + 1
    pairs = tokens[:-1].astype("int64") * size + tokens[1:]
    if size <= 4096:
        counts = np.bincount(pairs)
    else:
        # A table of all pairs would not fit; sorting is slower.
        counts = np.unique(pairs, return_counts=True)[1]
    # `+ 0.0` for the negative zero, `max` for rounding.
    return max(_entropy(counts) - unigram_entropy(tokens[:-1]), 0.0)
