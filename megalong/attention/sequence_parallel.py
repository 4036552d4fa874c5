"""Dilated attention over a sequence that is sharded across ranks: exact, forward and backward.

Every rank holds a contiguous shard. What it attends to within the shard is dilated attention in the
usual sense (`sequence_plan.local_attention`). For the segments that reach over its borders it gets
the sparse keys and values of other ranks (`sequence_plan`) while the local attention is computing;
its own sparse queries attend to those of earlier ranks in full and, where attention is causal, to
those of later ranks not at all. Documents change nothing in what is exchanged. All is merged by
log-sum-exp. Backward: with the merged output and log-sum-exp each attention gives its share of the
gradients, and those of remote rows go back to their ranks while the local backward is computing.
Paper: LongNet (arXiv 2307.02486), section 3.1.

Output and gradients of a shard are, in most rows, those of one attention within it (`Plan.base`).
The rows that others add to (`SharedRows`) are taken out, summed up in at least float32, and put
back, rounded once: the memory of sums does not go with the length of the shard.

Shape suffixes: b batch, s sequence (the shard's), h query heads, g kv heads, d head_dim, m query
rows, n key rows, t sparse rows (sets of them, each of one kv head and offset).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from megalong.attention import operators
from megalong.attention.documents import (
    Documents,
    RowRanges,
)
from megalong.attention.exchange import AllGather, AllToAll, SequenceGroup
from megalong.attention.passes import merge
from megalong.attention.pattern import DilatedPattern
from megalong.attention.sequence_plan import (
    Block,
    Exchange,
    LocalAttention,
    Plan,
    RowList,
    Shards,
    SparseRows,
    make_plan,
)
from megalong.attention.tensors import kept_with_tensor, tensor_cache


def forward(
    q_bshd, k_bsgd, v_bsgd, pattern: DilatedPattern, sequence: SequenceGroup,
    documents: Documents | None = None, *, causal: bool, scale: float, backend: str,
    kept: tuple[torch.Tensor, ...] | None = None,
):  # fmt: skip
    """Output like q, log-sum-exp (batch, heads, shard), and the rows that came from other ranks:
    for `backward`, which then needs none. kept: those rows, where they have come before."""
    plan, shard = _plan(q_bshd, k_bsgd, pattern, sequence, causal)
    rows_options = {"scale": scale, "backend": backend}

    def attend(piece: LocalAttention):
        here = [x[:, piece.positions] for x in (q_bshd, k_bsgd, v_bsgd)]
        options = {**rows_options, "documents": _within(documents, plan, piece)}
        out, lse = operators.forward(*here, piece.pattern, causal=causal, **options)
        return out, lse.mT

    with torch.autocast(q_bshd.device.type, enabled=False):
        if kept is None:
            arriving = [
                exchange.collective.start(sequence, exchange.leaving.take(k_bsgd, v_bsgd))
                for exchange in shard.exchanges
            ]
        else:
            arriving = [(rows, None) for rows in kept]
        out_bshd, lse_bsh = _joined(map(attend, plan.base))
        sums = [shard.queries.take(x, lse_bsh.dtype) for x in (out_bshd, lse_bsh)]
        parts = iter(shard.queries.parts)
        for piece in plan.further:
            part = next(parts)
            part.merge(*sums, *(part.of(x, piece.start) for x in attend(piece)))
        for exchange, (rows, work) in zip(shard.exchanges, arriving, strict=True):
            if work is not None:
                work.wait()
            for attention in exchange.attention:
                new_out_bmhd, new_lse_bhm = operators.attend_rows(
                    attention.queries(q_bshd), *attention.keys(rows),
                    ranges=attention.ranges(documents), **rows_options,
                )  # fmt: skip
                next(parts).merge(*sums, new_out_bmhd, new_lse_bhm.mT)
        for x, x_sums in zip((out_bshd, lse_bsh), sums, strict=True):
            shard.queries.put(x, x_sums)
    return out_bshd, lse_bsh.mT, tuple(rows for rows, _ in arriving)


def backward(
    grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, kept, pattern: DilatedPattern,
    sequence: SequenceGroup, documents: Documents | None = None, *, causal: bool, scale: float,
    backend: str,
):  # fmt: skip
    """Gradients (dq, dk, dv) of `forward`, in its inputs' dtype."""
    plan, shard = _plan(q_bshd, k_bsgd, pattern, sequence, causal)
    rows_options = {"scale": scale, "backend": backend}

    def gradients_of(piece: LocalAttention):
        here = [x[:, piece.positions] for x in (grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd)]
        lse = lse_bhs[:, :, piece.positions]
        options = {**rows_options, "documents": _within(documents, plan, piece)}
        return operators.backward(*here, lse, piece.pattern, causal=causal, **options)

    with torch.autocast(grad_bshd.device.type, enabled=False):
        returning, query_gradients = [], []
        for exchange, rows in zip(shard.exchanges, kept, strict=True):
            gradients = torch.zeros_like(rows, dtype=lse_bhs.dtype)
            for attention in exchange.attention:
                dq_bmhd, dk_bntd, dv_bntd = operators.attend_rows_backward(
                    attention.queries(grad_bshd), attention.queries(q_bshd),
                    *attention.keys(rows), attention.queries(out_bshd),
                    attention.queries(lse_bhs.mT).mT, ranges=attention.ranges(documents),
                    **rows_options,
                )  # fmt: skip
                attention.put_keys(gradients, dk_bntd, dv_bntd)
                query_gradients.append(dq_bmhd)
            returning.append(exchange.collective.start_back(sequence, gradients))
            del gradients

        gradients = _joined(map(gradients_of, plan.base))
        owners = (shard.queries, shard.keys, shard.keys)
        dq_sums, dk_sums, dv_sums = sums = [
            rows.take(x, lse_bhs.dtype) for rows, x in zip(owners, gradients, strict=True)
        ]
        query_parts, key_parts = iter(shard.queries.parts), iter(shard.keys.parts)
        for piece in plan.further:
            query_part, key_part = next(query_parts), next(key_parts)
            found = gradients_of(piece)
            for part, x_sums, x in zip((query_part, key_part, key_part), sums, found, strict=True):
                part.add(x_sums, part.of(x, piece.start))
            del found, x
        for dq_bmhd in query_gradients:
            next(query_parts).add(dq_sums, dq_bmhd)
        for exchange, (rows, work) in zip(shard.exchanges, returning, strict=True):
            work.wait()
            for places in exchange.leaving.distinct:
                part = next(key_parts)
                for x_sums, new_nbd in zip((dk_sums, dv_sums), rows[places].unbind(1), strict=True):
                    part.add(x_sums, new_nbd.transpose(0, 1))
        for rows, x, x_sums in zip(owners, gradients, sums, strict=True):
            rows.put(x, x_sums)
    return tuple(gradients)


