"""Dilated attention within documents, on PyTorch's operators: the blocks of `sdpa_blocks`, cut
where documents begin. No mask is built.

Segments that lie in one document stay together as they were. The rows of the others are cut into
pieces, each a dense attention of its own.

The host has to know where documents begin: it reads that once for a batch, and cuts the blocks of a
pattern once for a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import torch

from megalong.attention.pattern import DilatedPattern
from megalong.attention.sdpa_blocks import Block, blocks
from megalong.attention.sdpa_calls import Call, in_calls
from megalong.attention.tensor_cache import kept_with_tensor


@kept_with_tensor
def calls_within(
    start_bs: torch.Tensor, pattern: DilatedPattern, length: int, heads: int, kv_heads: int
) -> tuple[Call, ...]:
    """The calls of a pattern on sequences in which documents begin as `Documents.start_bs` says."""
    borders = borders_of(start_bs)
    cut = (_cut(block, borders) for block in blocks(pattern, length, heads, kv_heads))
    return in_calls(chain.from_iterable(cut))


@kept_with_tensor
def borders_of(start_bs: torch.Tensor) -> tuple[np.ndarray, ...]:
    """For each row of the batch, the positions at which a document begins, but for the first."""
    starts = start_bs.cpu().numpy()
    return tuple(np.flatnonzero(row[1:] != row[:-1]) + 1 for row in starts)


def _cut(block: Block, borders: tuple[np.ndarray, ...]) -> Iterator[Block]:
    """The pieces of a block; itself where no document begins inside of one of its segments."""
    width = block.segment_length
    inside = [_inside(block, row) for row in borders]
    if not any(map(len, inside)):
        yield block
        return
    for of_batch, cuts in enumerate(inside):
        uncut = 0
        segments = cuts // width
        for segment in np.unique(segments).tolist():
            yield from _run(block, of_batch, uncut, segment)
            yield from _pieces(block, of_batch, segment, cuts[segments == segment] % width)
            uncut = segment + 1
        yield from _run(block, of_batch, uncut, block.segments)


def _inside(block: Block, borders: np.ndarray) -> np.ndarray:
    """The borders inside of a block's segments, counted from the start of the first one."""
    cuts = borders - block.start
    cuts = cuts[(cuts > 0) & (cuts < block.segments * block.segment_length)]
    return cuts[cuts % block.segment_length > 0]


def _run(block: Block, of_batch: int, first: int, stop: int) -> Iterator[Block]:
    """The segments [first, stop) in one row of the batch, if there are any."""
    if first < stop:
        start = block.start + first * block.segment_length
        yield replace(block, start=start, segments=stop - first, whole=False, of_batch=of_batch)


def _pieces(block: Block, of_batch: int, segment: int, cuts: np.ndarray) -> Iterator[Block]:
    """A segment, cut at these of its positions."""
    heads, rate = block.heads, block.rate
    start = block.start + segment * block.segment_length
    offsets = heads.offset + heads.offset_step * np.arange(heads.count)
    # The first row of each head at or behind a cut: one more or less, as its offset is.
    ends = np.clip(-((offsets - cuts[:, None]) // rate), 0, block.rows)
    ends = np.pad(ends, ((1, 1), (0, 0)), constant_values=((0, block.rows), (0, 0)))
    changes = (ends[:-1, 1:] != ends[:-1, :-1]) | (ends[1:, 1:] != ends[1:, :-1])
    for (first, stop), change in zip(pairwise(ends), changes, strict=True):
        alike = [0, *(np.flatnonzero(change) + 1).tolist(), heads.count]
        for head, next_head in pairwise(alike):
            row, rows = int(first[head]), int(stop[head] - first[head])
            if rows:
                yield Block(
                    start + row * rate, 1, rows * rate, rate, rows, heads.cut(head, next_head),
                    block.first, of_batch=of_batch,
                )  # fmt: skip
