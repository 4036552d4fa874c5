"""What a rank of a sharded sequence does: its local attention, and which rows it exchanges.

`make_plan` turns a pattern and a place in the sequence into index tensors, once; the same plan then
serves every layer and step. Streams (kv head, offset) are what rows are counted by, see `exchange`.

Shape suffixes: b batch, s sequence (the shard's), h query heads, g kv heads, d head_dim, m query
rows, n key rows, t streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from megalong.attention.exchange import GatherRows, Piece, Rows, SendRows
from megalong.attention.pattern import DilatedPattern
from megalong.attention.remote_rows import RemotePart
from megalong.attention.shards import Crossing, LocalPart, Shards, crossings, local_parts


def subgroup_sizes(pattern: DilatedPattern, shard_length: int, ranks: int) -> list[int]:
    """The numbers of ranks m that gather rows among themselves: w / l of the branches with r <= l,
    at most `ranks`."""
    sizes = {
        min(width // shard_length, ranks)
        for width, rate in pattern.branches
        if _gathers(width, rate, shard_length, ranks)
    }
    return sorted(sizes)


def gathered_rows(pattern: DilatedPattern, shards: Shards, heads: int, kv_heads: int) -> int:
    """Rows that the subgroups' all-gathers of one layer put on a rank, its own among them.

    Summed over the branches that gather, streams x m ceil(l / r); each row is 2 x batch x head_dim
    numbers. The backward pass reduce-scatters as many.
    """
    rows = 0
    for (width, rate), offsets in zip(
        pattern.branches, pattern.offsets(heads, kv_heads), strict=True
    ):
        if _gathers(width, rate, shards.length, shards.count):
            members = len(_subgroup(shards, min(width // shards.length, shards.count)))
            if members > 1:
                streams = len(_streams(offsets, heads // kv_heads))
                rows += streams * members * -(-shards.length // rate)
    return rows


def _subgroup(shards: Shards, size: int) -> range:
    """The ranks of this one's subgroup of `size`: fewer at the end of the sequence."""
    first = shards.rank // size * size
    return range(first, min(first + size, shards.count))


def _gathers(width: int, rate: int, shard_length: int, ranks: int) -> bool:
    """Whether the segments of a branch span several whole shards, each with rows of its own."""
    whole = width % shard_length == 0 or width >= ranks * shard_length
    return whole and width > shard_length and rate <= shard_length and ranks > 1


@dataclass(frozen=True)
class Plan:
    """What a rank does: its local attention, and the exchanges with what is attended to after."""

    local: tuple[LocalPart, ...]
    exchanges: tuple[tuple[GatherRows | SendRows, tuple[RemotePart, ...]], ...]


