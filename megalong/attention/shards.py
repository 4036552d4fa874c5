"""A sequence cut into shards, and what dilated attention makes of the borders. Integers only.

Rank p of a sequence group holds the positions [p l, (p + 1) l). Segments that lie inside one shard
are local. Of a segment that crosses a border, every rank holds some of the sparse rows: its own
rows attend to each other where they are, and those of the other ranks have to come over.
Paper: LongNet (arXiv 2307.02486), section 3.1, which says it for one segment of all ranks.

`local_parts` describes the first half as ordinary dilated attention on (pieces of) the shard;
`crossings` lists the segments of the second half.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class LocalPart:
    """Dilated attention on the positions [start, stop) of the shard, counted from its beginning."""

    start: int
    stop: int
    pattern: DilatedPattern


@dataclass(frozen=True)
class Crossing:
    """A segment [start, stop) of a branch that reaches over a border of this shard."""

    branch: int
    start: int
    stop: int

    def ranks(self, length: int) -> range:
        """The shards, of `length` positions, that hold a part of it."""
        return range(self.start // length, -(-self.stop // length))

    def rows(self, offset: int, rate: int, start: int, stop: int) -> range:
        """Its positions that take part in the branch and lie in [start, stop)."""
        first = self.start + offset
        first += max(0, -(-(start - first) // rate)) * rate
        return range(first, max(min(self.stop, stop), first), rate)


def segment_at(position: int, segment_length: int, sequence_length: int) -> tuple[int, int]:
    """The [start, stop) of the segment that holds a position."""
    start = position // segment_length * segment_length
    return start, min(start + segment_length, sequence_length)


def crossings(pattern: DilatedPattern, shards: Shards) -> list[Crossing]:
    """The segments of all branches that cross a border of this shard: at most two a branch."""
    found = []
    for branch, length in enumerate(pattern.segment_lengths):
        ends = dict.fromkeys(
            segment_at(position, length, shards.sequence_length)
            for position in (shards.start, shards.stop - 1)
        )
        found += [
            Crossing(branch, start, stop)
            for start, stop in ends
            if start < shards.start or stop > shards.stop
        ]
    return found


def local_parts(
    pattern: DilatedPattern, shards: Shards, heads: int, kv_heads: int
) -> list[LocalPart]:
    """What this shard attends to within itself, as dilated attention of its own.

    One part where segment lengths divide the shard length or are multiples of it: a shard inside a
    longer segment is one segment itself, in which the offsets are shifted. Any other length adds
    two parts, because the first segment of a branch then ends somewhere inside.
    """
    parts, whole = [], []  # whole: branches that need no cut
    for (length, rate), offsets in zip(
        pattern.branches, pattern.offsets(heads, kv_heads), strict=True
    ):
        start, _ = segment_at(shards.start, length, shards.sequence_length)
        into = shards.start - start  # positions of the segment that lie before the shard
        shifted = tuple((offset - into) % rate for offset in offsets)
        cut = length - into  # where in the shard the next segment begins
        if into == 0 or cut >= shards.length:
            whole.append((length, rate, shifted if into else offsets))
            continue
        for x, y, table in ((0, cut, shifted), (cut, shards.length, offsets)):
            parts.append(LocalPart(x, y, DilatedPattern((length,), (rate,), (table,))))
    if whole:
        lengths, rates, tables = zip(*whole, strict=True)
        parts.insert(0, LocalPart(0, shards.length, DilatedPattern(lengths, rates, tables)))
    return parts


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
                segment = Crossing(0, first, end)
                queries = len(segment.rows(offset, rate, position, min(end, stop)))
                before = len(segment.rows(offset, rate, first, position))
                whole = (stop - end) // width if position == first and end <= stop else 0
                count = 1 + max(0, whole)  # equal segments that follow in the shard
                pairs += count * (queries * before + queries * (queries + 1) // 2)
                position = end + (count - 1) * width
    return pairs
