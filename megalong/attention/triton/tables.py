"""What the kernels read instead of Python: a pattern as a few small integer tensors.

A segment of a branch, seen by one head, is a short sequence of its own: row t of it is the
position start + offset + t * rate. The kernels work on tiles of such rows. A tile is one line of a
tile table, (branch, segment, tile), and every head and batch row runs through the same
lines; whatever else a kernel wants to know follows from the line and these tables. So the number
of branches is data: no kernel is compiled and none is launched for it.

Two groups of branches. The *base* is the first branch with rate 1, whose tiles cover every
position once; it comes last in the tables. All others are *sparse*: a launch over them writes its
results compactly, row after row, and the launch over the base merges those into the tensors that
leave. A pattern without a branch of rate 1 gets a base that offers no keys (`attends` False).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from megalong.attention.documents import Documents, RowRanges
from megalong.attention.pattern import DilatedPattern
from megalong.attention.tensors import PATTERNS, kept_with_tensor


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it is cached
class Tables:
    """One pattern on sequences of one length. Tensors on the device, the rest on the host."""

    branches: torch.Tensor  # (branches, 4) int64: see below
    offsets: torch.Tensor  # (branches, heads) int32
    classes: torch.Tensor  # (branches, kv_heads, slots) int32: distinct offsets in a group, or -1
    attends: bool  # the base is a branch of the pattern
    length: int  # positions of the sequence
    sparse_rows: int  # compact rows of the sparse branches, of one head
    shapes: tuple[tuple[int, int, int], ...]  # segment length, rate and least offset of a branch

    # A line of `branches`: segment length, rate, compact rows per segment, first compact row.

    @property
    def sparse(self) -> int:
        """The number of sparse branches, which is also the index of the base."""
        return len(self.shapes) - 1

    @property
    def slots(self) -> int:
        """The most different offsets that the query heads of one kv head have in one branch."""
        return self.classes.shape[2]


@lru_cache(maxsize=PATTERNS)
def pattern_tables(
    pattern: DilatedPattern, length: int, heads: int, kv_heads: int, device: torch.device
) -> Tables:
    """The tables of a pattern, built once per (pattern, shape, device).

    Segment lengths, rates and offsets are clipped to the sequence length, which changes no row
    and keeps the kernels' arithmetic in 32 bits.
    """
    branches = [
        (min(width, length), min(rate, length), [min(offset, length) for offset in row])
        for (width, rate), row in zip(
            pattern.branches, pattern.offsets(heads, kv_heads), strict=True
        )
    ]
    dense = [number for number, (_, rate) in enumerate(pattern.branches) if rate == 1]
    base = branches.pop(dense[0]) if dense else (length, 1, [0] * heads)
    branches.sort(key=lambda branch: -branch[0] // branch[1])  # the longest tiles start first
    branches.append(base)

    lines = []
    compact = sparse_rows = 0
    for width, rate, _ in branches:
        sparse_rows = compact  # after the loop: what came before the base
        lines.append((width, rate, -(-width // rate), compact))
        whole, rest = divmod(length, width)
        compact += whole * -(-width // rate) - (-rest // rate)

    group = heads // kv_heads
    classes = [
        [sorted(set(row[g * group : (g + 1) * group])) for g in range(kv_heads)]
        for _, _, row in branches
    ]
    slots = max(len(distinct) for row in classes for distinct in row)

    def integers(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype).to(device)

    return Tables(
        branches=integers(lines, torch.int64),
        offsets=integers([row for _, _, row in branches]),
        classes=integers([[c + [-1] * (slots - len(c)) for c in row] for row in classes]),
        attends=bool(dense),
        length=length,
        sparse_rows=sparse_rows,
        shapes=tuple((width, rate, min(row)) for width, rate, row in branches),
    )


@lru_cache(maxsize=6 * PATTERNS)  # three kernels, base and sparse branches
def tile_table(tables: Tables, base: bool, block: int, last_first: bool) -> torch.Tensor:
    """(tiles, 3) int32 on the device: branch, segment, tile of `block` rows.

    base: the tiles of the base, or else those of all sparse branches.
    last_first: the order of the tiles of a segment. Under a causal mask the last tile of queries
        has the most keys, the first tile of keys the most queries: the longest should start first.

    The tiles of a segment are those of the head with the most rows; a head that has one row
    fewer may find its last tile empty.
    """
    lines = [torch.empty(0, 3, dtype=torch.int64)]
    for branch in (tables.sparse,) if base else range(tables.sparse):
        width, rate, offset = tables.shapes[branch]
        start = torch.arange(0, tables.length, width)
        length = (tables.length - start).clamp(max=width)
        rows = ((length - offset + rate - 1) // rate).clamp(min=0)
        segment, tile, count = _enumerate(-(-rows // block))
        if last_first:
            tile = count - 1 - tile
        lines.append(torch.stack([torch.full_like(tile, branch), segment, tile], dim=1))
    return torch.cat(lines).to(torch.int32).to(tables.branches.device)


def _enumerate(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(i, j, counts[i]) for every i and every j < counts[i], in order."""
    i = torch.arange(len(counts)).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return i, torch.arange(len(i)) - first[i], counts[i]


