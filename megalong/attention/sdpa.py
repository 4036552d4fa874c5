"""The PyTorch backend: dense attention on strided views, merged by log-sum-exp.

Inside one segment the rows that take part form a smaller sequence whose neighbours lie r rows
apart, and on it dilated attention is plain dense attention. So nothing is gathered: `blocks`
cuts a pattern into a few blocks, each of which is one strided view (batch, segments, rows, heads,
head_dim) of q, k and v, and a dense attention that also returns its log-sum-exp runs on each. Where
documents are kept apart, `calls_within` cuts the blocks further: segments
that lie in one document stay together, the others become pieces, long ones computed in place, short
ones side by side.

Forward: partial results are merged into one running output and log-sum-exp (LongNet, arXiv
2307.02486, eq. 9-12). Backward: with the MERGED output and log-sum-exp, each block's own backward
gives its share of the exact gradient, P = exp(s - lse) and dS = P * (dP - rowsum(dO * O)); the
shares only add. Only q, k, v, output and log-sum-exp are kept between the two.

Shape suffixes: b batch, s sequence, h query heads, g kv heads, d head_dim, c segments of a block,
n rows of a segment, f batch and segments folded together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from megalong.attention.pattern import DilatedPattern
from megalong.attention.sdpa_bands import attend_band, attend_band_backward
from megalong.attention.sdpa_calls import LONG, Call, InPlace, Part, Pieces, gathered, prepared
from megalong.attention.tensors import PATTERNS, has_numbers, kept_with_tensor

# ------------------------------------------------------------------------------ the backend


def unsupported(device, dtype, head_dim) -> None:
    return None


def forward(q_bshd, k_bsgd, v_bsgd, pattern, *, causal, scale, documents=None):
    calls = _plan(q_bshd, k_bsgd, pattern, causal, documents)
    q_bshd, k_bsgd, v_bsgd = inputs = prepared(calls, q_bshd, k_bsgd, v_bsgd)
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)

    if _begins_whole(calls):  # its result becomes the running one
        out_bcnhd, lse_bcnh = calls[0].results(*inputs, scale)
        out_bshd = out_bcnhd.reshape(q_bshd.shape).to(dtype)
        out_bshd, lse_bsh = prepared(calls, out_bshd, lse_bcnh.reshape(q_bshd.shape[:3]))
        calls = calls[1:]
    else:
        out_bshd = q_bshd.new_zeros(q_bshd.shape, dtype=dtype)
        lse_bsh = q_bshd.new_full(q_bshd.shape[:3], -torch.inf, dtype=dtype)
    for call in calls:
        call.attend(*inputs, scale, out_bshd, lse_bsh)
    return out_bshd.to(q_bshd.dtype), lse_bsh.transpose(1, 2)


def backward(
    grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, pattern, *, causal, scale, documents=None
):  # fmt: skip
    calls = _plan(q_bshd, k_bsgd, pattern, causal, documents)
    lse_bsh = lse_bhs.transpose(1, 2)
    given = prepared(calls, grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bsh)
    q_bshd, k_bsgd, v_bsgd = inputs = given[1:4]
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)

    if _begins_whole(calls) and q_bshd.shape[2] == k_bsgd.shape[2]:
        parts = calls[0].gradients(*given, scale)
        totals = [part.reshape(x.shape).to(dtype) for part, x in zip(parts, inputs, strict=True)]
        totals, calls = prepared(calls, *totals), calls[1:]
    else:
        totals = [x.new_zeros(x.shape, dtype=dtype) for x in inputs]
    for call in calls:
        call.attend_backward(*given, scale, totals)
    return tuple(total.to(q_bshd.dtype) for total in totals)


def attend_rows(q_bmhd, k_bngd, v_bngd, band, *, scale, ranges=None):
    k_bnhd, v_bnhd = _per_head(q_bmhd, k_bngd, v_bngd)
    out_bmhd, lse_bmh = attend_band(q_bmhd, k_bnhd, v_bnhd, band, scale, ranges)
    return out_bmhd.to(q_bmhd.dtype), lse_bmh.transpose(1, 2)


def attend_rows_backward(
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm, band, *, scale, ranges=None
):  # fmt: skip
    k_bnhd, v_bnhd = _per_head(q_bmhd, k_bngd, v_bngd)
    dq_bmhd, *shares = attend_band_backward(
        grad_bmhd, q_bmhd, k_bnhd, v_bnhd, out_bmhd, lse_bhm.transpose(1, 2), band, scale, ranges
    )
    kv_heads = k_bngd.shape[2]
    return dq_bmhd, *(x.unflatten(2, (kv_heads, -1)).sum(3) for x in shares)


def _plan(q_bshd, k_bsgd, pattern, causal: bool, documents) -> tuple[Call, ...]:
    if not q_bshd.numel():
        return ()
    sizes = (*q_bshd.shape[1:3], k_bsgd.shape[2], bool(causal))
    if documents is None or not has_numbers(documents.start_bs):
        return _calls(pattern, *sizes)
    return calls_within(documents.start_bs, pattern, *sizes)


@lru_cache(maxsize=PATTERNS)
def _calls(pattern, length: int, heads: int, kv_heads: int, causal: bool) -> tuple[Call, ...]:
    return tuple(InPlace(block, causal) for block in blocks(pattern, length, heads, kv_heads))


def _begins_whole(calls: tuple[Call, ...]) -> bool:
    """What comes first is every row of every head."""
    return bool(calls) and isinstance(calls[0], InPlace) and calls[0].part.whole


def _per_head(q_bmhd, k_bngd, v_bngd):
    """k and v as (batch, rows, heads, head_dim), those of a group repeated for its heads."""
    group = q_bmhd.shape[2] // k_bngd.shape[2]
    return (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k_bngd, v_bngd))


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
class Block(Part):
    """Dense attentions of one shape: segments of one length in a row, of heads with equally many
    rows, in every row of the batch or in one."""

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
    def count(self) -> int:
        return self.segments

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


@kept_with_tensor
def calls_within(
    start_bs: torch.Tensor, pattern: DilatedPattern, length: int, heads: int, kv_heads: int,
    causal: bool,
) -> tuple[Call, ...]:  # fmt: skip
    """The calls of a pattern on sequences in which documents begin as `Documents.start_bs` says."""
    borders, order = borders_of(start_bs), branch_order(pattern)
    found: list[Call] = []
    for branch in order:
        width, rate = pattern.branches[branch]
        first = branch == order[0]
        if not any((row % width).any() for row in borders):  # each segment is of one document
            found += (
                InPlace(block, causal)
                for block in branch_blocks(pattern, branch, length, heads, kv_heads, first)
            )
            continue
        offsets = pattern.offsets(heads, kv_heads)[branch]
        of_batch = [_runs(row, width, length) for row in borders]
        for number, runs in enumerate(of_batch):
            for run in zip(*runs.where(runs.is_long(rate)), strict=True):
                found += (
                    InPlace(replace(block, of_batch=number), causal)
                    for block in _blocks(*map(int, run), width, offsets, rate, kv_heads, first)
                )
        short = [runs.where(~runs.is_long(rate)) for runs in of_batch]
        pieces = _pieces(short, width, length, offsets, rate, kv_heads)
        found += gathered(
            pieces, heads=heads, one_head=len(set(offsets)) > 1, causal=causal, first=first,
            device=start_bs.device,
        )  # fmt: skip
    return tuple(found)


@kept_with_tensor
def borders_of(start_bs: torch.Tensor) -> tuple[np.ndarray, ...]:
    """For each row of the batch, the positions at which a document begins, but for the first."""
    starts = start_bs.cpu().numpy()
    return tuple(np.flatnonzero(row[1:] != row[:-1]) + 1 for row in starts)


class Runs(NamedTuple):
    """Positions of one document and one segment, or whole segments in a row, as arrays: where the
    first begins, how many segments or parts of one, and the length of each."""

    start: np.ndarray
    count: np.ndarray
    size: np.ndarray

    def where(self, these: np.ndarray) -> Runs:
        return Runs(*(x[these] for x in self))

    def is_long(self, rate: int) -> np.ndarray:
        return self.count * self.size >= LONG * rate


def _runs(borders: np.ndarray, width: int, length: int) -> Runs:
    """All positions of a row of the batch."""
    edges = np.unique(np.concatenate((np.arange(0, length, width), borders, [length])))
    start, size = edges[:-1], np.diff(edges)
    whole = size == np.minimum(width, length - start // width * width)
    goes_on = whole[1:] & whole[:-1] & (size[1:] == size[:-1])
    first = np.flatnonzero(np.append(True, ~goes_on))
    return Runs(start[first], np.diff(first, append=len(start)), size[first])


def _blocks(start: int, count: int, size: int, width: int, offsets, rate: int, kv_heads, first):
    """The blocks of a run. Offsets count from where its segment begins."""
    shifted = tuple((offset - start % width) % rate for offset in offsets)
    return segment_blocks(start, count, size, shifted, rate, kv_heads, first)


def _pieces(
    of_batch: list[Runs], width: int, length: int, offsets: tuple[int, ...], rate: int,
    kv_heads: int,
) -> Pieces:  # fmt: skip
    """The rows of the runs in each row of the batch: of all heads at once where these have one
    offset, else of one after the other."""
    starts, sizes = [], []
    for number, (start, count, size) in enumerate(of_batch):
        within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        starts.append(number * length + np.repeat(start, count) + within * np.repeat(size, count))
        sizes.append(np.repeat(size, count))
    start, size = (np.concatenate(x)[:, None] for x in (starts, sizes))
    before = start % length % width  # the places of its segment that lie before
    heads = len(offsets)
    shift = (np.array(offsets if len(set(offsets)) > 1 else offsets[:1]) - before) % rate
    rows = np.maximum(-((shift - size) // rate), 0)
    there = rows > 0
    row, rows = (start + shift), rows[there]
    if shift.shape[1] == 1:
        row = row[there]
        return Pieces(row, row, rows, rows, rate, rate)
    head = np.arange(heads)
    query, key = row * heads + head, row * kv_heads + head // (heads // kv_heads)
    query, key = query[there], key[there]
    return Pieces(
        query, query if heads == kv_heads else key, rows, rows, rate * heads, rate * kv_heads
    )