@lru_cache(maxsize=256)
def make_plan(
    pattern: DilatedPattern,
    shards: Shards,
    heads: int,
    kv_heads: int,
    causal: bool,
    device: torch.device,
) -> Plan:
    """The plan of one rank, the same for equal arguments, with its index tensors on `device`."""
    branches = [
        _Branch(index, rate, _streams(row, heads // kv_heads))
        for index, (rate, row) in enumerate(
            zip(pattern.dilation_rates, pattern.offsets(heads, kv_heads), strict=True)
        )
    ]
    gathered: dict[int, list[_Branch]] = {}
    sent = []
    for branch, (width, rate) in zip(branches, pattern.branches, strict=True):
        if _gathers(width, rate, shards.length, shards.count):
            size = min(width // shards.length, shards.count)
            if len(_subgroup(shards, size)) > 1:
                gathered.setdefault(size, []).append(branch)
        else:
            sent.append(branch)
    exchanges = [
        _gather(size, members, pattern, shards, causal, device)
        for size, members in sorted(gathered.items())
    ]
    # Whether anybody sends is asked of all ranks, so that all answer alike and none waits in vain.
    sending = {branch.index for branch in sent}
    if sending and any(
        crossing.branch in sending
        for rank in range(shards.count)
        for crossing in crossings(pattern, Shards(rank, shards.count, shards.length))
    ):
        exchanges.append(_send(sent, pattern, shards, causal, device))
    local = local_parts(pattern, shards, heads, kv_heads)
    return Plan(tuple(local), tuple(exchanges))


@dataclass(frozen=True)
class _Stream:
    """The rows of one kv head and offset, and the query heads that read them."""

    kv_head: int
    offset: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class _Branch:
    index: int
    rate: int
    streams: tuple[_Stream, ...]


def _streams(offsets: tuple[int, ...], group: int) -> tuple[_Stream, ...]:
    heads_of: dict[tuple[int, int], list[int]] = {}
    for head, offset in enumerate(offsets):
        heads_of.setdefault((head // group, offset), []).append(head)
    return tuple(_Stream(*key, tuple(heads)) for key, heads in heads_of.items())


def _gather(size, branches, pattern, shards, causal, device):
    """The exchange inside a subgroup. Each rank's list: by branch, by stream, ceil(l / r) rows."""
    rows_a_rank = sum(len(b.streams) * -(-shards.length // b.rate) for b in branches)
    members = _subgroup(shards, size)
    positions, kv_heads, pieces, parts = [], [], [], []
    base = 0  # of the branch in a rank's list
    for branch in branches:
        most = -(-shards.length // branch.rate)
        start, stop = members.start * shards.length, members.stop * shards.length
        segment = Crossing(branch.index, start, stop)
        piece = _PieceBuilder()
        attending = _PartBuilder()
        for number, stream in enumerate(branch.streams):

            def rows(x, y, branch=branch, stream=stream, segment=segment):
                return segment.rows(stream.offset, branch.rate, x, y)

            own = _range_tensor(rows(shards.start, shards.stop)) - shards.start
            filler = own.new_zeros(most - len(own))
            positions.append(torch.cat((own, filler)))
            kv_heads.append(torch.full((most,), stream.kv_head))
            place = base + number * most
            piece.add(torch.arange(place, place + len(own)), own, stream.kv_head)

            seen = rows(start, shards.start), rows(shards.stop, stop)
            keys = torch.cat([_range_tensor(r) for r in seen[: 1 if causal else 2]])
            rank = (keys - start).div(shards.length, rounding_mode="floor")
            before = rank * shards.length - stream.offset  # rows of the ranks before it
            first = before.add(branch.rate - 1).div(branch.rate, rounding_mode="floor").clamp(min=0)
            nth = (keys - start - stream.offset).div(branch.rate, rounding_mode="floor") - first
            attending.add(stream, own, rank * rows_a_rank + place + nth)
        pieces.append(piece.build(device))
        parts += attending.build(device)
        base += len(branch.streams) * most
    rows = Rows(torch.cat(positions).to(device), torch.cat(kv_heads).to(device), tuple(pieces))
    return GatherRows(rows, size), tuple(parts)


def _send(branches, pattern, shards, causal, device):
    """The exchange of exactly what each rank sees. Lists: by peer, by branch, by stream."""
    branch_of = {branch.index: branch for branch in branches}

    def crossing_here(rank: int) -> list[Crossing]:
        view = Shards(rank, shards.count, shards.length)
        found = crossings(pattern, view)
        return [c for c in found if c.branch in branch_of]

    def sees(receiver: int, sender: int) -> bool:
        return sender != receiver and (sender < receiver or not causal)

    def rows_in(crossing: Crossing, stream: _Stream, rank: int) -> range:
        rate = branch_of[crossing.branch].rate
        start = rank * shards.length
        return crossing.rows(stream.offset, rate, start, start + shards.length)

    mine = crossing_here(shards.rank)
    positions, kv_heads, pieces, sent = [], [], [], []
    received = []
    parts = {crossing: {} for crossing in mine}  # stream -> places of its keys
    first_out = first_in = 0  # of the rows for and from the peer, in the two lists
    for peer in range(shards.count):
        leaving = 0
        arriving = 0
        piece_of = {}
        for crossing in mine:
            if peer == shards.rank or peer not in crossing.ranks(shards.length):
                continue
            for stream in branch_of[crossing.branch].streams:
                own = rows_in(crossing, stream, shards.rank)
                theirs = rows_in(crossing, stream, peer)
                if sees(peer, shards.rank) and len(theirs):
                    here = _range_tensor(own) - shards.start
                    place = first_out + leaving
                    piece = piece_of.setdefault(crossing, _PieceBuilder())
                    piece.add(torch.arange(place, place + len(here)), here, stream.kv_head)
                    positions.append(here)
                    kv_heads.append(torch.full((len(here),), stream.kv_head))
                    leaving += len(own)
                if sees(shards.rank, peer) and len(own):
                    place = first_in + arriving
                    places = torch.arange(place, place + len(theirs))
                    parts[crossing].setdefault(stream, []).append(places)
                    arriving += len(theirs)
        pieces += [piece.build(device) for piece in piece_of.values()]
        sent.append(leaving)
        received.append(arriving)
        first_out += leaving
        first_in += arriving

    remote = []
    for crossing, places_of in parts.items():
        attending = _PartBuilder()
        for stream, places in places_of.items():
            own = _range_tensor(rows_in(crossing, stream, shards.rank)) - shards.start
            attending.add(stream, own, torch.cat(places))
        remote += attending.build(device)
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = Rows(
        torch.cat([nothing, *positions]).to(device),
        torch.cat([nothing, *kv_heads]).to(device),
        tuple(pieces),
    )
    return SendRows(rows, tuple(sent), tuple(received)), tuple(remote)


class _PieceBuilder:
    def __init__(self):
        self.index, self.positions, self.kv_heads = [], [], []

    def add(self, index: torch.Tensor, positions: torch.Tensor, kv_head: int) -> None:
        self.index.append(index)
        self.positions.append(positions)
        self.kv_heads.append(torch.full_like(index, kv_head))

    def build(self, device) -> Piece:
        return Piece(*(torch.cat(x).to(device) for x in vars(self).values()))


class _PartBuilder:
    """Collects streams, and makes one part of those that agree in all three numbers."""

    def __init__(self):
        self.alike: dict[tuple[int, int, int], list] = {}

    def add(self, stream: _Stream, queries: torch.Tensor, keys: torch.Tensor) -> None:
        if len(queries) and len(keys):
            key = len(queries), len(keys), len(stream.heads)
            self.alike.setdefault(key, []).append((stream, queries, keys))

    def build(self, device) -> list[RemotePart]:
        parts = []
        for members in self.alike.values():
            heads = [head for stream, _, _ in members for head in stream.heads]
            queries = [q for stream, q, _ in members for _ in stream.heads]
            keys = [k for _, _, k in members]
            tensors = torch.stack(queries, 1), torch.tensor(heads), torch.stack(keys, 1)
            parts.append(RemotePart(*(x.to(device) for x in tensors)))
        return parts


def _range_tensor(rows: range) -> torch.Tensor:
    return torch.arange(rows.start, rows.stop, rows.step)
