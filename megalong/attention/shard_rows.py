"""Sums over the few rows of a shard that more than one attention adds to.

Output and gradients of a shard are, in most rows, those of one attention within it (`Plan.base`),
in the dtype of the inputs. What else there is, further attention within the shard and that to rows
of other ranks, adds to some of the rows: these are taken out, summed up in at least float32, and
put back, rounded once. So the memory of sums goes with the rows that others add to, and not with
the length of the shard.

Shape suffixes: b batch, s sequence (the shard's), h heads (of queries, or of keys), n rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megalong.attention.remote_rows import RemoteRows, remote_rows
from megalong.attention.sequence_plan import Plan
from megalong.attention.shards import LocalAttention
from megalong.attention.tensor_cache import tensor_cache

Where = tuple[torch.Tensor, torch.Tensor]  # positions in the shard, and heads; they broadcast


@dataclass(frozen=True)
class Part:
    """Rows that one attention adds to, none of them twice. Tensors of one shape, int32."""

    positions: torch.Tensor  # in the shard
    heads: torch.Tensor
    places: torch.Tensor  # among the sums

    def of(self, x_bsh: torch.Tensor, start: int) -> torch.Tensor:
        """The rows of a tensor (batch, s, heads, ...) that begins at a position of the shard."""
        return x_bsh[:, self.positions - start, self.heads]

    def merge(self, out_bnd, lse_bn, new_out_bnd, new_lse_bn) -> None:
        """Merge these rows of another attention into the sums, in place."""
        at = slice(None), self.places
        out_bnd[at], lse_bn[at] = merge(out_bnd[at], lse_bn[at], new_out_bnd, new_lse_bn)

    def add(self, sums_bnd: torch.Tensor, new_bnd: torch.Tensor) -> None:
        """Add these rows of another gradient to the sums, in place."""
        sums_bnd[:, self.places] += new_bnd


@dataclass(frozen=True)
class SharedRows:
    """Rows of a tensor (batch, shard, heads, ...) that are summed up, part by part.

    A row that several parts have has one place for all among the sums (batch, n, ...).
    """

    positions: torch.Tensor  # (n,) int32
    heads: torch.Tensor  # (n,) int32
    places: torch.Tensor  # (n,) int32: of each row, the first that is the same
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: list[Where], device: torch.device) -> SharedRows:
        pairs = [torch.broadcast_tensors(*part) for part in parts]
        none = torch.empty(0, dtype=torch.int32, device=device)
        positions, heads = (
            torch.cat([none, *(pair[side].flatten() for pair in pairs)]) for side in (0, 1)
        )
        # No operator whose result has a size that depends on numbers: fake tensors have none.
        rows = positions.to(torch.int64) << 32 | heads
        order = torch.argsort(rows, stable=True)
        places = order[torch.searchsorted(rows[order], rows)].to(torch.int32)
        shapes = [x.shape for x, _ in pairs]
        cut = [x.split([s.numel() for s in shapes]) for x in (positions, heads, places)]
        of_parts = zip(*cut, shapes, strict=True)
        shaped = tuple(Part(*(x.view(shape) for x in three)) for *three, shape in of_parts)
        return cls(positions, heads, places, shaped)

    def take(self, x_bsh: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows (batch, n, ...), to add to at their places."""
        return x_bsh[:, self.positions, self.heads].to(dtype)

    def put(self, x_bsh: torch.Tensor, sums_bn: torch.Tensor) -> None:
        """Write the rows back, in place."""
        x_bsh[:, self.positions, self.heads] = sums_bn.to(x_bsh.dtype)[:, self.places]


def merge(out_bnd, lse_bn, new_out_bnd, new_lse_bn):
    """Two softmaxes over different keys as one (eq. 9-12); absent ones have log-sum-exp -inf."""
    # A backend's order of axes must not show: numbers side by side in memory are computed in
    # vectors, with other last bits than one by one.
    new_lse_bn = new_lse_bn.contiguous()
    # e^new / (e^old + e^new), and 0 where there is nothing on either side
    weight_bn = torch.sigmoid(new_lse_bn - lse_bn).nan_to_num(0.0)
    merged_bnd = torch.lerp(out_bnd, new_out_bnd.to(out_bnd.dtype), weight_bn[..., None])
    return merged_bnd, torch.logaddexp(lse_bn, new_lse_bn)


@dataclass(frozen=True)
class ShardRows:
    """A plan's exchanges, and the rows that are summed up.

    queries: parts are those of `Plan.further`, then of the attention of every exchange.
    keys: those of `Plan.further`, then of the `distinct` rows that leave with every exchange.
    """

    exchanges: tuple[RemoteRows, ...]
    queries: SharedRows
    keys: SharedRows


@tensor_cache
def shard_rows(plan: Plan, heads: int, kv_heads: int, device: torch.device) -> ShardRows:
    """The rows of a plan, with index tensors on a device."""
    exchanges = remote_rows(plan, device)
    queries = [_rows_of(piece, heads, heads, device) for piece in plan.further]
    keys = [_rows_of(piece, heads, kv_heads, device) for piece in plan.further]
    for exchange in exchanges:
        queries += [(attention.query_rows, attention.heads) for attention in exchange.attention]
        leaving = exchange.leaving
        keys += [(leaving.positions[at], leaving.kv_heads[at]) for at in leaving.distinct]
    return ShardRows(exchanges, SharedRows.of(queries, device), SharedRows.of(keys, device))


def _rows_of(piece: LocalAttention, heads: int, kv_heads: int, device: torch.device) -> Where:
    """The rows of an attention of one branch: of the queries where kv_heads is heads, else of the
    keys."""
    [(width, rate)], [offsets] = piece.pattern.branches, piece.pattern.offsets(heads, heads)
    kept = dict.fromkeys((head * kv_heads // heads, offset) for head, offset in enumerate(offsets))
    found = [
        (positions, torch.full_like(positions, head))
        for head, offset in kept
        for positions in _progressions(piece, width, rate, offset)
    ]
    positions, owners = (torch.cat(side).to(device) for side in zip(*found, strict=True))
    return positions, owners


def _progressions(piece: LocalAttention, width: int, rate: int, offset: int) -> Iterator:
    """The positions of one head: of all whole segments, and of the rest of the last."""
    whole, rest = divmod(piece.stop - piece.start, width)
    for first, segments, size in ((0, whole, width), (whole * width, 1, rest)):
        rows = torch.arange(offset, max(offset, size), rate, dtype=torch.int32)
        starts = torch.arange(segments, dtype=torch.int32)[:, None] * width
        yield (piece.start + first + starts + rows).flatten()
