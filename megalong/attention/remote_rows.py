"""A plan's exchanges with their index tensors: rows out of K and V, and attention to what arrives.

Shape suffixes: b batch, s sequence (the shard's), h query heads, g kv heads, d head_dim, m query
rows, n key rows, t sparse rows (sets of them, each of one kv head and offset).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megalong.attention.exchange import AllGather, AllToAll, SequenceGroup
from megalong.attention.sequence_plan import Exchange, Plan, RowList
from megalong.attention.shards import Shards, SparseRows
from megalong.attention.tensor_cache import tensor_cache


def merge(out_bshd, lse_bsh, new_out_bshd, new_lse_bsh):
    """Two softmaxes over different keys as one (eq. 9-12); absent ones have log-sum-exp -inf."""
    # A backend's order of axes must not show: numbers side by side in memory are computed in
    # vectors, with other last bits than one by one.
    new_lse_bsh = new_lse_bsh.contiguous()
    # e^new / (e^old + e^new), and 0 where there is nothing on either side
    weight_bsh = torch.sigmoid(new_lse_bsh - lse_bsh).nan_to_num(0.0)
    merged_bshd = torch.lerp(out_bshd, new_out_bshd.to(out_bshd.dtype), weight_bsh[..., None])
    return merged_bshd, torch.logaddexp(lse_bsh, new_lse_bsh)


@dataclass(frozen=True)
class LeavingRows:
    """The list of rows that this rank puts into a collective."""

    positions: torch.Tensor  # (rows,), in the shard; filler has the first
    kv_heads: torch.Tensor  # (rows,)
    # Places in the list, without filler. In one of these no position and kv head is there twice,
    # so that they can be added to at once.
    distinct: tuple[torch.Tensor, ...]

    def take(self, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor) -> torch.Tensor:
        """The list (rows, 2, batch, head_dim)."""
        taken = [x[:, self.positions, self.kv_heads].transpose(0, 1) for x in (k_bsgd, v_bsgd)]
        return torch.stack(taken, dim=1)

    def add_to(self, dk_bsgd: torch.Tensor, dv_bsgd: torch.Tensor, rows: torch.Tensor) -> None:
        """Add a list of gradients to those of the shard's keys and values, in place."""
        for places in self.distinct:
            positions, kv_heads = self.positions[places], self.kv_heads[places]
            for total, part_nbd in zip((dk_bsgd, dv_bsgd), rows[places].unbind(1), strict=True):
                total[:, positions, kv_heads] += part_nbd.transpose(0, 1).to(total.dtype)


@dataclass(frozen=True)
class RemoteAttention:
    """Attention of the shard's sparse queries to rows that came from other ranks.

    One dense attention for all the sparse rows of a segment that agree in their numbers of queries,
    keys and query heads.
    """

    query_rows: torch.Tensor  # (m, heads), positions in the shard
    heads: torch.Tensor  # (heads,), those that share rows side by side
    key_rows: torch.Tensor  # (n, t), places in the list that arrived

    def queries(self, x_bsh: torch.Tensor) -> torch.Tensor:
        """(batch, m, heads, ...) of a tensor (batch, shard, heads, ...)."""
        return x_bsh[:, self.query_rows, self.heads]

    def add_queries(self, x_bsh: torch.Tensor, part_bmh: torch.Tensor) -> None:
        """Add what belongs to `queries`, in place."""
        x_bsh[:, self.query_rows, self.heads] += part_bmh.to(x_bsh.dtype)

    def keys(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, n, t, head_dim) of the list of rows."""
        return rows[self.key_rows].permute(2, 3, 0, 1, 4).unbind()

    def put_keys(self, rows: torch.Tensor, dk_bntd, dv_bntd) -> None:
        """Write the gradients of keys and values into the list; nothing else attends to them."""
        both = torch.stack((dk_bntd, dv_bntd)).permute(2, 3, 0, 1, 4)
        rows[self.key_rows] = both.to(rows.dtype)

    def merge(self, out_bshd, lse_bsh, new_out_bmhd, new_lse_bhm) -> None:
        """Merge the attention of `queries` into output and log-sum-exp, in place."""
        index = (slice(None), self.query_rows, self.heads)
        merged = merge(out_bshd[index], lse_bsh[index], new_out_bmhd, new_lse_bhm.mT)
        out_bshd[index], lse_bsh[index] = merged


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
    positions = torch.zeros(rows.length, dtype=torch.int64)
    kv_heads = torch.zeros(rows.length, dtype=torch.int64)
    distinct: dict[tuple, list[range]] = {}
    for block in rows.blocks:
        places = slice(block.places.start, block.places.stop)
        positions[places] = _indices([block.positions]) - shards.start
        kv_heads[places] = block.rows.kv_head
        distinct.setdefault((block.rank, block.rows.segment), []).append(block.places)
    return LeavingRows(
        positions.to(device),
        kv_heads.to(device),
        tuple(_indices(places).to(device) for places in distinct.values()),
    )


def _attention(exchange: Exchange, shards: Shards, device: torch.device):
    """Yield the attention to the rows that arrive, by segment."""
    places: dict[SparseRows, list[range]] = {rows: [] for rows in exchange.rows}
    for block in exchange.arriving.blocks:
        places[block.rows].append(block.places)
    alike: dict[tuple, list] = {}
    for rows, arrived in places.items():
        if arrived:
            queries = shards.held(rows.positions, shards.rank)
            key = rows.segment, len(queries), sum(map(len, arrived)), len(rows.heads)
            alike.setdefault(key, []).append((rows, queries, arrived))
    for members in alike.values():
        heads = [head for rows, _, _ in members for head in rows.heads]
        queries = [_indices([q]) - shards.start for rows, q, _ in members for _ in rows.heads]
        keys = [_indices(arrived) for _, _, arrived in members]
        tensors = torch.stack(queries, 1), torch.tensor(heads), torch.stack(keys, 1)
        yield RemoteAttention(*(x.to(device) for x in tensors))


def _indices(ranges: Iterable[range]) -> torch.Tensor:
    return torch.cat([torch.arange(r.start, r.stop, r.step) for r in ranges])
