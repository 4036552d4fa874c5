"""Dilated attention within documents, on PyTorch's operators: the blocks of `sdpa_blocks`, cut
where documents begin. No mask is built.

Segments that lie in one document stay together as they were. The others are cut into pieces, each a
dense attention of its own: long ones are computed where they are, short ones side by side.

The host has to know where documents begin: it reads that once for a batch, and cuts the blocks of a
pattern once for a batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from megalong.attention.pattern import DilatedPattern
from megalong.attention.sdpa_blocks import branch_blocks, branch_order, segment_blocks
from megalong.attention.sdpa_calls import LONG, Call, InPlace
from megalong.attention.sdpa_gathered import Pieces, gathered
from megalong.attention.tensor_cache import kept_with_tensor


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