class Ranges(NamedTuple):
    """int32 (batch, heads or 1, rows), contiguous: a row sees those of the other side from its
    start on and before its stop; None where all are."""

    start: torch.Tensor | None = None
    stop: torch.Tensor | None = None

    @property
    def heads(self) -> int | None:
        """How many lines of ranges a batch row has."""
        return next((x.shape[1] for x in self if x is not None), None)


NO_RANGES = Ranges()


def ranges_of(*ends: torch.Tensor | None) -> Ranges:
    return Ranges(*(None if x is None else x.contiguous() for x in ends))


def keys_in_documents(documents: Documents | None, causal: bool) -> Ranges:
    """The places of the keys that each query sees; causality is not among them."""
    if documents is None:
        return NO_RANGES
    stop_bs = documents.stop_bs
    return ranges_of(
        documents.start_bs[:, None], None if causal or stop_bs is None else stop_bs[:, None]
    )


def queries_in_documents(documents: Documents | None, causal: bool) -> Ranges:
    """The places of the queries that see each key; causality is not among them."""
    if documents is None:
        return NO_RANGES
    start_bs, stop_bs = documents.start_bs, documents.stop_bs
    stop_bs = _stops(start_bs) if stop_bs is None else stop_bs
    return ranges_of(None if causal else start_bs[:, None], stop_bs[:, None])


def keys_in_ranges(ranges: RowRanges | None) -> Ranges:
    """The key rows that each query row sees."""
    return NO_RANGES if ranges is None else ranges_of(ranges.start_bhm, ranges.stop_bhm)


def queries_in_ranges(ranges: RowRanges | None, keys: int) -> Ranges:
    """The query rows that see each of so many key rows."""
    if ranges is None:
        return NO_RANGES
    ends = (ranges.stop_bhm, ranges.start_bhm)
    return Ranges(*(None if x is None else _rows_up_to(x, keys) for x in ends))


@kept_with_tensor
def _stops(start_bs: torch.Tensor) -> torch.Tensor:
    """Where documents stop: where the next one starts."""
    start_bs = start_bs.contiguous()
    return torch.searchsorted(start_bs, start_bs, right=True, out_int32=True)


@kept_with_tensor
def _rows_up_to(end_bhm: torch.Tensor, keys: int) -> torch.Tensor:
    """(batch, heads or 1, keys): of how many query rows the end is at most this key row."""
    key_n = torch.arange(keys, dtype=torch.int32, device=end_bhm.device)
    key_bhn = key_n.expand(*end_bhm.shape[:2], keys).contiguous()
    return torch.searchsorted(end_bhm.contiguous(), key_bhn, right=True, out_int32=True)
