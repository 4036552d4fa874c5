"""A pattern cut into dense attentions, each on strided views of q, k and v.

Shape suffixes: b batch, s sequence, h query heads, g kv heads, d head_dim, c segments of a block,
n rows of a segment, f batch and segments folded together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from megalong.attention.pattern import DilatedPattern
from megalong.attention.tensor_cache import PATTERNS


class Progression(NamedTuple):
    """Heads that one strided view can reach: head, kv head and offset each grow by a step."""

    head: int
    kv_head: int
    offset: int
    head_step: int
    kv_step: int
    offset_step: int
    count: int


@dataclass(frozen=True)
class Block:
    """Dense attentions of one shape: segments of one length in a row, of heads with equally many
    rows, in every row of the batch or in one (a `sdpa_calls.Part`)."""

    start: int  # of the first segment
    segments: int
    segment_length: int
    rate: int  # distance between two rows
    rows: int
    heads: Progression
    first: bool  # of the first branch: no other branch has written its rows yet
    whole: bool = False  # of the first branch, and every row of every head
    of_batch: int | None = None  # the row of the batch; None: all

    @property
    def head_count(self) -> int:
        return self.heads.count

    @property
    def shared(self) -> bool:
        """Its query heads all read the same rows of one kv head, through a stride of 0."""
        h = self.heads
        return h.count > 1 and h.kv_step == 0 and h.offset_step == 0

    def view_queries(self, x_bsh):
        """x (batch, sequence, query heads, ...) -> (batch, segments, rows, heads, ...), a view."""
        return self._strided(x_bsh, self.heads.head, self.heads.head_step, self.heads.count)

    def view_keys(self, x_bsg):
        """`view_queries` of a k or v, where shared rows appear once: heads is then 1."""
        count = 1 if self.shared else self.heads.count
        return self._strided(x_bsg, self.heads.kv_head, self.heads.kv_step, count)

    def fold_queries(self, x_bsh):
        """A view's (batch * segments, heads, rows, ...), copied only if strides forbid a view."""
        return self.view_queries(x_bsh).transpose(2, 3).flatten(0, 1)

    def fold_keys(self, x_bsg):
        """`fold_queries` of a k or v, where shared rows appear once."""
        return self.view_keys(x_bsg).transpose(2, 3).flatten(0, 1)

    def unfold(self, x_fhn):
        """(batch * segments, heads, rows, ...) -> (batch, segments, rows, heads, ...)."""
        return x_fhn.unflatten(0, (-1, self.segments)).transpose(2, 3)

    def sum_shared(self, x_bcnhd, dtype):
        """The gradients of shared rows, summed over the query heads that read them."""
        return x_bcnhd.sum(3, keepdim=True, dtype=dtype) if self.shared else x_bcnhd

    def _strided(self, x, head, head_step, count):
        h, (batch, row, next_head, *rest) = self.heads, x.stride()
        of_batch, rows_of_batch = (0, len(x)) if self.of_batch is None else (self.of_batch, 1)
        shape = (rows_of_batch, self.segments, self.rows, count, *x.shape[3:])
        diagonal = head_step * next_head + h.offset_step * row
        strides = (batch, self.segment_length * row, self.rate * row, diagonal, *rest)
        start = x.storage_offset() + (self.start + h.offset) * row + head * next_head
        return x.as_strided(shape, strides, start + of_batch * batch)


@lru_cache(maxsize=PATTERNS)
def blocks(pattern: DilatedPattern, length: int, heads: int, kv_heads: int) -> tuple[Block, ...]:
    """The blocks of a pattern on sequences of `length`; branches of the smallest rate first."""
    order = branch_order(pattern)
    return tuple(
        block
        for branch in order
        for block in branch_blocks(pattern, branch, length, heads, kv_heads, branch == order[0])
    )


def branch_order(pattern: DilatedPattern) -> list[int]:
    """The branches, that of the smallest rate first."""
    rates = pattern.dilation_rates
    return sorted(range(len(rates)), key=lambda branch: rates[branch])


def branch_blocks(
    pattern: DilatedPattern, branch: int, length: int, heads: int, kv_heads: int, first: bool
) -> Iterator[Block]:
    """The blocks of a branch. first: as `Block` has it."""
    offsets = pattern.offsets(heads, kv_heads)[branch]
    width, rate = pattern.branches[branch]
    count, rest = divmod(length, width)
    # The whole segments, then what is left of the last one.
    for run in ((0, count, width), (length - rest, 1, rest)):
        for block in segment_blocks(*run, offsets, rate, kv_heads, first):
            whole = first and (block.rows * block.segments, block.head_count) == (length, heads)
            yield replace(block, whole=whole)


def segment_blocks(
    start: int, segments: int, segment: int, offsets: tuple[int, ...], rate: int, kv_heads: int,
    first: bool,
) -> Iterator[Block]:  # fmt: skip
    """The blocks of so many segments of one length in a row, in which rows have these offsets, one
    for every query head. first: as `Block` has it."""
    if not segments * segment:
        return
    # Beyond r only the remainder decides which heads have one row more than others.
    reduced = segment if segment < rate else rate + segment % rate
    for heads in equal_heads(offsets, len(offsets) // kv_heads, reduced, rate):
        rows = len(range(heads.offset, segment, rate))
        yield Block(start, segments, segment, rate, rows, heads, first)


@lru_cache(maxsize=1024)
def equal_heads(offsets, group: int, segment: int, rate: int) -> tuple[Progression, ...]:
    """Cut the query heads that have rows in a segment into progressions of equally many rows.

    Greedy: of the progressions that begin with the first head left, take the longest. With the
    "mod" rule that gives min(r, heads / r) calls instead of one per offset: heads 0, 1, 2, ... of
    offsets 0, 1, 2, ... lie on a diagonal, which is a stride as good as any other.
    """
    heads_with = defaultdict(list)
    for head, offset in enumerate(offsets):
        heads_with[len(range(offset, segment, rate))].append((head, head // group, offset))
    heads_with.pop(0, None)
    runs = []
    for left in heads_with.values():
        while left:
            candidates = [_progression(left, other) for other in left[1:]] or [left[:1]]
            best = max(candidates, key=len)
            steps = (b - a for a, b in zip(*best[:2], strict=True)) if len(best) > 1 else (0, 0, 0)
            runs.append(Progression(*best[0], *steps, len(best)))
            left = [head for head in left if head not in best]
    return tuple(runs)


def _progression(heads, second):
    """The longest progression among `heads` that begins with the first of them and `second`."""
    first, members = heads[0], set(heads)
    steps = [b - a for a, b in zip(first, second, strict=True)]
    if steps[2] < 0:  # a strided view cannot step backwards
        return [first]
    found, following = [], first
    while following in members:
        found.append(following)
        following = tuple(a + step for a, step in zip(following, steps, strict=True))
    return found
