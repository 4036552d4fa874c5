"""Which rows of K and V, of which head, go to which ranks. Integers only.

Of a segment that crosses a border of this rank's shard, every kv head keeps `SparseRows` at each of
its offsets; each rank of the segment holds some of them. A rank's queries attend

    to the rows of the ranks before it, all of them,
    to its own where they are (`local_attention`),
    to those of the ranks after it not at all, or all of them where attention is not causal,

so that is what a rank has to get, and `_seen` says it. Query heads that attend to the same rows
share them; in two branches, or at two offsets, the same position is two rows. Rows come in lists:

AllGather: where the segments of a branch span m whole shards and each shard has rows, those m ranks
    gather their rows of it. A rank's list has ceil(l / r) places for each of its SparseRows, by
    branch, and the gathered list has those of all m ranks, by rank. Branches of equal m are one
    list. With w / r fixed its length does not depend on the number of ranks (r dividing l).
AllToAll: for everything else (segments that begin inside a shard; r > l, where most ranks have no
    row at all), each rank is sent exactly what it sees. The lists are by rank, then by branch.

Paper: LongNet (arXiv 2307.02486), section 3.1, which gathers, has one segment of all ranks, and
is not causal (eq. 24).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from megalong.attention.exchange import AllGather, AllToAll
from megalong.attention.pattern import DilatedPattern
from megalong.attention.tensors import PATTERNS


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


Held = tuple[int, SparseRows, range]  # rank, rows, and those of their positions that it holds


@dataclass(frozen=True)
class Block:
    """Those of some sparse rows that one rank holds, and their places in a list."""

    rank: int  # they come from, or go to: this one itself where it gathers
    rows: SparseRows
    positions: range  # in the whole sequence
    places: range


@dataclass(frozen=True)
class RowList:
    """Rows that one collective carries; a place that is in no block is not looked at."""

    length: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Exchange:
    """One collective, the rows that this rank puts in and those that it attends to after.

    rows: all that the two lists hold rows of, by segment.
    """

    collective: AllGather | AllToAll
    rows: tuple[SparseRows, ...]
    leaving: RowList
    arriving: RowList


@dataclass(frozen=True, eq=False)
class Plan:
    """What a rank does: its local attention, and the exchanges with what is attended to after."""

    shards: Shards
    local: tuple[LocalAttention, ...]
    exchanges: tuple[Exchange, ...]

    @property
    def base(self) -> tuple[LocalAttention, ...]:
        """The first of `local` that together have every position of the shard, once."""
        whole = self.local[0].stop - self.local[0].start == self.shards.length
        return self.local[: 1 if whole else 2]

    @property
    def further(self) -> tuple[LocalAttention, ...]:
        """The rest of `local`, each of one branch."""
        return self.local[len(self.base) :]


@lru_cache(maxsize=PATTERNS)
def make_plan(
    pattern: DilatedPattern, shards: Shards, heads: int, kv_heads: int, causal: bool
) -> Plan:
    """The plan of one rank; the same object for equal arguments."""
    gathered: dict[int, list[SparseRows]] = {}
    sent: list[SparseRows] = []
    for segment in crossing_segments(pattern, shards):
        size = _gathering_ranks(pattern, segment.branch, shards.length, shards.count)
        rows = sparse_rows(pattern, segment, heads, kv_heads)
        (gathered.setdefault(size, []) if size else sent).extend(rows)
    exchanges = [_gather(size, gathered[size], shards, causal) for size in sorted(gathered)]
    if _any_rank_sends(pattern, shards):
        exchanges.append(_send(sent, shards, causal))
    local = local_attention(pattern, shards, heads, kv_heads)
    return Plan(shards, tuple(local), tuple(exchanges))


def subgroup_sizes(pattern: DilatedPattern, shard_length: int, ranks: int) -> list[int]:
    """The numbers of ranks m that gather rows among themselves: w / l of the branches with r <= l,
    at most `ranks`."""
    branches = range(len(pattern.branches))
    sizes = {_gathering_ranks(pattern, branch, shard_length, ranks) for branch in branches}
    return sorted(sizes - {0})


def gathered_rows(pattern: DilatedPattern, shards: Shards, heads: int, kv_heads: int) -> int:
    """Rows that the subgroups' all-gathers of one layer put on a rank, its own among them.

    Summed over the branches that gather, m ceil(l / r) for each kv head and offset; each row is
    2 x batch x head_dim numbers. The backward pass reduce-scatters as many.
    """
    return sum(
        len(segment.ranks(shards.length)) * _room(rows, shards)
        for segment in crossing_segments(pattern, shards)
        if _gathering_ranks(pattern, segment.branch, shards.length, shards.count)
        for rows in sparse_rows(pattern, segment, heads, kv_heads)
    )


def _gathering_ranks(pattern: DilatedPattern, branch: int, shard_length: int, ranks: int) -> int:
    """How many ranks gather the rows of a segment: those that it spans, if it spans several whole
    shards and each has rows. Otherwise 0: nothing has to come over, or it is sent."""
    width, rate = pattern.branches[branch]
    if (width % shard_length and width < ranks * shard_length) or rate > shard_length:
        return 0
    spanned = min(width // shard_length, ranks)
    return spanned if spanned > 1 else 0


def _any_rank_sends(pattern: DilatedPattern, shards: Shards) -> bool:
    """Whether a segment of a branch that is not gathered crosses any border: the first, then.

    Asked of all ranks, so that all answer alike and none waits in vain.
    """
    return shards.count > 1 and any(
        shards.length % width and not _gathering_ranks(pattern, branch, shards.length, shards.count)
        for branch, width in enumerate(pattern.segment_lengths)
    )


def _gather(size: int, sparse: list[SparseRows], shards: Shards, causal: bool) -> Exchange:
    """The exchange inside a subgroup. Lists: by rank, by SparseRows, with equal room for each."""
    members = sparse[0].segment.ranks(shards.length)  # of all these segments
    rooms = [_room(rows, shards) for rows in sparse]
    own = _row_list(_held_by([shards.rank], sparse, shards), rooms)
    gathered = _row_list(_held_by(members, sparse, shards), rooms * len(members))
    mine = {id(rows) for rows in sparse if shards.held(rows.positions, shards.rank)}
    seen = (
        block
        for block in gathered.blocks
        if id(block.rows) in mine and _sees(shards.rank, block.rank, causal)
    )
    return Exchange(AllGather(size), tuple(sparse), own, RowList(gathered.length, tuple(seen)))


def _held_by(ranks: Iterable[int], sparse: list[SparseRows], shards: Shards) -> list[Held]:
    return [(rank, rows, shards.held(rows.positions, rank)) for rank in ranks for rows in sparse]


def _send(sparse: list[SparseRows], shards: Shards, causal: bool) -> Exchange:
    """The exchange of exactly what each rank sees. Lists: by rank, by SparseRows."""
    me = shards.rank
    mine = [rows for rows in sparse if shards.held(rows.positions, me)]  # of others it sees nothing
    pairs = [(rank, rows) for rows in mine for rank in shards.holders(rows.positions)]
    shared = sorted(pairs, key=lambda pair: pair[0])  # of equal ranks in the order of `mine`
    leaving = [(rank, rows, _seen(rows, shards, rank, me, causal)) for rank, rows in shared]
    arriving = [(rank, rows, _seen(rows, shards, me, rank, causal)) for rank, rows in shared]
    lists = [_row_list(held, [len(rows) for *_, rows in held]) for held in (leaving, arriving)]
    sent, received = (_rows_by_rank(rows, shards.count) for rows in lists)
    return Exchange(AllToAll(sent, received), tuple(mine), *lists)


def _seen(rows: SparseRows, shards: Shards, reader: int, holder: int, causal: bool) -> range:
    """Those of another rank's rows that a rank attends to: all if it comes before, or if attention
    is not causal; none where the reader has no query among the rows."""
    if _sees(reader, holder, causal) and shards.held(rows.positions, reader):
        return shards.held(rows.positions, holder)
    return range(0)


def _sees(reader: int, holder: int, causal: bool) -> bool:
    """Whether a rank attends to another's rows at all."""
    return holder < reader or (holder > reader and not causal)


def _room(rows: SparseRows, shards: Shards) -> int:
    """The most of them that a rank can hold: ceil(l / r)."""
    return -(-shards.length // rows.positions.step)


def _row_list(held: list[Held], rooms: list[int]) -> RowList:
    """The list in which these follow each other, each in a room of its own that it fills from the
    front."""
    ends = list(accumulate(rooms, initial=0))
    blocks = (
        Block(rank, rows, positions, range(first, first + len(positions)))
        for (rank, rows, positions), first in zip(held, ends[:-1], strict=True)
    )
    return RowList(ends[-1], tuple(block for block in blocks if block.positions))


def _rows_by_rank(rows: RowList, ranks: int) -> tuple[int, ...]:
    counts = Counter()
    for block in rows.blocks:
        counts[block.rank] += len(block.places)
    return tuple(counts[rank] for rank in range(ranks))
