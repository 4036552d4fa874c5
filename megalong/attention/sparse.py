"""Fixed sparse attention (`patterns.SparsePattern`): the own block, and columns of the other ones.

Columns are few: their keys and values are gathered, and all queries attend to them, block by block.
On the sequence axis the blocks that cross a border of shards are exchanged as the segments of
dilated attention are, and each rank gets from the others the columns that its queries see. So what
is exchanged grows with the number of blocks, not with their length.

Shape suffixes: b batch, s sequence (the shard's, where it is sharded), h query heads, g kv heads,
d head_dim, n columns of all blocks that are seen, c columns of a block, p rows: a position of one
kv head each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megalong.attention import operators
from megalong.attention.dilated import DilatedPasses
from megalong.attention.documents import RowRanges, checked_documents
from megalong.attention.exchange import AllToAll, SequenceGroup
from megalong.attention.passes import Passes, merge
from megalong.attention.patterns import Band, SparsePattern
from megalong.attention.tensors import kept_with_tensor, tensor_cache


@dataclass(frozen=True)
class SparsePasses(Passes):
    """Fixed sparse attention of some heads, or of all, of a layer (`passes.Passes`)."""

    @staticmethod
    def subgroup_sizes(pattern: SparsePattern, shard: int, ranks: int) -> tuple[int, ...]:
        return DilatedPasses.subgroup_sizes(pattern.own_block, shard, ranks)

    def forward(self, q_bshd, k_bsgd, v_bsgd, kept: tuple[torch.Tensor, ...] | None = None):
        options, columns = self.options(q_bshd, k_bsgd, v_bsgd), self._columns(q_bshd, k_bsgd)
        with torch.no_grad():
            own_p2bd = columns.take(k_bsgd, v_bsgd)
            if kept is None:
                others_p2bd, work = columns.start(self.sequence, own_p2bd)
            else:
                others_p2bd, work = kept[0], None
            out_bshd, lse_bhs, of_block = self._own_block.forward(
                q_bshd, k_bsgd, v_bsgd, kept and kept[1:]
            )
            if work is not None:
                work.wait()
            keys = columns.keys(others_p2bd, own_p2bd)
            options["ranges"] = self._ranges(q_bshd, k_bsgd, columns)
            for band in columns.bands:
                new_out, new_lse = operators.attend_rows(q_bshd, *keys, band, **options)
                merged_bshd, merged_bsh = merge(
                    out_bshd.to(lse_bhs.dtype), lse_bhs.mT, new_out.to(lse_bhs.dtype), new_lse.mT
                )
                out_bshd, lse_bhs = merged_bshd.to(q_bshd.dtype), merged_bsh.mT.contiguous()
            return out_bshd, lse_bhs, (others_p2bd, *of_block)

    def backward(self, grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, kept):
        options, columns = self.options(q_bshd, k_bsgd, v_bsgd), self._columns(q_bshd, k_bsgd)
        others_p2bd, *of_block = kept
        with torch.no_grad():
            keys = columns.keys(others_p2bd, columns.take(k_bsgd, v_bsgd))
            options["ranges"] = self._ranges(q_bshd, k_bsgd, columns)
            sums = [torch.zeros_like(x, dtype=lse_bhs.dtype) for x in (q_bshd, *keys)]
            for band in columns.bands:
                shares = operators.attend_rows_backward(
                    grad_bshd, q_bshd, *keys, out_bshd, lse_bhs, band, **options
                )
                sums = [x.add_(share) for x, share in zip(sums, shares, strict=True)]
            others_p2bd, own_p2bd = columns.of_rows(*sums[1:], len(others_p2bd))
            returned_p2bd, work = columns.start_back(self.sequence, others_p2bd)
            gradients = self._own_block.backward(
                grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, tuple(of_block)
            )
            dq_bshd, dk_bsgd, dv_bsgd = (x.to(lse_bhs.dtype) for x in gradients)
            dq_bshd += sums[0]
            if work is not None:
                work.wait()
            columns.add(dk_bsgd, dv_bsgd, own_p2bd, returned_p2bd)
            return tuple(x.to(q_bshd.dtype) for x in (dq_bshd, dk_bsgd, dv_bsgd))

    @property
    def _own_block(self) -> DilatedPasses:
        options = (self.scale, self.backend, self.causal, self.documents)
        return DilatedPasses(self.pattern.own_block, self.sequence, *options)

    def _ranges(self, q_bshd, k_bsgd, columns: Columns) -> RowRanges | None:
        """What documents leave the queries of the columns."""
        documents = checked_documents(self.documents, q_bshd, self.causal)
        heads, kv_heads, seen = q_bshd.shape[2], k_bsgd.shape[2], len(columns.places)
        return documents and documents.ranges(columns_before, self.pattern, heads, kv_heads, seen)

    def _columns(self, q_bshd, k_bsgd) -> Columns:
        rank, ranks = (self.sequence.rank, self.sequence.size) if self.sequence else (0, 1)
        length, kv_heads = q_bshd.shape[1], k_bsgd.shape[2]
        return columns_of(self.pattern, rank, ranks, length, kv_heads, self.causal, q_bshd.device)


class Columns(NamedTuple):
    """The columns that a rank has, and those that it sees.

    positions, heads: of the rows (one position of one kv head) that stand in the shard and belong
        to columns, int64 (p,), those of earlier blocks first. sent: for each rank, how many of
        these it sees. places: where each column of each kv head is, int64 (n, g), among the rows
        that have come and then the own ones. bands: which columns the queries see.
    """

    positions: torch.Tensor
    heads: torch.Tensor
    sent: tuple[int, ...]
    exchange: AllToAll
    places: torch.Tensor
    bands: tuple[Band, ...]

    def take(self, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor) -> torch.Tensor:
        """The own rows: (p, 2, batch, head_dim)."""
        rows = [x[:, self.positions, self.heads].transpose(0, 1) for x in (k_bsgd, v_bsgd)]
        return torch.stack(rows, 1)

    def start(self, sequence: SequenceGroup | None, own_p2bd: torch.Tensor):
        """Begin to exchange them. Returns what will hold the rows of the others, and the work."""
        if len(self.sent) == 1:
            return own_p2bd[:0], None
        return self.exchange.start(sequence, torch.cat([own_p2bd[:count] for count in self.sent]))

    def start_back(self, sequence: SequenceGroup | None, gradients_p2bd: torch.Tensor):
        if len(self.sent) == 1:
            return gradients_p2bd, None
        return self.exchange.start_back(sequence, gradients_p2bd)

    def keys(self, others_p2bd: torch.Tensor, own_p2bd: torch.Tensor):
        """Keys and values of all columns: (batch, n, g, head_dim) each."""
        rows_ng2bd = torch.cat((others_p2bd, own_p2bd))[self.places]
        return rows_ng2bd.permute(2, 3, 0, 1, 4).unbind(0)

    def of_rows(self, dk_bngd: torch.Tensor, dv_bngd: torch.Tensor, others: int):
        """Gradients of `keys` as those of the rows of others and of the own ones."""
        gradients_ng2bd = torch.stack((dk_bngd, dv_bngd)).permute(2, 3, 0, 1, 4)
        rows_p2bd = gradients_ng2bd.new_zeros(
            others + len(self.positions), *gradients_ng2bd.shape[2:]
        )
        rows_p2bd[self.places] = gradients_ng2bd  # no row stands in two places
        return rows_p2bd[:others], rows_p2bd[others:]

    def add(self, dk_bsgd, dv_bsgd, own_p2bd: torch.Tensor, returned_p2bd: torch.Tensor) -> None:
        """Add the gradients of the own rows, and what the others found for them, in place."""
        if len(self.sent) > 1:
            for count, share_p2bd in zip(self.sent, returned_p2bd.split(self.sent), strict=True):
                own_p2bd[:count] += share_p2bd
        for x, share_pbd in zip((dk_bsgd, dv_bsgd), own_p2bd.unbind(1), strict=True):
            x[:, self.positions, self.heads] += share_pbd.transpose(0, 1)


@tensor_cache
def columns_of(
    pattern: SparsePattern, rank: int, ranks: int, length: int, kv_heads: int, causal: bool,
    device: torch.device,
) -> Columns:  # fmt: skip
    """The columns of one of so many ranks, each with a shard of `length` positions."""
    # In numpy: sizes depend on these numbers, and fake tensors have none.
    blocks = ranks * length // pattern.block
    position_ncg = (
        np.arange(blocks)[:, None, None] * pattern.block
        + np.array(pattern.first_columns(kv_heads))
        + np.arange(pattern.columns)[:, None]
    )
    owner_ncg = position_ncg // length

    def seen(by: int) -> int:
        """How many blocks a rank sees the columns of: all before that of its last query."""
        return min(((by + 1) * length - 1) // pattern.block, blocks) if causal else blocks

    def count(by: int, of: int) -> int:
        return int((owner_ncg[: seen(by)] == of).sum()) if by != of else 0

    received = tuple(count(rank, of) for of in range(ranks))
    place_ncg = np.zeros_like(position_ncg)
    first = 0
    for of in (*(of for of in range(ranks) if of != rank), rank):
        theirs = owner_ncg == of
        place_ncg[theirs] = first + np.arange(theirs.sum())
        first += received[of]
    sent = tuple(count(by, rank) for by in range(ranks))
    *_, heads = own = (owner_ncg == rank).nonzero()
    places = place_ncg[: seen(rank)].reshape(-1, kv_heads)
    return Columns(
        torch.from_numpy(position_ncg[own] - rank * length).to(device),
        torch.from_numpy(heads).to(device),
        sent,
        AllToAll(sent, received),
        torch.from_numpy(places).to(device),
        pattern.bands(rank * length, causal) if len(places) else (),
    )


@kept_with_tensor
def columns_before(
    bound_bs: torch.Tensor, pattern: SparsePattern, heads: int, kv_heads: int, seen: int
) -> torch.Tensor:
    """`rows_before` of all queries, where the key rows are the first so many columns of all
    blocks."""
    starts_h1 = _first_columns(pattern, heads, kv_heads, bound_bs.device)
    block_b1s, inside_b1s = bound_bs[:, None] // pattern.block, bound_bs[:, None] % pattern.block
    columns_bhs = (inside_b1s - starts_h1).clamp(0, pattern.columns)
    return (block_b1s * pattern.columns + columns_bhs).clamp(max=seen)


@tensor_cache
def _first_columns(
    pattern: SparsePattern, heads: int, kv_heads: int, device: torch.device
) -> torch.Tensor:
    """The place in its block of the first column of each query head, int32 (heads, 1)."""
    starts = torch.tensor(pattern.first_columns(kv_heads), dtype=torch.int32)
    return starts.repeat_interleave(heads // kv_heads)[:, None].to(device)
