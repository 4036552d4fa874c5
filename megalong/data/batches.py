"""Micro batches of a token stream, for one data-parallel rank and one slice of the sequence.

A micro batch is a dict of CPU tensors: tokens and labels, int64 (micro_batch, slice), labels[t]
being the token that follows tokens[t]; and positions, int64 (slice,), places in the whole
sequence. labels are IGNORE_INDEX where there is nothing to predict: where the next token does not
count in the loss (`megalong.data.loss_mask`), say. Of several sources there is
source too, int64 (micro_batch,): which of them each row is from.

With masks (`megalong.data.batches`) labels[t] is what stood in the place of tokens[t], where that
is to be told. How many that are hangs on the tokens, as it does where not all of them count, or
where nothing is predicted from the end of a document: micro batches of the training have
"predicted" too, int64 (), how many this rank's micro batches of the whole step have.

Where documents are kept apart there are document_start and, where attention looks both ways,
document_stop, int32 (micro_batch, slice): the places in the whole sequence of the first token of
each token's document, and of the one after its last (`TokenStream.document_bounds`); int64 where a
sequence has 2^31 tokens or more, which attention refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megalong.data.samples import Samples
from megalong.data.stream import TokenStream
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.utils.errors import UserError

IGNORE_INDEX = -100

# What to do where a vocabulary has as many rows as its tokenizer has ids without the mask token.
ADD_A_ROW = (
    "the mask token needs one row more: import the model (one of megalong: export it first) with"
    " tools/convert_from_hf.py --objective mlm --make-vocab-size-divisible-by 128"
)


@dataclass(frozen=True)
class Masking:
    """How tokens are masked.

    rate: the share that is chosen. mask: id of the mask token. is_text: of each id whether it
    stands for text, bool (vocab size,).
    """

    rate: float
    mask: int
    is_text: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float) -> Masking:
        """For a tokenizer with a mask token (`Tokenizer.with_mask`)."""
        assert tokenizer.mask is not None
        return cls(rate, tokenizer.mask, tokenizer.token_bytes() > 0)

    def masked(self, tokens: np.ndarray, begin: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees of consecutive tokens, and the labels: the token where it was chosen,
        else IGNORE_INDEX. All int64 (length,); begin: the first one's position in the stream."""
        words, text = _random_words(seed, begin, len(tokens)), np.flatnonzero(self.is_text)
        chosen = (words >> 32 < round(self.rate * 2**32)) & self.is_text[tokens]
        # The lower half of a word says which tenth it is in, and where in it.
        tenth, place = np.divmod((words & 0xFFFFFFFF) * 10, 2**32)
        other = text[(place * len(text)) >> 32]
        seen = np.where(tenth < 8, self.mask, np.where(tenth < 9, other, tokens))
        return np.where(chosen, seen, tokens), np.where(chosen, tokens, IGNORE_INDEX)


