"""What a run trains on: samples of one length, by number, each from one of some sources."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

BOUNDS = (1 << 10, 8 << 10, 32 << 10, 128 << 10, 1 << 20)


class Runs(NamedTuple):
    """Tokens of one document behind one another in one sample: how long such runs are, and how many
    there are of each length; both int64 (kinds of runs,)."""

    lengths: np.ndarray
    counts: np.ndarray


def runs_of(begins: np.ndarray, lengths: np.ndarray, sequence_length: int) -> Runs:
    """Of documents, or parts of such, that are cut at the multiples of sequence_length.

    begins: where each begins, int64 (parts,). lengths: their tokens, int64 (parts,).
    """
    heads = np.minimum(lengths, -begins % sequence_length)
    whole, tails = np.divmod(lengths - heads, sequence_length)
    few = np.concatenate([heads, tails, [sequence_length]])
    counts = np.ones(len(few), np.int64)
    counts[-1] = whole.sum()
    return Runs(few, counts)


@dataclass(frozen=True)
class ContextReport:
    """Shares of the tokens of an epoch.

    bounds: numbers of tokens, ascending. with_context: the share of the tokens that have at least
    so many of their own document before them in their sequence. uncut: the share that would, if
    sequences had no end. mean: tokens before a token, on average.
    """

    sequence_length: int
    bounds: tuple[int, ...]
    with_context: tuple[float, ...]
    uncut: tuple[float, ...]
    mean: float

    @classmethod
    def of(cls, runs: Runs, documents: np.ndarray, sequence_length: int) -> ContextReport:
        """documents: tokens of each document of the epoch, as often as it is there, int64."""
        bounds = context_bounds(sequence_length)
        tokens = float(documents.sum())

        def beyond(lengths: np.ndarray, counts: np.ndarray) -> tuple[float, ...]:
            """By bound the share of the tokens that are so far from the beginning."""
            return tuple(float((lengths - bound).clip(min=0) @ counts) / tokens for bound in bounds)

        return cls(
            sequence_length,
            bounds,
            beyond(runs.lengths, runs.counts),
            beyond(documents, np.ones(len(documents), np.int64)),
            float((runs.lengths * (runs.lengths - 1) / 2) @ runs.counts) / tokens,
        )

    @classmethod
    def mean_of(cls, parts: Iterable[tuple[float, ContextReport]]) -> ContextReport:
        """Of a blend: reports of one sequence length, with the share of the samples of each."""
        shares, reports = zip(*parts, strict=True)
        weights = np.array(shares) / sum(shares)
        first = reports[0]

        def mean(values) -> tuple[float, ...]:
            return tuple((weights @ np.array(values)).tolist())

        return cls(
            first.sequence_length,
            first.bounds,
            mean([report.with_context for report in reports]),
            mean([report.uncut for report in reports]),
            float(weights @ np.array([report.mean for report in reports])),
        )

    def in_words(self) -> str:
        """The report in one line."""
        parts = [
            f"{short(bound)} {share:.1%} (uncut {whole:.1%})"
            for bound, share, whole in zip(self.bounds, self.with_context, self.uncut, strict=True)
        ]
        return (
            "share of the tokens that have so many of their own document before them in the"
            f" sequence: {', '.join(parts)}; {self.mean:,.0f} on average"
        )


def context_bounds(sequence_length: int) -> tuple[int, ...]:
    """The numbers of tokens that a report speaks of: half a sequence, and the round ones below."""
    half = max(sequence_length // 2, 1)
    return (*(bound for bound in BOUNDS if bound < half), half)


def short(tokens: int) -> str:
    """32768 -> "32K", 1048576 -> "1M", others as they are."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size:,}{unit}"
    return f"{tokens:,}"


def place_type(length: int) -> type[np.integer]:
    """The integers that hold the places [0, length] of a sample: of 32 bits where these do."""
    return np.int32 if length <= np.iinfo(np.int32).max else np.int64


class Samples(Protocol):
    """An endless row of samples of `sequence_length` + 1 tokens, which nothing but the data, the
    seed and the number of a sample decide: whoever reads whatever part of it finds the same.

    tokens_per_epoch, samples_per_epoch: those that come before any is repeated; of several sources
        the sums over them.
    sources: their names; those of a blend are several.
    masks_loss: whether some tokens may not count in the loss.
    """

    sequence_length: int
    seed: int
    tokens_per_epoch: int
    sources: tuple[str, ...]

    @property
    def samples_per_epoch(self) -> int: ...

    @property
    def masks_loss(self) -> bool: ...

    def sample(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of sample i, in [0, N + 1); stop None: N + 1.

        Returns int64 (stop - start,). Reads only these tokens.
        """
        ...

    def loss_mask(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of these tokens count in the loss, that is, are to be predicted, bool
        (stop - start,). Reads only what it says of them."""
        ...

    def source(self, i: int) -> int:
        """Which of `sources` sample i is from."""
        ...

    def document_bounds(
        self, i: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return where the documents of tokens [start, stop) of sample i begin and end; stop None:
        N.

        For each token the place in the sample of its document's first token, and the place after
        its document's last one, both `place_type(N)` (stop - start,) and clipped to [0, N]: a
        document that goes on from the sample before begins at place 0. Reads no tokens.
        """
        ...

    def context_report(self) -> ContextReport:
        """How much real context the tokens of the first epoch have. It looks at the lengths of all
        documents."""
        ...