def _within(documents: Documents | None, plan: Plan, piece: LocalAttention) -> Documents | None:
    """The documents of a piece of the shard, with places in it."""
    return documents and documents.within(piece.positions, plan.shards.start + piece.start)


def _plan(q_bshd, k_bsgd, pattern, sequence, causal) -> tuple[Plan, ShardRows]:
    heads, kv_heads = q_bshd.shape[2], k_bsgd.shape[2]
    shards = Shards(sequence.rank, sequence.size, q_bshd.shape[1])
    plan = make_plan(pattern, shards, heads, kv_heads, causal)
    return plan, shard_rows(plan, heads, kv_heads, q_bshd.device)


def _joined(results: Iterable[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors (batch, s, ...) of consecutive pieces of the shard, one after the other."""
    parts = [list(result) for result in results]
    if len(parts) == 1:
        return parts[0]
    return [torch.cat([part.pop(0) for part in parts], dim=1) for _ in range(len(parts[0]))]


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


class ShardRows(NamedTuple):
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


@dataclass(frozen=True)
class LeavingRows:
    """The list of rows that this rank puts into a collective."""

    positions: torch.Tensor  # (rows,), in the shard; filler has the first
    kv_heads: torch.Tensor  # (rows,)
    # Places in the list, without filler. In one of these no position and kv head is there twice,
    # so that gradients can be added at once.
    distinct: tuple[torch.Tensor, ...]

    def take(self, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor) -> torch.Tensor:
        """The list (rows, 2, batch, head_dim)."""
        batch, head_dim = k_bsgd.shape[0], k_bsgd.shape[3]
        rows = k_bsgd.new_empty(len(self.positions), 2, batch, head_dim)
        for place, x_bsgd in enumerate((k_bsgd, v_bsgd)):
            rows[:, place] = x_bsgd[:, self.positions, self.kv_heads].transpose(0, 1)
        return rows


@dataclass(frozen=True, eq=False)
class RemoteAttention:
    """Attention of the shard's sparse queries to rows that came from other ranks.

    One dense attention for all the sparse rows of a segment that agree in their numbers of queries,
    keys and query heads.
    """

    query_rows: torch.Tensor  # (m, heads), positions in the shard
    heads: torch.Tensor  # (heads,), those that share rows side by side
    key_rows: torch.Tensor  # (n, t), places in the list that arrived
    key_ranges: tuple[tuple[range, ...], ...]  # their positions in the whole sequence, in order

    def queries(self, x_bsh: torch.Tensor) -> torch.Tensor:
        """(batch, m, heads, ...) of a tensor (batch, shard, heads, ...)."""
        return x_bsh[:, self.query_rows, self.heads]

    def keys(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, n, t, head_dim) of the list of rows."""
        return rows[self.key_rows].permute(2, 3, 0, 1, 4).unbind()

    def ranges(self, documents: Documents | None) -> RowRanges | None:
        """Which of the keys the queries see where documents are kept apart."""
        return documents and documents.ranges(_rows_before, self)

    @cached_property
    def key_positions(self) -> torch.Tensor:
        """(heads, n), positions in the whole sequence; needed for documents only."""
        positions_tn = torch.stack([_indices(ranges) for ranges in self.key_ranges])
        group = len(self.heads) // len(positions_tn)
        return positions_tn.repeat_interleave(group, 0).to(self.heads.device)

    def put_keys(self, rows: torch.Tensor, dk_bntd, dv_bntd) -> None:
        """Write the gradients of keys and values into the list; nothing else attends to them."""
        for place, gradient_bntd in enumerate((dk_bntd, dv_bntd)):
            rows[self.key_rows, place] = gradient_bntd.permute(1, 2, 0, 3).to(rows.dtype)


@kept_with_tensor
def _rows_before(bound_bs: torch.Tensor, attention: RemoteAttention) -> torch.Tensor:
    """`Documents.ranges` asks for it: how many of the keys lie before the bound of each query,
    (batch, heads, m)."""
    bound_hbm = bound_bs[:, attention.query_rows].permute(2, 0, 1).contiguous()
    rows_hn = torch.searchsorted(attention.key_positions, bound_hbm.flatten(1), out_int32=True)
    return rows_hn.view_as(bound_hbm).transpose(0, 1).contiguous()


class RemoteRows(NamedTuple):
    """One exchange, and what is done with the rows that it brings."""

    collective: AllGather | AllToAll
    leaving: LeavingRows
    attention: tuple[RemoteAttention, ...]


@tensor_cache
def remote_rows(plan: Plan, device: torch.device) -> tuple[RemoteRows, ...]:
    """The exchanges of a plan, with index tensors on a device."""
    return tuple(
        RemoteRows(
            exchange.collective,
            _leaving(exchange.leaving, plan.shards, device),
            tuple(_attention(exchange, plan.shards, device)),
        )
        for exchange in plan.exchanges
    )


def _leaving(rows: RowList, shards: Shards, device: torch.device) -> LeavingRows:
    positions = torch.zeros(rows.length, dtype=torch.int32)
    kv_heads = torch.zeros(rows.length, dtype=torch.int32)
    distinct: dict[tuple, list[range]] = {}
    for block in rows.blocks:
        places = slice(block.places.start, block.places.stop)
        positions[places] = _indices([block.positions], shards.start)
        kv_heads[places] = block.rows.kv_head
        distinct.setdefault((block.rank, block.rows.segment), []).append(block.places)
    return LeavingRows(
        positions.to(device),
        kv_heads.to(device),
        tuple(_indices(places).to(device) for places in distinct.values()),
    )


def _attention(exchange: Exchange, shards: Shards, device: torch.device):
    """Yield the attention to the rows that arrive, by segment."""
    arriving: dict[SparseRows, list[Block]] = {rows: [] for rows in exchange.rows}
    for block in exchange.arriving.blocks:
        arriving[block.rows].append(block)
    alike: dict[tuple, list] = {}
    for rows, blocks in arriving.items():
        if blocks:
            queries = shards.held(rows.positions, shards.rank)
            keys = sum(len(block.places) for block in blocks)
            key = rows.segment, len(queries), keys, len(rows.heads)
            alike.setdefault(key, []).append((rows, queries, blocks))
    for members in alike.values():
        heads = [head for rows, _, _ in members for head in rows.heads]
        queries = [_indices([q], shards.start) for rows, q, _ in members for _ in rows.heads]
        keys = [_indices(block.places for block in blocks) for _, _, blocks in members]
        positions = (tuple(block.positions for block in blocks) for _, _, blocks in members)
        tensors = (
            torch.stack(queries, 1),
            torch.tensor(heads, dtype=torch.int32),
            torch.stack(keys, 1),
        )
        yield RemoteAttention(*(x.to(device) for x in tensors), tuple(positions))


def _indices(ranges: Iterable[range], origin: int = 0) -> torch.Tensor:
    """The numbers of the ranges, counted from an origin: in the shard, where 32 bits are enough."""
    return torch.cat(
        [torch.arange(r.start - origin, r.stop - origin, r.step, dtype=torch.int32) for r in ranges]
    )