def _random_words(seed: int, begin: int, count: int) -> np.ndarray:
    """64 random bits of each position, uint64 (count,).

    Philox makes four words of each value of its counter; numpy promises that they stay the same.
    """
    skipped = begin % 4
    bits = np.random.Philox(key=seed, counter=begin // 4)
    return bits.random_raw(skipped + count)[skipped:]


Batch = dict[str, torch.Tensor]
Row = tuple[np.ndarray, np.ndarray]  # tokens and labels of a sample, int64

# Of the masks of evaluations, which are the same for every run.
EVALUATION_SEED = 0


@dataclass(frozen=True)
class DocumentRules:
    """What the borders of documents mean.

    isolated: documents are kept apart: batches say where each one is.
    unpredicted_from: the token from which the next one is not predicted, that at the end of a
        document; None: it is from every token.
    """

    isolated: bool = False
    unpredicted_from: int | None = None


NO_BORDERS = DocumentRules()


def training_batches(
    samples: Samples,
    *,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    sequence_range: tuple[int, int] | None = None,
    masking: Masking | None = None,
    documents: DocumentRules = NO_BORDERS,
) -> Iterator[Batch]:
    """Yields micro batches without end, from sample `consumed_samples` on.

    Micro batch m of a global batch holds, on data-parallel rank d, the samples
    consumed + (m * data_parallel_size + d) * micro_batch_size + j. So the samples of a global
    batch depend on consumed_samples and global_batch_size only, on no other size.
    sequence_range: (start, stop), the slice of the sequence to read; None: all of it.
    masking: how tokens are masked, by the seed of the samples; None: the next ones are predicted.
    documents: what their borders mean.
    Raises (at once) UserError for sizes that do not divide, ValueError for ranges out of bounds.
    """
    start, stop = _checked_range(samples, sequence_range)
    _check_rank(data_parallel_rank, data_parallel_size)
    stride = micro_batch_size * data_parallel_size
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % stride:
        raise UserError(
            f"--global-batch-size {global_batch_size} must be a multiple of --micro-batch-size "
            f"{micro_batch_size} times the data-parallel size {data_parallel_size}"
        )
    if consumed_samples < 0:
        raise ValueError(f"consumed_samples {consumed_samples} is negative")
    masks_loss = samples.masks_loss

    def read(i: int) -> Row:
        if masking is None:
            tokens = samples.sample(i, start, stop + 1)
            counts = samples.loss_mask(i, start, stop + 1) if masks_loss else None
            return _next_tokens(tokens, counts, stop - start, documents)
        begin = i * samples.sequence_length + start
        return masking.masked(samples.sample(i, start, stop), begin, samples.seed)

    def micro_batches() -> Iterator[range]:
        # All ranks together take `stride` samples at a time, global batches follow one another.
        first = consumed_samples + data_parallel_rank * micro_batch_size
        while True:
            yield range(first, first + micro_batch_size)
            first += stride

    def batches() -> Iterator[Batch]:
        for numbers in micro_batches():
            batch = _batch([read(i) for i in numbers], start, stop)
            if documents.isolated:
                batch |= _document_bounds(samples, numbers, start, stop, masking is None)
            if len(samples.sources) > 1:
                batch["source"] = torch.tensor([samples.source(i) for i in numbers])
            yield batch

    if masking is None and documents.unpredicted_from is None and not masks_loss:
        return batches()
    predictions = (
        sum(int((read(i)[1] != IGNORE_INDEX).sum()) for i in numbers) for numbers in micro_batches()
    )
    return _counted(batches(), predictions, global_batch_size // stride)


def _counted(batches: Iterator[Batch], predictions: Iterator[int], step: int) -> Iterator[Batch]:
    """The same, each told how many predictions its step of so many micro batches has.

    predictions: of each micro batch. Those of the next step are counted one by one beside the
    micro batches of this one: no step waits for them, but the first, and none is held."""
    upcoming = sum(islice(predictions, step))
    while True:
        predicted, upcoming = torch.tensor(upcoming), 0
        for batch in islice(batches, step):
            yield {**batch, "predicted": predicted}
            upcoming += next(predictions)


def evaluation_batches(
    stream: TokenStream,
    *,
    num_samples: int | None = None,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    sequence_range: tuple[int, int] | None = None,
    masking: Masking | None = None,
    documents: DocumentRules = NO_BORDERS,
) -> Iterator[Batch]:
    """Yields the micro batches of one pass over the stream's first epoch.

    num_samples: stop after so many samples; None or more than there are: every token but the
    first is predicted exactly once, in the last sample (shorter than N, the rest padded) too.
    What does not count in the loss is not predicted.
    Every rank yields num_evaluation_batches() micro batches; rows without a sample, and padding,
    have labels IGNORE_INDEX (and token 0, which causal attention keeps from the others).
    masking: how tokens are masked, always at the same places. The last sample is filled up with the
    beginning of the epoch then, masked as it is there, so that nobody sees what is to be told; it
    is seen by the others, and not predicted again.
    documents: what their borders mean; padding is of none of them.
    """
    start, stop = _checked_range(stream, sequence_range)
    _check_rank(data_parallel_rank, data_parallel_size)
    total = _evaluation_samples(stream, num_samples, masking)
    count = num_evaluation_batches(
        stream,
        num_samples=num_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
        masking=masking,
    )

    def read(i: int) -> Row:
        if i >= total:
            return np.zeros(0, int), np.zeros(0, int)
        if masking is None:
            begin, end = _without_wrapping(stream, i, start, stop + 1)
            counts = stream.masks(begin, end) if stream.masks_loss else None
            return _next_tokens(stream.tokens(begin, end), counts, stop - start, documents)
        begin = i * stream.sequence_length + start
        tokens, labels = _first_epoch_masked(stream, masking, begin, begin + stop - start)
        labels[max(stream.tokens_per_epoch - begin, 0) :] = IGNORE_INDEX
        return tokens, labels

    def batches() -> Iterator[Batch]:
        for m in range(count):
            first = (m * data_parallel_size + data_parallel_rank) * micro_batch_size
            samples = range(first, first + micro_batch_size)
            batch = _batch([read(i) for i in samples], start, stop)
            if documents.isolated:
                batch |= _document_bounds(stream, samples, start, stop, masking is None)
            yield batch

    return batches()


def num_evaluation_batches(
    stream: TokenStream,
    *,
    num_samples: int | None = None,
    micro_batch_size: int,
    data_parallel_size: int,
    masking: Masking | None = None,
) -> int:
    """Micro batches that evaluation_batches() yields on every rank."""
    if micro_batch_size < 1:
        raise UserError(f"--micro-batch-size {micro_batch_size}: must be positive")
    stride = micro_batch_size * data_parallel_size
    return -(-_evaluation_samples(stream, num_samples, masking) // stride)


def _evaluation_samples(
    stream: TokenStream, num_samples: int | None, masking: Masking | None
) -> int:
    predicted = stream.tokens_per_epoch
    if masking is None:
        predicted -= 1  # nothing predicts the first token
    available = -(-predicted // stream.sequence_length)
    if not available:
        raise UserError(
            f"documents {stream.document_range.start} to {stream.document_range.stop} (end "
            f"excluded) of {stream.documents.prefix} hold one token, so that there is nothing to "
            "predict: give this part of --split a larger share"
        )
    return available if num_samples is None else min(num_samples, available)


def _without_wrapping(stream: TokenStream, i: int, start: int, stop: int) -> tuple[int, int]:
    """Where tokens [start, stop) of sample i are in the stream, cut where the first epoch ends."""
    position = i * stream.sequence_length
    end = min(position + stop, stream.tokens_per_epoch)
    return min(position + start, end), end


def _first_epoch_masked(stream: TokenStream, masking: Masking, begin: int, end: int) -> Row:
    """[begin, end) of the first epoch, masked as evaluations have it, over and over again."""
    parts = []
    while begin < end:
        place = begin % stream.tokens_per_epoch
        stop = min(place + end - begin, stream.tokens_per_epoch)
        parts.append(masking.masked(stream.tokens(place, stop), place, EVALUATION_SEED))
        begin += stop - place
    tokens, labels = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(labels)


def _next_tokens(
    tokens: np.ndarray, counts: np.ndarray | None, length: int, documents: DocumentRules
) -> Row:
    """tokens: length + 1 of them, or fewer where the stream ended. counts: which of them count in
    the loss, bool of the same shape; None: all."""
    labels = tokens[1:]
    if counts is not None:
        labels = np.where(counts[1:], labels, IGNORE_INDEX)
    if documents.unpredicted_from is not None:
        labels = np.where(tokens[:-1] == documents.unpredicted_from, IGNORE_INDEX, labels)
    return tokens[:length], labels


def _document_bounds(
    samples: Samples, numbers: range, start: int, stop: int, causal: bool
) -> Batch:
    """Where the documents of places [start, stop) of these samples begin and, unless nobody looks
    that far, end. The stream goes on behind an evaluation's last token, so that padding has bounds
    too."""
    bounds = zip(*(samples.document_bounds(i, start, stop) for i in numbers), strict=True)
    starts, stops = (torch.from_numpy(np.stack(rows)) for rows in bounds)
    found = {"document_start": starts}
    return found if causal else found | {"document_stop": stops}


def starts_behind_first(rows: int, start: int, stop: int) -> torch.Tensor:
    """document_start of rows that have one text each, from the beginning of the sequence on, whose
    first token is the end of a document before it."""
    return torch.arange(start, stop, dtype=torch.int32).clamp(max=1).repeat(rows, 1)


def _batch(rows: list[Row], start: int, stop: int) -> Batch:
    """rows: tokens and labels of each sample, or fewer of either where the stream ended."""
    length = stop - start
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE_INDEX, dtype=np.int64)
    for j, (row, wanted) in enumerate(rows):
        tokens[j, : len(row)] = row
        labels[j, : len(wanted)] = wanted
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "positions": torch.from_numpy(np.arange(start, stop, dtype=np.int64)),
    }


def _checked_range(samples: Samples, sequence_range: tuple[int, int] | None) -> tuple[int, int]:
    length = samples.sequence_length
    start, stop = sequence_range or (0, length)
    if not 0 <= start < stop <= length:
        raise ValueError(f"sequence range {start} to {stop} is not inside a sequence of {length}")
    return start, stop


def _check_rank(rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(f"data-parallel rank {rank} of {size}")


@contextlib.contextmanager
def made_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Iterator[Batch]]:
    """Yield an iterator of the same batches, each made while the one before is in use; at the end
    of the context its thread is gone, and a batch that nobody took is forgotten.

    batches: read by the thread alone from now on. What it raises is raised by the new iterator,
        where the batch would have come.
    device: where the batches go. For a GPU they are put into pinned memory, from which a copy runs
        beside the computation (`Tensor.to(non_blocking=True)`).
    """
    pinned = device.type == "cuda"

    def make() -> Batch | None:
        batch = next(batches, None)
        if batch is not None and pinned:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    # Pinned memory belongs to the current device, which every thread has to set for itself.
    begin = {"initializer": torch.cuda.set_device, "initargs": (device,)} if pinned else {}
    with ThreadPoolExecutor(1, thread_name_prefix="data", **begin) as thread:
        first = thread.submit(make)

        def ahead() -> Iterator[Batch]:
            following = first
            while (batch := following.result()) is not None:
                following = thread.submit(make)
                yield batch

        yield ahead()
