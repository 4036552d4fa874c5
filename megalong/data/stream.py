"""One endless stream of tokens, and samples of fixed length cut from it.

Documents are concatenated in an order drawn anew for every epoch from (seed, epoch) alone, so
that what comes at a position never depends on how long the run is planned to be. Sample i is the
N + 1 tokens from position i * N (its last token is the first of the next sample): nothing is
stored per sample, and any slice of a sample, say one sequence rank's, is found by a binary search
in the cumulative lengths of the epoch's documents. So is where its documents begin and end.
"""

import os
from typing import Protocol

import numpy as np

from megalong.errors import UserError


class Documents(Protocol):
    """Tokens by documents: what --data-path names (`megalong.data.formats`), or a stand-in.

    prefix: of --data-path. lengths: int64 (num_documents,), tokens in each document.
    max_token_id, vocab_size, prepend_bos: the largest id, the number of ids of the tokenizer, and
        whether the documents begin with a token for that; None where that is not known.
    """

    prefix: str
    lengths: np.ndarray
    max_token_id: int | None
    vocab_size: int | None
    prepend_bos: bool | None

    @property
    def num_documents(self) -> int: ...

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, a copy; stop None: to its end."""
        ...


def split_documents(num_documents: int, split: str) -> tuple[range, range, range]:
    """The documents to train on, to validate on and to test on, as consecutive ranges.

    split: up to three relative weights, such as "969,30,1" or "90,10"; missing ones are 0.
    Megatron's rule: boundaries are the cumulated shares times num_documents, rounded.
    Raises UserError naming --split for anything else.
    """
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        raise UserError(f"--split {split!r}: numbers separated by commas are expected") from None
    if len(weights) > 3:
        raise UserError(f"--split {split!r}: at most three numbers (train, validation, test)")
    if not all(0 <= weight < float("inf") for weight in weights):
        raise UserError(f"--split {split!r}: the numbers must be finite and not negative")
    total = sum(weights)
    if total == 0:
        raise UserError(f"--split {split!r}: at least one number must be positive")
    bounds = [0]
    share = 0.0
    for weight in weights + [0.0] * (3 - len(weights)):
        share += weight / total
        bounds.append(round(share * num_documents))
    return range(bounds[0], bounds[1]), range(bounds[1], bounds[2]), range(bounds[2], bounds[3])


class TokenStream:
    """The documents of a range as an endless stream of tokens, epoch after epoch; its samples are
    `megalong.data.samples.Samples` of one source.

    document_range: which of them. sequence_length: N.
    seed: of the order of documents. shuffle: False keeps the file's order (evaluation).
    vocab_size: where given, a token id outside [0, vocab_size) raises UserError: when it is
        read, or at once if the largest id of the file is known.
    Raises UserError where the range holds no tokens.
    """

    def __init__(
        self,
        documents: Documents,
        document_range: range,
        sequence_length: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        if sequence_length < 1:
            raise UserError(f"--seq-length {sequence_length}: must be positive")
        if seed < 0:
            raise UserError(f"--seed {seed}: must not be negative")
        self.documents = documents
        self.document_range = document_range
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self.vocab_size = vocab_size
        self.sources = (os.path.basename(documents.prefix),)
        self._lengths = documents.lengths[document_range.start : document_range.stop]
        self.tokens_per_epoch = int(self._lengths.sum())
        if not self.tokens_per_epoch:
            raise UserError(
                f"no tokens in documents {document_range.start} to {document_range.stop} (end "
                f"excluded) of the {len(documents.lengths)} of {documents.prefix}: this part of "
                "--split is empty, give it a larger share"
            )
        known = documents.max_token_id
        if vocab_size is not None and known is not None and known >= vocab_size:
            raise UserError(
                f"{documents.prefix} holds token id {known}, but the vocabulary has {vocab_size} "
                "ids: was the data made with another tokenizer (--tokenizer-type,"
                " --tokenizer-model)?"
            )
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Whole samples within one epoch: N + 1 tokens each, neighbours share one token."""
        return (self.tokens_per_epoch - 1) // self.sequence_length

    def sample(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of sample i, in [0, N + 1); stop None: N + 1.

        Returns int64 (stop - start,). Reads only these tokens.
        """
        stop = self.sequence_length + 1 if stop is None else stop
        if i < 0 or not 0 <= start <= stop <= self.sequence_length + 1:
            raise IndexError(f"tokens [{start}, {stop}) of sample {i}")
        position = i * self.sequence_length
        return self.tokens(position + start, position + stop)

    def source(self, i: int) -> int:
        """Which of `sources` sample i is from: there is one."""
        return 0

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of the endless stream, int64 (end - begin,)."""
        tokens = np.empty(end - begin, dtype=np.int64)
        filled = 0
        while filled < len(tokens):
            document, start, length = self._locate(begin + filled)
            stop = min(start + len(tokens) - filled, length)
            tokens[filled : filled + stop - start] = self.documents.read(document, start, stop)
            filled += stop - start
        if self.vocab_size is not None and len(tokens):
            self._check_ids(tokens, begin)
        return tokens

    def document_bounds(
        self, i: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents of tokens [start, stop) of sample i begin and end, in [0, N]; stop
        None: N.

        Returns for each token the place in the sample of its document's first token, and the place
        after its document's last one, both int32 (stop - start,) and clipped to [0, N]: a document
        that goes on from the sample before begins at place 0. Reads no tokens.
        """
        length = self.sequence_length
        stop = length if stop is None else stop
        if i < 0 or not 0 <= start <= stop <= length:
            raise IndexError(f"documents of tokens [{start}, {stop}) of sample {i}")
        position = i * length
        bounds = self.bounds(position + start, position + stop)
        return tuple((x - position).clip(0, length).astype(np.int32) for x in bounds)

    def bounds(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Of tokens [begin, end) of the endless stream, the positions of their documents' first
        tokens and of those after their last ones, int64 (end - begin,) each."""
        parts = [(np.zeros(0, np.int64),) * 2]
        while begin < end:
            epoch, position = divmod(begin, self.tokens_per_epoch)
            stop = min(position + end - begin, self.tokens_per_epoch)
            order, ends = self._epoch(epoch)
            first, last = np.searchsorted(ends, (position, stop - 1), side="right")
            ends = ends[first : last + 1]
            starts = ends - self._lengths[order[first : last + 1]]
            # Of documents without tokens there are none.
            counts = ends.clip(max=stop) - starts.clip(min=position)
            offset = epoch * self.tokens_per_epoch
            parts.append(tuple(np.repeat(x + offset, counts) for x in (starts, ends)))
            begin += stop - position
        starts, ends = zip(*parts, strict=True)
        return np.concatenate(starts), np.concatenate(ends)

    def _locate(self, position: int) -> tuple[int, int, int]:
        """The document at a position of the stream, the token inside it, and its length."""
        epoch, position = divmod(position, self.tokens_per_epoch)
        order, ends = self._epoch(epoch)
        # side="right" steps over documents without tokens.
        rank = int(np.searchsorted(ends, position, side="right"))
        length = int(self._lengths[order[rank]])
        start = position - (int(ends[rank]) - length)
        return self.document_range.start + int(order[rank]), start, length

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of documents, and where each ends in the epoch, int64.

        Two epochs are kept: a batch may lie across a boundary."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                self._epochs.pop(next(iter(self._epochs)))
            order = self._order(epoch)
            self._epochs[epoch] = order, np.cumsum(self._lengths[order], dtype=np.int64)
        return self._epochs[epoch]

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self._lengths))
        # Sorting raw random bits, not Generator.permutation: numpy promises the former's values
        # across its versions, and a run must resume into the same order after an upgrade.
        bits = np.random.PCG64(np.random.SeedSequence((self.seed, epoch)))
        return np.argsort(bits.random_raw(len(self._lengths)), kind="stable")

    def _check_ids(self, tokens: np.ndarray, begin: int) -> None:
        if tokens.min() >= 0 and tokens.max() < self.vocab_size:
            return
        where = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        document, start, _ = self._locate(begin + where)
        raise UserError(
            f"document {document} of {self.documents.prefix} holds token id {tokens[where]} (its "
            f"token {start}), but the vocabulary has {self.vocab_size} ids: was the data made with "
            "another tokenizer (--tokenizer-type, --tokenizer-model)?"
        )
