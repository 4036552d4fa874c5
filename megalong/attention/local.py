"""Local attention (`patterns.LocalPattern`), on a whole sequence and on a sharded one.

A rank gets from the ranks before it (and after it) the keys and values that its first (and last)
queries see, however many shards that is, while it computes what lies within its shard; the parts
are merged by log-sum-exp.

Shape suffixes: b batch, s sequence (the shard's, where it is sharded), h query heads, g kv heads,
d head_dim, n positions of other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megalong.attention import operators
from megalong.attention.documents import Documents, RowRanges, checked_documents, places_before
from megalong.attention.exchange import AllToAll
from megalong.attention.passes import Passes, merge
from megalong.attention.patterns import Band, LocalPattern


@dataclass(frozen=True)
class LocalPasses(Passes):
    """Local attention of some heads, or of all, of a layer (`passes.Passes`)."""

    def forward(self, q_bshd, k_bsgd, v_bsgd, kept: tuple[torch.Tensor, ...] | None = None):
        options, band = self.options(q_bshd, k_bsgd, v_bsgd), self.pattern.band(self.causal)
        documents, own = self._documents(q_bshd)
        with torch.no_grad():
            if not self.sharded:
                results = operators.attend_rows(q_bshd, k_bsgd, v_bsgd, band, ranges=own, **options)
                return *results, ()
            near = self._neighbours(q_bshd)
            if kept is None:
                rows, work = near.exchange.start(self.sequence, near.leaving(k_bsgd, v_bsgd))
            else:
                (rows,), work = kept, None
            out_bshd, lse_bhs = operators.attend_rows(
                q_bshd, k_bsgd, v_bsgd, band, ranges=own, **options
            )
            if work is not None:
                work.wait()
            for side in near.sides:
                new_out, new_lse = operators.attend_rows(
                    q_bshd[:, side.queries], *side.keys(rows), side.band,
                    ranges=side.ranges(documents), **options,
                )  # fmt: skip
                out, lse = out_bshd[:, side.queries], lse_bhs[:, :, side.queries]
                merged_out, merged_lse = merge(
                    out.to(lse.dtype), lse.mT, new_out.to(lse.dtype), new_lse.mT
                )
                out.copy_(merged_out)
                lse.copy_(merged_lse.mT)
            return out_bshd, lse_bhs, (rows,)

    def backward(self, grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, kept):
        options, band = self.options(q_bshd, k_bsgd, v_bsgd), self.pattern.band(self.causal)
        tensors = (grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs)
        documents, own = self._documents(q_bshd)
        with torch.no_grad():
            if not self.sharded:
                sums = operators.attend_rows_backward(*tensors, band, ranges=own, **options)
                return tuple(x.to(q_bshd.dtype) for x in sums)
            near, (rows,) = self._neighbours(q_bshd), kept
            of_rows, of_queries = torch.zeros_like(rows, dtype=lse_bhs.dtype), []
            for side in near.sides:
                at = side.queries
                dq, *dkv = operators.attend_rows_backward(
                    grad_bshd[:, at], q_bshd[:, at], *side.keys(rows), out_bshd[:, at],
                    lse_bhs[:, :, at], side.band, ranges=side.ranges(documents), **options,
                )  # fmt: skip
                of_queries.append(dq)
                of_rows[side.rows] = torch.stack(dkv).permute(2, 0, 1, 3, 4)
            returned, work = near.exchange.start_back(self.sequence, of_rows)
            dq_bshd, *of_keys = operators.attend_rows_backward(
                *tensors, band, ranges=own, **options
            )
            for side, dq in zip(near.sides, of_queries, strict=True):
                dq_bshd[:, side.queries] += dq
            work.wait()
            near.add_returned(of_keys, returned)
            return tuple(x.to(q_bshd.dtype) for x in (dq_bshd, *of_keys))

    def _documents(self, q_bshd) -> tuple[Documents | None, RowRanges | None]:
        """Those of the shard, and the ranges that they leave its queries of its own keys."""
        documents, length = checked_documents(self.documents, q_bshd, self.causal), q_bshd.shape[1]
        first = self.sequence.rank * length if self.sharded else 0
        return documents, documents and documents.ranges(places_before, 0, length, first, length)

    def _neighbours(self, q_bshd) -> Neighbours:
        ranks, length = self.sequence.size, q_bshd.shape[1]
        return neighbours(self.pattern, self.sequence.rank, ranks, length, self.causal)


class Side(NamedTuple):
    """The queries of a shard that see positions of other ranks, on one side of the shard."""

    queries: slice
    rows: slice  # which of the positions that have come
    first: int  # where in the whole sequence these begin
    band: Band

    def keys(self, rows_n2bgd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k_nbgd, v_nbgd = rows_n2bgd[self.rows].unbind(1)
        return k_nbgd.transpose(0, 1), v_nbgd.transpose(0, 1)

    def ranges(self, documents: Documents | None) -> RowRanges | None:
        """What the queries see of them where documents are kept apart."""
        queries, count = self.queries, self.rows.stop - self.rows.start
        where = queries.start, queries.stop, self.first, count
        return documents and documents.ranges(places_before, *where)


class Neighbours(NamedTuple):
    """What a rank exchanges: keys and values (n, 2, batch, kv_heads, head_dim).

    sent: for each rank, which positions of the shard it gets.
    """

    sent: tuple[slice, ...]
    exchange: AllToAll
    sides: tuple[Side, ...]

    def leaving(self, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor) -> torch.Tensor:
        parts = [torch.stack((k_bsgd[:, at], v_bsgd[:, at])) for at in self.sent]
        return torch.cat(parts, 2).permute(2, 0, 1, 3, 4).contiguous()

    def add_returned(self, gradients_bsgd: list[torch.Tensor], returned_n2bgd: torch.Tensor):
        """Add to the gradients of keys and of values what the others found, in place."""
        parts = returned_n2bgd.split([at.stop - at.start for at in self.sent])
        for at, part_n2bgd in zip(self.sent, parts, strict=True):
            for x, share_nbgd in zip(gradients_bsgd, part_n2bgd.unbind(1), strict=True):
                x[:, at] += share_nbgd.transpose(0, 1)


def neighbours(
    pattern: LocalPattern, rank: int, ranks: int, length: int, causal: bool
) -> Neighbours:
    """The exchange of one of so many ranks, each with a shard of `length` positions."""
    reach = pattern.window - 1
    before, after = reach, 0 if causal else reach

    def seen(by: int, of: int) -> slice:
        """The positions of a rank that another sees, counted in its shard."""
        first = max(by * length - before - of * length, 0) if of < by else 0
        stop = min((by + 1) * length + after - of * length, length) if of > by else length
        return slice(first, stop) if by != of and first < stop else slice(0, 0)

    sent = tuple(seen(by, rank) for by in range(ranks))
    received = [at.stop - at.start for at in (seen(rank, of) for of in range(ranks))]
    earlier, later = sum(received[:rank]), sum(received[rank:])
    sides = []
    if earlier:
        queries, rows = slice(0, min(before, length)), slice(0, earlier)
        band = Band(before=before, first=earlier)
        sides.append(Side(queries, rows, rank * length - earlier, band))
    if later:
        first = max(length - after, 0)
        band = Band(after=first + pattern.window - length)
        queries, rows = slice(first, length), slice(earlier, earlier + later)
        sides.append(Side(queries, rows, (rank + 1) * length, band))
    exchange = AllToAll(tuple(at.stop - at.start for at in sent), tuple(received))
    return Neighbours(sent, exchange, tuple(sides))
