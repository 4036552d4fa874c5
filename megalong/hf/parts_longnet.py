"""The parts of a model's attention: which rows they have, what a query sees of them, and what a
cache keeps. Travels in the exported folder.

    Branch   of dilated attention. In one segment of a branch (w, r) the positions that a head keeps
             are a smaller sequence: position o + i r is its row i, and lies in cell i of the
             segment, r positions wide. On rows it is plain causal attention. One branch without end
             is dense attention.
    Window   of local attention: the positions up to the query, so many of them.
    Columns  of sparse attention, which sum up the blocks before that of the query; the other part
             of it is a Branch, of the own block.

Where documents share a sequence, a query sees none of the rows that lie before the first position
of its own: `first`, a place for each query.

Shape letters: as in `attention_longnet`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megalong.attention.pattern import column_starts

from .attention_longnet import NEVER, range_attention, row_attention


@dataclass(frozen=True)
class Branch:
    """One branch of one layer.

    streams: (kv head, offset) pairs that have rows of their own. They are the kv heads where all
        query heads of a group share an offset, else one per query head.
    """

    length: int
    rate: int
    heads: int
    kv_heads: int
    streams: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, length: int, rate: int, offsets: list[int], kv_heads: int) -> Branch:
        """offsets: that of each query head."""
        heads = len(offsets)
        group = heads // kv_heads
        if all(offsets[head] == offsets[head - head % group] for head in range(heads)):
            streams = tuple(enumerate(offsets[::group]))
        else:
            streams = tuple((head // group, offset) for head, offset in enumerate(offsets))
        return cls(length, rate, heads, kv_heads, streams)

    @property
    def rows(self) -> int:
        """The most rows that a segment has."""
        return -(-self.length // self.rate)

    def attend(self, q_bshd, k_bskd, v_bskd, start: int, past, first_bs=None):
        """Causal attention of the positions from `start` on: output and log-sum-exp, (b, s, h, d or
        1), and the rows of keys and of values for the next call. past: those of the last one.
        first: where the documents begin, if there are any."""
        bounds = () if first_bs is None else (first_bs,)
        *result, rows = self._attend(q_bshd, k_bskd, v_bskd, start, past, bounds, causal=True)
        if (start + q_bshd.shape[1]) % self.length == 0:  # the next position begins a segment
            rows = [x.new_empty(len(q_bshd), x.shape[1], 0, x.shape[3]) for x in rows]
        return *result, rows

    def attend_both_ways(self, q_bshd, k_bskd, v_bskd, bounds):
        """Attention of whole sequences: pairs of output and log-sum-exp, to be merged. bounds: the
        places between which the keys of each query lie, (b, s) both, or none."""
        return [self._attend(q_bshd, k_bskd, v_bskd, 0, None, bounds, causal=False)[:2]]

    def _attend(self, q_bshd, k_bskd, v_bskd, start, past, bounds, causal):
        batch, count = q_bshd.shape[:2]
        parts, hidden_gn = [], None
        for first, segments, size, before in pieces(start, count, self.length):
            here = slice(first, first + segments * size)
            earlier = past if before else (None, None)
            rows = [
                self.key_rows(x[:, here], segments, before, old)
                for x, old in zip((k_bskd, v_bskd), earlier, strict=True)
            ]
            ends = [self.rows_before(x[:, here], start + first, segments, before) for x in bounds]
            if not causal:  # what fills up the segment
                places = torch.arange(rows[0].shape[2], device=q_bshd.device) * self.rate
                hidden_gn = places + self.offsets(q_bshd.device)[:, None] >= size
            queries = self.query_rows(q_bshd[:, here], segments, before)
            results = row_attention(queries, *rows, ends, causal, hidden_gn)
            parts.append(
                [
                    self.to_positions(x, batch, size, before, missing)
                    for x, missing in zip(results, (0.0, NEVER), strict=True)
                ]
            )
        return *(torch.cat(x, 1) for x in zip(*parts, strict=True)), rows

    def writes(self, places_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which streams take the position at each of these places, in which row: (b, g) each."""
        local = places_b % self.length
        takes_bg = (local % self.rate)[:, None] == self.offsets(places_b.device)
        return takes_bg, (local // self.rate)[:, None].expand_as(takes_bg)

    def sees(self, places_b: torch.Tensor, rows: int) -> torch.Tensor:
        """Which of so many rows the query at each of these places sees, (b, g, rows)."""
        takes_bg, row_bg = self.writes(places_b)
        reached = torch.arange(rows, device=places_b.device) <= row_bg[..., None]
        return takes_bg[..., None] & reached

    def since(self, first_b: torch.Tensor, places_b: torch.Tensor, rows: int) -> torch.Tensor:
        """Which of the rows that the query at each of these places sees are of positions from
        `first` on, (b, g, rows)."""
        inside_b = first_b - (places_b - places_b % self.length)
        low_bg = _ceil_div(inside_b[:, None] - self.offsets(places_b.device), self.rate)
        return torch.arange(rows, device=places_b.device) >= low_bg[..., None]

    def rows_before(self, bounds_bs, start: int, segments: int, before: int):
        """How many rows of its segment lie before the bound of each query, a place: (f, h, m).
        start: the place of the first query; the others as of `query_rows`."""
        batch, s = bounds_bs.shape
        heads_bsh1 = bounds_bs[:, :, None, None].expand(-1, -1, self.heads, -1)
        bounds_fhm = self.query_rows(heads_bsh1, segments, before)[..., 0]
        segment = torch.arange(segments, device=bounds_bs.device) * (s // segments)
        segment_f = (segment + (start - before)).repeat(batch)
        offsets_h = self.offsets(bounds_bs.device).repeat_interleave(
            self.heads // len(self.streams)
        )
        rows_fhm = _ceil_div(bounds_fhm - segment_f[:, None, None] - offsets_h[:, None], self.rate)
        return rows_fhm.clamp_min(0)

    def room(self, place: int) -> int:
        """The rows that there have to be when a position is written."""
        return place % self.length // self.rate + 1

    def pairs(self, length: int, device: torch.device, causal: bool) -> torch.Tensor:
        """Which keys the queries see, (g, length, length)."""
        positions = torch.arange(length, device=device)
        kept_gs = positions % self.length % self.rate == self.offsets(device)[:, None]
        segment_s = positions // self.length
        seen_gss = kept_gs[..., None] & kept_gs[:, None] & (segment_s[:, None] == segment_s)
        return seen_gss.tril() if causal else seen_gss

    def offsets(self, device: torch.device) -> torch.Tensor:
        """The offset of each stream, (g,)."""
        return torch.tensor([offset for _, offset in self.streams], device=device)

    def query_rows(self, q_bshd, segments: int, before: int):
        """The rows of the query heads, (f, h, m, d)."""
        return _rows(q_bshd, self._query_channels(q_bshd.device), self.rate, segments, before)

    def key_rows(self, x_bskd, segments: int, before: int, past_bgnd):
        """The rows of the streams of keys or values, (f, g, n, d), after those of the same segment
        that were there before."""
        channels = [offset * self.kv_heads + kv_head for kv_head, offset in self.streams]
        channels = torch.tensor(channels, device=x_bskd.device)
        rows = _rows(x_bskd, channels, self.rate, segments, before)
        if before == 0:
            return rows
        cell, inside = divmod(before, self.rate)
        if inside:  # the new positions begin in the middle of a cell: smaller offsets have its row
            had = (self.offsets(rows.device) < inside)[:, None, None]
            middle = torch.where(had, past_bgnd[:, :, cell : cell + 1], rows[:, :, :1])
            rows = torch.cat((middle, rows[:, :, 1:]), 2)
        return torch.cat((past_bgnd[:, :, :cell], rows), 2)

    def to_positions(self, x_fhmd, batch: int, size: int, before: int, missing: float):
        """Rows of query heads back at their positions, (b, s, h, d); `missing` at the others."""
        f, h, cells, d = x_fhmd.shape
        spread = x_fhmd.new_full((f, cells, self.rate * h, d), missing)
        spread = spread.index_copy(2, self._query_channels(x_fhmd.device), x_fhmd.transpose(1, 2))
        first = before % self.rate
        return spread.reshape(f, cells * self.rate, h, d)[:, first : first + size].reshape(
            batch, -1, h, d
        )

    def _query_channels(self, device):
        group = self.heads // len(self.streams)
        offsets = [offset for _, offset in self.streams for _ in range(group)]
        channels = [offset * self.heads + head for head, offset in enumerate(offsets)]
        return torch.tensor(channels, device=device)


def _rows(x_bshd, channels, rate: int, segments: int, before: int):
    """Cut positions into segments and cells, and take one position of each cell for each channel.

    channels: offset x heads + head. before: positions of the first cell's segment that come
    earlier. Cells that are not whole are filled up with zeros; at the end of a segment, and for
    queries that nobody asks for, so that no query sees them.
    """
    _, s, h, d = x_bshd.shape
    x = x_bshd.reshape(-1, s // segments, h, d)
    first = before % rate
    x = F.pad(x, (0, 0, 0, 0, first, -(first + x.shape[1]) % rate))
    return x.reshape(x.shape[0], -1, rate * h, d).index_select(2, channels).transpose(1, 2)


def _ceil_div(x: torch.Tensor, divisor: int) -> torch.Tensor:
    return -(-x).div(divisor, rounding_mode="floor")


def parts_of(config, layer: int) -> list:
    """The parts of the attention of a layer, from 0. config: a LongNetConfig."""
    kind, kv_heads = config.kind(layer), config.num_key_value_heads
    if kind == "local":
        return [Window(config.window_size, config.num_attention_heads, kv_heads)]
    found = [Branch.of(*branch, kv_heads) for branch in config.branches(layer)]
    if kind == "sparse":
        block, columns = config.sparse_block_size, config.sparse_columns
        starts = column_starts(block, columns, kv_heads)
        found.append(Columns(block, columns, starts, config.num_attention_heads))
    return found


def pieces(start: int, count: int, length: int) -> list[tuple[int, int, int, int]]:
    """Cut the positions [start, start + count) into runs of equal segments: (first, counted from
    start; segments; positions of each; positions of its segment that lie before start)."""
    before = start % length
    found, done = [], 0
    if before:
        done = min(length - before, count)
        found.append((0, 1, done, before))
    whole, rest = divmod(count - done, length)
    if whole:
        found.append((done, whole, length, 0))
    if rest:
        found.append((done + whole * length, 1, rest, 0))
    return found


@dataclass(frozen=True)
class Window:
    """Local attention: a query sees `size` positions, its own and those before it. The cache has
    position p in row p modulo the size."""

    size: int
    heads: int
    kv_heads: int

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        return tuple((head, 0) for head in range(self.kv_heads))

    @property
    def rows(self) -> int:
        return self.size

    def attend(self, q_bshd, k_bskd, v_bskd, start: int, past, first_bs=None):
        """As of a Branch."""
        count, device = q_bshd.shape[1], q_bshd.device
        first, stop = max(start - self.size + 1, 0), start + count
        before = torch.arange(first, start, device=device) % self.size
        keys = [k_bskd.transpose(1, 2), v_bskd.transpose(1, 2)]
        if past is not None:
            keys = [torch.cat((old[:, :, before], x), 2) for x, old in zip(keys, past, strict=True)]
        after = torch.arange(start + 1, stop + 1, device=device) - first
        low = (after - self.size).clamp_min(0)
        if first_bs is not None:
            low = torch.maximum(low, first_bs[:, None] - first)
        out, lse = range_attention(q_bshd.transpose(1, 2), *keys, low, after)
        slots = torch.arange(min(stop, self.size), device=device)
        kept = max(stop - self.size, 0)
        kept = kept + (slots - kept) % self.size - first  # where the last positions are among keys
        return out.transpose(1, 2), lse.transpose(1, 2), [x[:, :, kept] for x in keys]

    def attend_both_ways(self, q_bshd, k_bskd, v_bskd, bounds):
        """As of a Branch."""
        places = torch.arange(q_bshd.shape[1], device=q_bshd.device)
        first, stop = places - self.size + 1, places + self.size
        ends = first.clamp_min(0), stop.clamp_max(len(places))
        bounds = [x[:, None] for x in bounds]
        return _in_ranges(q_bshd, k_bskd.transpose(1, 2), v_bskd.transpose(1, 2), [ends], bounds)

    def writes(self, places_b):
        """As of a Branch."""
        rows_bg = (places_b % self.size)[:, None].expand(-1, self.kv_heads)
        return torch.ones_like(rows_bg, dtype=torch.bool), rows_bg

    def sees(self, places_b, rows: int):
        """As of a Branch."""
        reached = torch.arange(rows, device=places_b.device) <= places_b[:, None]
        return reached[:, None].expand(-1, self.kv_heads, -1)

    def since(self, first_b, places_b, rows: int):
        """As of a Branch."""
        back = (places_b[:, None] - torch.arange(rows, device=places_b.device)) % self.size
        return (places_b[:, None] - back >= first_b[:, None])[:, None]

    def room(self, place: int) -> int:
        return min(place + 1, self.size)

    def pairs(self, length: int, device, causal: bool):
        """As of a Branch."""
        positions = torch.arange(length, device=device)
        back = positions[:, None] - positions
        near = back < self.size if causal else back.abs() < self.size
        return (near.tril() if causal else near).expand(self.kv_heads, -1, -1)


@dataclass(frozen=True)
class Columns:
    """Sparse attention: a query sees some columns of each block before its own.

    block: positions of a block. columns: how many. starts: in a block, the first of each kv head.
    """

    block: int
    columns: int
    starts: tuple[int, ...]
    heads: int

    @property
    def kv_heads(self) -> int:
        return len(self.starts)

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        return tuple((head, 0) for head in range(self.kv_heads))

    @property
    def rows(self) -> int:
        return 2**62  # those of all blocks

    def attend(self, q_bshd, k_bskd, v_bskd, start: int, past, first_bs=None):
        """As of a Branch."""
        batch, count, _, d = q_bshd.shape
        places = torch.arange(start, start + count, device=q_bshd.device)
        takes_sk, rows_sk = self.writes(places)
        room = self.room(start + count - 1)
        # What no column is goes into a row behind all others.
        target = torch.where(takes_sk, rows_sk, room).T[None, :, :, None]
        keys = []
        for new, old in zip((k_bskd, v_bskd), past or (None, None), strict=True):
            had = 0 if old is None else min(old.shape[2], room)  # there may be rows to spare
            rows = new.new_zeros(batch, self.kv_heads, room + 1 - had, d)
            rows = rows if old is None else torch.cat((old[:, :, :had], rows), 2)
            new = new.transpose(1, 2)
            keys.append(rows.scatter(2, target.expand_as(new), new)[:, :, :room])
        stops = places // self.block * self.columns
        low = torch.zeros_like(stops)
        if first_bs is not None:
            low = self.rows_before(first_bs)
        out, lse = range_attention(q_bshd.transpose(1, 2), *keys, low, stops)
        return out.transpose(1, 2), lse.transpose(1, 2), keys

    def attend_both_ways(self, q_bshd, k_bskd, v_bskd, bounds):
        """As of a Branch: the blocks before that of the query, and those after it."""
        s, device = q_bshd.shape[1], q_bshd.device
        starts, blocks = torch.tensor(self.starts, device=device), s // self.block
        if blocks == 0:
            return []
        block = torch.arange(blocks, device=device) * self.block
        inside = torch.arange(self.columns, device=device)
        places_kn = (starts[:, None, None] + block[:, None] + inside).flatten(1)
        heads = torch.arange(self.kv_heads, device=device)[:, None]
        keys = [x.transpose(1, 2)[:, heads, places_kn] for x in (k_bskd, v_bskd)]
        columns = blocks * self.columns
        before = torch.arange(s, device=device) // self.block * self.columns
        after = (before + self.columns).clamp_max(columns)  # where those of later blocks begin
        ranges = [(torch.zeros_like(before), before), (after, torch.full_like(before, columns))]
        bounds = [self.rows_before(x).clamp_max(columns) for x in bounds]
        return _in_ranges(q_bshd, *keys, ranges, bounds)

    def writes(self, places_b):
        """As of a Branch."""
        inside_bg = (places_b % self.block)[:, None] - torch.tensor(
            self.starts, device=places_b.device
        )
        takes_bg = (inside_bg >= 0) & (inside_bg < self.columns)
        return takes_bg, (places_b // self.block * self.columns)[:, None] + inside_bg

    def sees(self, places_b, rows: int):
        """As of a Branch."""
        stops_b = places_b // self.block * self.columns
        seen = torch.arange(rows, device=places_b.device) < stops_b[:, None]
        return seen[:, None].expand(-1, self.kv_heads, -1)

    def since(self, first_b, places_b, rows: int):
        """As of a Branch."""
        low_bk = self._rows_before(first_b[:, None])[..., 0]
        return torch.arange(rows, device=places_b.device) >= low_bk[..., None]

    def rows_before(self, bounds_bs):
        """How many rows lie before the bound of each query, a place: (b, h, s)."""
        return self._rows_before(bounds_bs).repeat_interleave(self.heads // self.kv_heads, 1)

    def _rows_before(self, bounds_bs):
        starts_k1 = torch.tensor(self.starts, device=bounds_bs.device)[:, None]
        inside_bks = (bounds_bs % self.block)[:, None] - starts_k1
        return (bounds_bs // self.block * self.columns)[:, None] + inside_bks.clamp(0, self.columns)

    def room(self, place: int) -> int:
        return (place // self.block + 1) * self.columns

    def pairs(self, length: int, device, causal: bool):
        """As of a Branch."""
        positions = torch.arange(length, device=device)
        takes_sg, _ = self.writes(positions)
        block_s = positions // self.block
        other = block_s < block_s[:, None]
        if not causal:
            other = (block_s != block_s[:, None]) & (block_s < length // self.block)
        return takes_sg.T[:, None] & other


def _in_ranges(q_bshd, k_bknd, v_bknd, ranges, bounds):
    """Attention to each of these ranges of rows, between the bounds, if there are any."""
    if bounds:
        low, high = bounds
        ranges = [(torch.maximum(a, low), torch.minimum(b, high)) for a, b in ranges]
    results = (range_attention(q_bshd.transpose(1, 2), k_bknd, v_bknd, *ends) for ends in ranges)
    return [(out.transpose(1, 2), lse.transpose(1, 2)) for out, lse in results]
