"""Samples that begin where documents begin: `--sample-mode document`.

The documents are those of the stream (`megalong.data.stream`), in its order. With N tokens in a
sample,

- a document of N tokens or more fills floor(length / N) samples by itself, cut at the multiples of
  N from its start;
- its rest, fewer than N tokens, and shorter documents whole, are put behind one another: the rests,
  a stream without end through all epochs. Each N of them are a sample, which comes once it is
  full: right behind the samples of the document that filled it up.

So every token of an epoch is in exactly one sample, every stretch of samples has the mix of the
documents, and after any number of samples a run has been through as much of the order as the stream
would have been, whatever N, but for fewer than N rests that wait.

The token after the last one of a sample, which is only ever predicted, is the one that follows in
the document, or among the rests. Behind the end of a document that ends with its sample it is the
first token of the next sample, as in the stream every document is followed by another.

Nothing is stored per sample: two cumulative counts per document of an epoch say which document, or
which place of the rests, a sample begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from megalong.data.document_order import find_epoch
from megalong.data.samples import ContextReport, place_type, runs_of
from megalong.data.stream import TokenStream

# What is had for tokens [start, stop) of a document.
_Read = Callable[[int, int, int], np.ndarray]


class _Epoch(NamedTuple):
    first_sample: int  # samples that were full before this epoch
    first_rest: int  # tokens of rests before it
    documents: np.ndarray  # in their order, int64
    samples: np.ndarray  # samples of the epoch that are full behind each document, int64
    rests: np.ndarray  # tokens of rests of the epoch up to and with each document, int64


class _Part(NamedTuple):
    """Tokens [start, stop) of a document, from `place` on in the rests. begin and end: where the
    rest of the document begins and ends there."""

    document: int
    start: int
    stop: int
    place: int
    begin: int
    end: int


class DocumentSamples:
    """The documents of a stream as samples of N + 1 tokens, without end
    (`megalong.data.samples.Samples`).

    stream: says which documents, in what order, and what N is.
    tokens_per_epoch, samples_per_epoch: of the first epoch; another has at most one sample more or
        less, unless documents are in every other epoch.
    """

    def __init__(self, stream: TokenStream) -> None:
        self._stream = stream
        self.sequence_length, self.seed = stream.sequence_length, stream.seed
        self.documents, self.document_range = stream.documents, stream.document_range
        self.lengths, self.sources = stream.lengths, stream.sources
        self.tokens_per_epoch = stream.tokens_per_epoch
        self._whole, self._rest = (
            part.astype(place_type(stream.sequence_length))
            for part in np.divmod(stream.lengths, stream.sequence_length)
        )
        self.samples_per_epoch = self._first_sample(1)
        self._epochs: dict[int, _Epoch] = {}

    def sample(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of sample i, in [0, N + 1); stop None: N + 1.

        Returns int64 (stop - start,). Reads only these tokens.
        """
        return self._gathered(self._stream.read, i, start, stop)

    @property
    def masks_loss(self) -> bool:
        """Whether some tokens may not count in the loss."""
        return self._stream.masks_loss

    def loss_mask(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of these tokens count in the loss, as of `Samples`."""
        return self._gathered(self._stream.read_mask, i, start, stop)

    def source(self, i: int) -> int:
        """Which of `sources` sample i is from: there is one."""
        return self._stream.source(i)

    def document_bounds(
        self, i: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return where the documents of these tokens begin and end, as of `Samples`."""
        length = self.sequence_length
        stop = length if stop is None else stop
        if i < 0 or not 0 <= start <= stop <= length:
            raise IndexError(f"documents of tokens [{start}, {stop}) of sample {i}")
        bounds = np.zeros((2, stop - start), place_type(length))
        document, begin = self._locate(i)
        if document is not None:
            bounds[1] = length
        else:
            for part in self._rest_parts(begin + start, begin + stop):
                place = part.place - begin - start
                here = slice(place, place + part.stop - part.start)
                bounds[0, here] = max(part.begin - begin, 0)
                bounds[1, here] = min(part.end - begin, length)
        return bounds[0], bounds[1]

    def context_report(self) -> ContextReport:
        """How much real context the tokens have of the epoch that fills the first sample."""
        epoch = self._epoch_with(0, "first_sample", "samples", self._first_sample)
        rest = self._rest[epoch.documents].astype(np.int64)
        runs = runs_of(epoch.first_rest + epoch.rests - rest, rest, self.sequence_length)
        runs.counts[-1] += self._whole[epoch.documents].sum()
        lengths = self._stream.lengths[epoch.documents]
        return ContextReport.of(runs, lengths, self.sequence_length)

    def _locate(self, i: int) -> tuple[int | None, int]:
        """Where sample i begins: a document, and the token in it; or None, and the place in the
        rests."""
        epoch = self._epoch_with(i, "first_sample", "samples", self._first_sample)
        i -= epoch.first_sample
        rank = int(np.searchsorted(epoch.samples, i, side="right"))
        document = int(epoch.documents[rank])
        place = i - (int(epoch.samples[rank - 1]) if rank else 0)
        if place < self._whole[document]:
            return document, place * self.sequence_length
        filled = (epoch.first_rest + int(epoch.rests[rank])) // self.sequence_length
        return None, (filled - 1) * self.sequence_length

    def _gathered(self, read: _Read, i: int, start: int, stop: int | None) -> np.ndarray:
        """What read(document, start, stop) has for tokens [start, stop) of sample i."""
        length = self.sequence_length
        stop = length + 1 if stop is None else stop
        if i < 0 or not 0 <= start <= stop <= length + 1:
            raise IndexError(f"tokens [{start}, {stop}) of sample {i}")
        document, begin = self._locate(i)
        if document is None:
            rests = self._rest_parts(begin + start, begin + stop)
            parts = [read(part.document, part.start, part.stop) for part in rests]
            return np.concatenate(parts or [read(0, 0, 0)])
        end = min(begin + stop, int(self._stream.lengths[document]))
        # Only of the token after a document's last one there may be nothing but that one.
        parts = [read(document, min(begin + start, end), end)]
        if begin + stop > end and stop > start:
            parts.append(self._gathered(read, i + 1, 0, 1))
        return np.concatenate(parts)

    def _rest_parts(self, begin: int, end: int) -> Iterator[_Part]:
        """Places [begin, end) of the rests, document by document."""
        while begin < end:
            epoch = self._epoch_with(begin, "first_rest", "rests", self._first_rest)
            rank = int(np.searchsorted(epoch.rests, begin - epoch.first_rest, side="right"))
            document = int(epoch.documents[rank])
            rest_end = epoch.first_rest + int(epoch.rests[rank])
            rest_begin = rest_end - int(self._rest[document])
            start = int(self._whole[document]) * self.sequence_length + begin - rest_begin
            size = min(end, rest_end) - begin
            yield _Part(document, start, start + size, begin, rest_begin, rest_end)
            begin += size

    def _epoch_with(self, place: int, first: str, counts: str, before) -> _Epoch:
        """The epoch of a sample, or of a place in the rests: fields of _Epoch say which.

        Two epochs are kept: a sample may lie across a boundary."""
        for epoch in self._epochs.values():
            count = getattr(epoch, counts)
            if len(count) and 0 <= place - getattr(epoch, first) < count[-1]:
                return epoch
        number = find_epoch(before, place)
        while len(self._epochs) >= 2:
            self._epochs.pop(next(iter(self._epochs)))
        index = self._stream.order.kept(
            f"document {self.sequence_length} {number}", partial(self._index, number)
        )
        first = self._first_sample(number), self._first_rest(number)
        self._epochs[number] = _Epoch(*first, *index)
        return self._epochs[number]

    def _index(self, epoch: int) -> np.ndarray:
        """The arrays of an _Epoch, int64 (3, documents)."""
        documents = self._stream.order.epoch(epoch)
        rests = np.cumsum(self._rest[documents], dtype=np.int64)
        waiting = self._first_rest(epoch) % self.sequence_length
        samples = np.cumsum(self._whole[documents], dtype=np.int64)
        samples += (rests + waiting) // self.sequence_length
        return np.stack([documents, samples, rests])

    def _first_rest(self, epoch: int) -> int:
        return self._stream.order.total_before(epoch, self._rest)

    def _first_sample(self, epoch: int) -> int:
        whole = self._stream.order.total_before(epoch, self._whole)
        return whole + self._first_rest(epoch) // self.sequence_length
