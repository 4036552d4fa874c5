"""A plan's exchanges with their index tensors: rows out of K and V, and attention to what arrives.

Shape suffixes: b batch, s sequence (the shard's), h query heads, g kv heads, d head_dim, m query
rows, n key rows, t sparse rows (sets of them, each of one kv head and offset).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from megalong.attention.documents import Documents, RowRanges
from megalong.attention.exchange import AllGather, AllToAll, SequenceGroup
from megalong.attention.sequence_plan import Block, Exchange, Plan, RowList
from megalong.attention.shards import Shards, SparseRows
from megalong.attention.tensor_cache import kept_with_tensor, tensor_cache


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


@dataclass(frozen=True)
class RemoteRows:
    """One exchange, and what is done with the rows that it brings."""

    collective: AllGather | AllToAll
    leaving: LeavingRows
    attention: tuple[RemoteAttention, ...]

    def start(self, sequence: SequenceGroup, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor):
        """Begin the exchange. Returns the list that will hold what arrives, and the work."""
        return self.collective.start(sequence, self.leaving.take(k_bsgd, v_bsgd))


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
