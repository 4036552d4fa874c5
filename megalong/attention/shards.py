"""A sequence cut into shards, and what dilated attention makes of the borders. Integers only.

Rank p of a sequence group holds the positions [p l, (p + 1) l). Segments that lie inside one shard
are local. Of a segment that crosses a border, every rank holds some of the sparse rows: its own
rows attend to each other where they are, and those of the other ranks have to come over.
Paper: LongNet (arXiv 2307.02486), section 3.1, which says it for one segment of all ranks.

`local_attention` describes the first half as ordinary dilated attention on (pieces of) the shard;
`crossing_segments` and their `sparse_rows` are what the second half is about.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megalong.attention.pattern import DilatedPattern


@dataclass(frozen=True)
class Shards:
    """`count` contiguous shards of `length` positions each, seen from number `rank`."""

    rank: int
    count: int
    length: int

    @property
    def start(self) -> int:
        return self.rank * self.length

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def sequence_length(self) -> int:
        return self.count * self.length

    def held(self, positions: range, rank: int) -> range:
        """Those of the positions that a rank holds."""
        return between(positions, rank * self.length, (rank + 1) * self.length)

    def holders(self, positions: range) -> Iterable[int]:
        """The ranks that hold any of the positions, in order."""
        if positions.step > self.length:
            return [position // self.length for position in positions]
        if not positions:
            return range(0)
        return range(positions[0] // self.length, positions[-1] // self.length + 1)


def between(positions: range, start: int, stop: int) -> range:
    """Those of the positions that lie in [start, stop)."""
    first, step = positions.start, positions.step
    before, after = -((first - start) // step), -((first - stop) // step)
    return positions[max(before, 0) : max(after, 0)]


@dataclass(frozen=True)
class Segment:
    """The positions [start, stop) of one segment of a branch."""

    branch: int
    start: int
    stop: int

    def ranks(self, shard_length: int) -> range:
        """The ranks that hold a part of it."""
        return range(self.start // shard_length, -(-self.stop // shard_length))


@dataclass(frozen=True)
class SparseRows:
    """The rows of K and V that one kv head keeps of a segment at one offset (eq. 13-15).

    positions: of the rows, in the whole sequence.
    heads: the query heads that attend to them, with their own rows at the same positions. With
        grouped queries several share them.
    """

    segment: Segment
    kv_head: int
    heads: tuple[int, ...]
    positions: range


def sparse_rows(
    pattern: DilatedPattern, segment: Segment, heads: int, kv_heads: int
) -> list[SparseRows]:
    """All that a segment keeps, by kv head and offset."""
    readers: dict[tuple[int, int], list[int]] = {}
    for head, offset in enumerate(pattern.offsets(heads, kv_heads)[segment.branch]):
        readers.setdefault((head // (heads // kv_heads), offset), []).append(head)
    bounds = segment.start, segment.stop
    return [
        SparseRows(
            segment, kv_head, tuple(those), pattern.sparse_rows(segment.branch, bounds, offset)
        )
        for (kv_head, offset), those in readers.items()
    ]


def segment_at(position: int, segment_length: int, sequence_length: int) -> tuple[int, int]:
    """The [start, stop) of the segment that holds a position."""
    start = position // segment_length * segment_length
    return start, min(start + segment_length, sequence_length)


def crossing_segments(pattern: DilatedPattern, shards: Shards) -> list[Segment]:
    """The segments of all branches that cross a border of this shard: at most two a branch."""
    found = []
    for branch, length in enumerate(pattern.segment_lengths):
        ends = dict.fromkeys(
            segment_at(position, length, shards.sequence_length)
            for position in (shards.start, shards.stop - 1)
        )
        found += [
            Segment(branch, start, stop)
            for start, stop in ends
            if start < shards.start or stop > shards.stop
        ]
    return found


@dataclass(frozen=True)
class LocalAttention:
    """Dilated attention on the positions [start, stop) of the shard, counted from its beginning."""

    start: int
    stop: int
    pattern: DilatedPattern

    @property
    def positions(self) -> slice:
        return slice(self.start, self.stop)


def local_attention(
    pattern: DilatedPattern, shards: Shards, heads: int, kv_heads: int
) -> list[LocalAttention]:
    """What this shard attends to within itself, as dilated attention of its own.

    One where segment lengths divide the shard length or are multiples of it: a shard inside a
    longer segment is one segment itself, in which the offsets are shifted. A branch of any other
    length is two of its own, because its first segment then ends somewhere inside. Those with the
    branch of the least rate come first; if that is one of two, all others have one branch too.
    """
    cut_inside, uncut = [], []
    for (length, rate), offsets in zip(
        pattern.branches, pattern.offsets(heads, kv_heads), strict=True
    ):
        start, _ = segment_at(shards.start, length, shards.sequence_length)
        before = shards.start - start  # positions of the segment that lie before the shard
        shifted = tuple((offset - before) % rate for offset in offsets)
        cut = length - before  # where in the shard the next segment begins
        if before == 0 or cut >= shards.length:
            uncut.append((length, rate, shifted if before else offsets))
            continue
        for x, y, table in ((0, cut, shifted), (cut, shards.length, offsets)):
            cut_inside.append(LocalAttention(x, y, DilatedPattern((length,), (rate,), (table,))))
    cut_inside.sort(key=_least_rate)

    def whole(branches) -> LocalAttention:
        return LocalAttention(0, shards.length, DilatedPattern(*zip(*branches, strict=True)))

    if not cut_inside:
        return [whole(uncut)]
    if uncut and _least_rate(whole(uncut)) <= _least_rate(cut_inside[0]):
        return [whole(uncut), *cut_inside]
    return [*cut_inside, *(whole([branch]) for branch in uncut)]


def _least_rate(piece: LocalAttention) -> int:
    return min(piece.pattern.dilation_rates)


def pairs_of_rank(pattern: DilatedPattern, shards: Shards, heads: int, kv_heads: int) -> int:
    """The exact number of (query, key) pairs that a rank computes, causal, summed over heads and
    branches. Later ranks of a segment have more of them: they see the earlier ones."""
    pairs = 0
    for (width, rate), offsets in zip(
        pattern.branches, pattern.offsets(heads, kv_heads), strict=True
    ):
        start, stop = shards.start, shards.stop
        for offset in offsets:
            position = start
            while position < stop:
                first, end = segment_at(position, width, shards.sequence_length)
                rows = range(first + offset, end, rate)
                queries = len(between(rows, position, stop))
                before = len(between(rows, first, position))
                whole = (stop - end) // width if position == first and end <= stop else 0
                count = 1 + max(0, whole)  # equal segments that follow in the shard
                pairs += count * (queries * before + queries * (queries + 1) // 2)
                position = end + (count - 1) * width
    return pairs
