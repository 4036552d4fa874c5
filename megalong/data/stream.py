"""One endless stream of tokens, and samples of fixed length cut from it.

Documents are concatenated in the order of `megalong.data.document_order`. Sample i is the N + 1
tokens from position i * N (its last token is the first of the next sample): nothing is stored per
sample, and any slice of one is found by a binary search in the cumulative lengths of the epoch's
documents. So is where its documents begin and end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megalong.data.document_order import DocumentOrder, IndexCache, find_epoch
from megalong.data.indexed import IndexedDocuments
from megalong.data.samples import ContextReport, place_type, runs_of
from megalong.data.sources import LengthUpsampling
from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from megalong.data.tokenizers.tokenizer import Tokenizer


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


class _Epoch(NamedTuple):
    begin: int  # position of its first token in the stream
    documents: np.ndarray  # in their order, int64
    ends: np.ndarray  # where each ends in the epoch, int64


class TokenStream:
    """The documents of a range as an endless stream of tokens, epoch after epoch; its samples are
    `megalong.data.samples.Samples` of one source.

    document_range: which of them. sequence_length: N.
    seed: of the order of documents. shuffle: False keeps the file's order (evaluation).
    upsampling: how often a document is in an epoch, by its length; None: once.
    name: of the source; None: the last part of the documents' prefix.
    salt: of the order too, so that the sources of a blend have orders of their own.
    cache: where the order of an epoch is kept on the disk, if it is.
    vocab_size: where given, a token id outside [0, vocab_size) raises UserError: when it is
        read, or at once if the largest id of the file is known.
    Raises UserError where the range holds no tokens.
    """

    def __init__(
        self,
        documents: IndexedDocuments,
        document_range: range,
        sequence_length: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        upsampling: LengthUpsampling | None = None,
        vocab_size: int | None = None,
        name: str | None = None,
        salt: int = 0,
        cache: IndexCache | None = None,
    ) -> None:
        if sequence_length < 1:
            raise UserError(f"--seq-length {sequence_length}: must be positive")
        if seed < 0:
            raise UserError(f"--seed {seed}: must not be negative")
        self.documents = documents
        self.document_range = document_range
        self.sequence_length = sequence_length
        self.seed = seed
        self.vocab_size = vocab_size
        self.sources = (os.path.basename(documents.prefix) if name is None else name,)
        self.lengths = documents.lengths[document_range.start : document_range.stop]
        self.order = DocumentOrder(
            self.lengths, seed, shuffle=shuffle, salt=salt, upsampling=upsampling, cache=cache
        )
        if not self.lengths.any():
            raise UserError(
                f"no tokens in documents {document_range.start} to {document_range.stop} (end "
                f"excluded) of the {len(documents.lengths)} of {documents.prefix}: this part of "
                "--split is empty, give it a larger share"
            )
        mean = self.order.mean_total(self.lengths)
        self.tokens_per_epoch = max(round(mean), 1)  # where documents are in every other epoch
        if not mean:
            raise UserError(
                f"--length-upsampling leaves out all documents {document_range.start} to"
                f" {document_range.stop} (end excluded) of {documents.prefix}, the longest of which"
                f" has {self.lengths.max():,} tokens: give their lengths a weight"
            )
        known = documents.max_token_id
        if vocab_size is not None and known is not None and known >= vocab_size:
            raise UserError(
                f"{documents.prefix} holds token id {known}, but the vocabulary has {vocab_size} "
                "ids: was the data made with another tokenizer (--tokenizer-type,"
                " --tokenizer-model)?"
            )
        self._epochs: dict[int, _Epoch] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Whole samples within one epoch: N + 1 tokens each, neighbours share one token."""
        return (self.tokens_per_epoch - 1) // self.sequence_length

    def sample(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return tokens [start, stop) of sample i, as of `Samples`."""
        stop = self.sequence_length + 1 if stop is None else stop
        if i < 0 or not 0 <= start <= stop <= self.sequence_length + 1:
            raise IndexError(f"tokens [{start}, {stop}) of sample {i}")
        position = i * self.sequence_length
        return self.tokens(position + start, position + stop)

    @property
    def masks_loss(self) -> bool:
        """Whether some tokens may not count in the loss."""
        return self.documents.masks_loss

    def loss_mask(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of these tokens count in the loss, as of `Samples`."""
        stop = self.sequence_length + 1 if stop is None else stop
        position = i * self.sequence_length
        return self.masks(position + start, position + stop)

    def source(self, i: int) -> int:
        """Which of `sources` sample i is from: there is one."""
        return 0

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of the endless stream, int64 (end - begin,)."""
        tokens = self._gathered(self.documents.read, begin, end, np.int64)
        if self.vocab_size is not None and len(tokens):
            self._check_ids(tokens, lambda where: self._locate(begin + where)[:2])
        return tokens

    def masks(self, begin: int, end: int) -> np.ndarray:
        """Which of the tokens [begin, end) of the endless stream count in the loss, bool."""
        return self._gathered(self.documents.loss_mask, begin, end, bool)

    def document_bounds(
        self, i: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return where the documents of these tokens begin and end, as of `Samples`."""
        length = self.sequence_length
        stop = length if stop is None else stop
        if i < 0 or not 0 <= start <= stop <= length:
            raise IndexError(f"documents of tokens [{start}, {stop}) of sample {i}")
        position = i * length
        bounds = self.bounds(position + start, position + stop)
        return tuple((x - position).clip(0, length).astype(place_type(length)) for x in bounds)

    def bounds(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Of tokens [begin, end) of the endless stream, the positions of their documents' first
        tokens and of those after their last ones, int64 (end - begin,) each."""
        parts = [(np.zeros(0, np.int64),) * 2]
        while begin < end:
            epoch = self._epoch_at(begin)
            stop = min(end, epoch.begin + int(epoch.ends[-1]))
            places = begin - epoch.begin, stop - 1 - epoch.begin
            first, last = np.searchsorted(epoch.ends, places, side="right")
            ends = epoch.ends[first : last + 1] + epoch.begin
            starts = ends - self.lengths[epoch.documents[first : last + 1]]
            # Of documents without tokens there are none.
            counts = ends.clip(max=stop) - starts.clip(min=begin)
            parts.append(tuple(np.repeat(x, counts) for x in (starts, ends)))
            begin = stop
        starts, ends = zip(*parts, strict=True)
        return np.concatenate(starts), np.concatenate(ends)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document of the range, counted from its first one, as int64.

        Raises UserError for an id beyond the vocabulary.
        """
        document += self.document_range.start
        tokens = self.documents.read(document, start, stop).astype(np.int64)
        if self.vocab_size is not None and len(tokens):
            self._check_ids(tokens, lambda where: (document, start + where))
        return tokens

    def read_mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) of a document of the range count in the loss, bool."""
        return self.documents.loss_mask(document + self.document_range.start, start, stop)

    def context_report(self) -> ContextReport:
        """How much real context the tokens of the first epoch have."""
        epoch = self._epoch_at(0)  # which the training begins with
        lengths = self.lengths[epoch.documents]
        runs = runs_of(epoch.ends - lengths, lengths, self.sequence_length)
        return ContextReport.of(runs, lengths, self.sequence_length)

    def _gathered(
        self, read: Callable[[int, int, int], np.ndarray], begin: int, end: int, dtype: type
    ) -> np.ndarray:
        """What read(document, start, stop) has for tokens [begin, end) of the stream."""
        found, filled = np.empty(end - begin, dtype), 0
        while filled < len(found):
            document, start, length = self._locate(begin + filled)
            stop = min(start + len(found) - filled, length)
            found[filled : filled + stop - start] = read(document, start, stop)
            filled += stop - start
        return found

    def _locate(self, position: int) -> tuple[int, int, int]:
        """The document at a position of the stream, the token inside it, and its length."""
        epoch = self._epoch_at(position)
        # side="right" steps over documents without tokens.
        rank = int(np.searchsorted(epoch.ends, position - epoch.begin, side="right"))
        document = int(epoch.documents[rank])
        length = int(self.lengths[document])
        start = position - epoch.begin - (int(epoch.ends[rank]) - length)
        return self.document_range.start + document, start, length

    def _epoch_at(self, position: int) -> _Epoch:
        """The epoch that a position of the stream is in.

        Two epochs are kept: a batch may lie across a boundary."""
        for epoch in self._epochs.values():
            if 0 <= position - epoch.begin < (epoch.ends[-1] if len(epoch.ends) else 0):
                return epoch
        number = find_epoch(self._begin, position)
        while len(self._epochs) >= 2:
            self._epochs.pop(next(iter(self._epochs)))
        index = self.order.kept(f"stream {number}", partial(self._index, number))
        self._epochs[number] = _Epoch(self._begin(number), *index)
        return self._epochs[number]

    def _index(self, epoch: int) -> np.ndarray:
        """The documents of an epoch in their order, and where they end in it, int64."""
        documents = self.order.epoch(epoch)
        return np.stack([documents, np.cumsum(self.lengths[documents])])

    def _begin(self, epoch: int) -> int:
        return self.order.total_before(epoch, self.lengths)

    def _check_ids(self, tokens: np.ndarray, locate: Callable[[int], tuple[int, int]]) -> None:
        """locate: the document, and the token in it, of a place in these tokens."""
        if tokens.min() >= 0 and tokens.max() < self.vocab_size:
            return
        where = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        document, place = locate(where)
        raise UserError(
            f"{self.documents.place(document)} holds token id {tokens[where]} (its token {place}),"
            f" but the vocabulary has {self.vocab_size} ids: was the data made with "
            "another tokenizer (--tokenizer-type, --tokenizer-model)?"
        )


def check_tokenizer(
    documents: IndexedDocuments, tokenizer: Tokenizer, tokenizer_flag: str, place: str | None = None
) -> None:
    """Raise UserError where the documents were made with another tokenizer.

    tokenizer: as it is for texts, without the mask token of a masked-language model.
    tokenizer_flag: what names it, with its value. place: what names the documents; None:
    --data-path. Data that does not say what made it passes,
    where the numbers of ids agree.
    """
    ids, made_with = documents.vocab_size, documents.made_with
    place = place or f"--data-path {documents.prefix}"
    if ids is not None and ids != tokenizer.vocab_size:
        raise UserError(
            f"{place} was made with a tokenizer of {ids} ids, and"
            f" {tokenizer_flag} has {tokenizer.vocab_size}: give the same"
        )
    there = made_with.get("tokenizer_sha256")
    if there is not None and there != tokenizer.fingerprint:
        file, sidecar = made_with.get("tokenizer_model"), f"{documents.prefix}.json"
        where = f" ({sidecar})" if os.path.isfile(sidecar) else ""  # not of a folder of pairs
        raise UserError(
            f"{place} was made with another tokenizer than {tokenizer_flag}:"
            f" with {f'{file}, ' if file else 'that '}of sha256 {there[:12]} and not"
            f" {tokenizer.fingerprint[:12]}{where}: give the same"
        )
