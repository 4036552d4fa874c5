"""Losses against the position in the context: whether a model uses what came long before."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FEW_TOKENS = 10_000  # below, chance alone moves a perplexity by some percent


def position_edges(seq_length: int) -> list[int]:
    """Edges of the buckets of positions: 0, 4, 6, 8, 12, 16, 24, ... up to the sequence length.

    Two buckets an octave: what a model gains from context it gains over orders of magnitude.
    """
    edges, power = [0], 4
    while power < seq_length:
        edges += [power, power + power // 2]
        power *= 2
    return [edge for edge in edges if edge < seq_length] + [seq_length]


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; of a hopeless one the largest power that a float64 holds."""
    return math.exp(min(loss, 700.0))


class PositionLosses:
    """Sums of token losses, in nats, and how many there were, by bucket of positions.

    edges: of the buckets, from 0 to the longest context (`position_edges`).
    sums, counts: float64 (buckets,), on `device`; ranks that see parts of the losses add these up.
    """

    def __init__(self, edges: Sequence[int], device: torch.device | str = "cpu"):
        self._stops = torch.tensor(edges[1:], device=device)
        self.sums = torch.zeros(len(edges) - 1, dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.sums)

    def add(
        self, positions: torch.Tensor, losses: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Add the losses of some sequences.

        positions: integers (length,) or (sequences, length), places in the context. losses:
        (sequences, length), zero where mask, bool of the same shape, says that there was nothing to
        predict; None: there was everywhere.
        """
        bucket = torch.bucketize(positions.to(self.sums.device), self._stops, right=True)
        mask = torch.ones_like(losses) if mask is None else mask
        for sums, values in ((self.sums, losses.double()), (self.counts, mask.double())):
            values = values.sum(0) if bucket.ndim == 1 else values
            sums.index_add_(0, bucket.flatten(), values.flatten())

    @property
    def total(self) -> float:
        """The sum of all losses."""
        return self.sums.sum().item()

    @property
    def tokens(self) -> int:
        """Predictions that counted."""
        return int(self.counts.sum().item())

    @property
    def mean(self) -> float:
        """The mean loss of a token."""
        return self.total / self.tokens

    @property
    def by_position(self) -> list[float | None]:
        """The mean loss in each bucket; None where a bucket held no prediction."""
        pairs = zip(self.sums.tolist(), self.counts.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]
