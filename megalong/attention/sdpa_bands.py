"""A band of (query row, key row) pairs as a few dense attentions, on PyTorch's operators.

The pairs are cut into rectangles and triangles (`tables`), so that no mask is ever built.
Tiles that look alike are folded into one batch. Where queries have ranges of their own, those that
share one are cut into pieces by themselves, and short pieces are computed side by side. The parts
are merged by log-sum-exp.

Shape suffixes: b batch, m query rows, n key rows, h heads, d head_dim, f batch and tiles folded
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from megalong.attention.documents import RowRanges
from megalong.attention.patterns import Band
from megalong.attention.sdpa_calls import LONG, Call, InPlace, Part, Pieces, gathered, prepared
from megalong.attention.tensors import PATTERNS, has_numbers, kept_with_tensor


def attend_band(q_bmhd, k_bnhd, v_bnhd, band: Band, scale: float, ranges: RowRanges | None = None):
    """Output like q, log-sum-exp (batch, m, heads) in at least float32; 0 and -inf where a query
    sees no key. q, k and v have equally many heads."""
    calls = _calls(band, ranges, q_bmhd, k_bnhd)
    inputs = prepared(calls, q_bmhd, k_bnhd, v_bnhd)
    if _is_one_attention(calls, q_bmhd, k_bnhd):
        return tuple(x[:, 0] for x in calls[0].results(*inputs, scale))
    dtype = torch.promote_types(q_bmhd.dtype, torch.float32)
    out_bmhd = q_bmhd.new_zeros(q_bmhd.shape, dtype=dtype)
    lse_bmh = q_bmhd.new_full(q_bmhd.shape[:3], -torch.inf, dtype=dtype)
    for call in calls:
        call.attend(*inputs, scale, out_bmhd, lse_bmh)
    return out_bmhd, lse_bmh


def attend_band_backward(
    grad_bmhd, q_bmhd, k_bnhd, v_bnhd, out_bmhd, lse_bmh, band, scale, ranges=None
):  # fmt: skip
    """Gradients (dq, dk, dv) in at least float32; out and lse may be those of a softmax over more
    keys."""
    calls = _calls(band, ranges, q_bmhd, k_bnhd)
    given = prepared(calls, grad_bmhd, q_bmhd, k_bnhd, v_bnhd, out_bmhd, lse_bmh)
    dtype = torch.promote_types(q_bmhd.dtype, torch.float32)
    if _is_one_attention(calls, q_bmhd, k_bnhd):
        return tuple(x[:, 0].to(dtype) for x in calls[0].gradients(*given, scale))
    sums = [x.new_zeros(x.shape, dtype=dtype) for x in (q_bmhd, k_bnhd, v_bnhd)]
    for call in calls:
        call.attend_backward(*given, scale, sums)
    return tuple(sums)


def _calls(band: Band, ranges: RowRanges | None, q_bmhd, k_bnhd) -> tuple[Call, ...]:
    if not q_bmhd.numel() or not k_bnhd.numel():
        return ()
    queries, heads, keys = *q_bmhd.shape[1:3], k_bnhd.shape[1]
    start_bhm, stop_bhm = (ranges.start_bhm, ranges.stop_bhm) if ranges else (None, None)
    if start_bhm is None and stop_bhm is not None:
        start_bhm = torch.zeros_like(stop_bhm)
    if start_bhm is None or not has_numbers(start_bhm):
        return _calls_of_all(band, queries, keys)
    return _calls_in_ranges(start_bhm, stop_bhm, band, heads, keys)


def _is_one_attention(calls: tuple[Call, ...], q_bmhd, k_bnhd) -> bool:
    """Of all rows, forwards: nothing is to be merged."""
    queries, keys = q_bmhd.shape[1], k_bnhd.shape[1]
    return calls in (
        (_in_place(Piece(form, 0, queries, 0, keys, first=True)),) for form in (ALL, GROWS)
    )


def _in_place(piece: Piece) -> InPlace:
    return InPlace(piece, piece.form != ALL)


@lru_cache(maxsize=PATTERNS)
def _calls_of_all(band: Band, queries: int, keys: int) -> tuple[Call, ...]:
    return tuple(map(_in_place, pieces(band, range(queries), range(keys))))


@kept_with_tensor
def _calls_in_ranges(
    start_bhm: torch.Tensor, stop_bhm: torch.Tensor | None, band: Band, heads: int, keys: int
) -> tuple[Call, ...]:
    starts = start_bhm.cpu().numpy()
    stops = np.full_like(starts, keys) if stop_bhm is None else stop_bhm.cpu().numpy()
    bounds_bhm2 = np.stack((starts, stops), -1).astype(np.int64)
    queries = bounds_bhm2.shape[2]
    if (bounds_bhm2 == (0, keys)).all():
        return _calls_of_all(band, queries, keys)
    # Neighbouring heads with the same ranges are one group.
    changes = (bounds_bhm2[:, 1:] != bounds_bhm2[:, :-1]).any((0, 2, 3))
    first_head = np.append(0, np.flatnonzero(changes) + 1)
    head_ends = np.append(first_head, heads)
    runs, batch, group = _runs(bounds_bhm2[:, first_head])
    found: list[Call] = []
    for table in tables(band, runs):
        is_long = table.tiles * table.rows >= LONG
        for run, *fields in zip(*table.where(is_long)[1:], strict=True):
            of_heads = tuple(head_ends[group[run] : group[run] + 2].tolist())
            place = {"of_batch": int(batch[run]), "heads": of_heads}
            found.append(_in_place(Piece(table.form, *(x.item() for x in fields), **place)))
        for first in (True, False):
            short = table.where(~is_long & (table.first == first))
            found += gathered(
                _side_by_side(short, batch, group, head_ends, queries, keys), heads=heads,
                one_head=len(first_head) > 1, causal=table.form != ALL, first=first,
                device=start_bhm.device,
            )  # fmt: skip
    return tuple(sorted(found, key=_writes_later))


def _writes_later(call: Call) -> bool:
    return not (call.part.first if isinstance(call, InPlace) else call.first)


def _side_by_side(table: Table, batch, group, head_ends, queries: int, keys: int) -> Pieces:
    """The tiles of all pieces, of all heads at once where these are one group, else of one after
    the other. Those whose keys shrink are backwards: then they grow."""
    tile = np.arange(table.tiles.sum()) - np.repeat(table.tiles.cumsum() - table.tiles, table.tiles)
    table = table.where(np.repeat(np.arange(len(table.run)), table.tiles))
    query, key, step = table.query + tile * table.step, table.key + tile * table.step, 1
    if table.form == SHRINKS:
        query, key, step = query + table.rows - 1, key + table.keys - 1, -1
    query, key = query + batch[table.run] * queries, key + batch[table.run] * keys
    if len(head_ends) == 2:
        return Pieces(query, key, table.rows, table.keys, step, step)
    heads, first, stop = head_ends[-1], *(head_ends[group[table.run] + side] for side in (0, 1))
    at, head = (np.arange(heads) < (stop - first)[:, None]).nonzero()
    head = head + first[at]
    numbers = (x[at] * heads + head for x in (query, key))
    return Pieces(*numbers, table.rows[at], table.keys[at], step * heads, step * heads)


def _runs(bounds_bhm2: np.ndarray) -> tuple[Runs, np.ndarray, np.ndarray]:
    """Neighbouring queries with one range, where that is not empty, with their row of the batch and
    head."""
    begins = np.ones(bounds_bhm2.shape[:3], bool)
    begins[:, :, 1:] = (bounds_bhm2[:, :, 1:] != bounds_bhm2[:, :, :-1]).any(-1)
    batch, head, query = begins.nonzero()
    last = np.append((batch[1:] != batch[:-1]) | (head[1:] != head[:-1]), True)
    stop = np.where(last, bounds_bhm2.shape[2], np.append(query[1:], 0))
    low, high = bounds_bhm2[batch, head, query].T
    seen = low < high
    runs = Runs(*(x[seen] for x in (query, stop, low, high)))
    return runs, batch[seen], head[seen]


ALL, GROWS, SHRINKS = "all", "grows", "shrinks"  # which keys of a piece its queries see


@dataclass(frozen=True)
class Piece(Part):
    """`tiles` dense attentions of one shape: of query rows [query, query + rows) to key rows
    [key, key + keys), and again for each tile, `step` rows further on both sides.

    form: ALL; or GROWS, where query i sees the keys up to i; or SHRINKS, those from i on. Then rows
        is keys.
    first: no other piece has written the rows before it. of_batch, heads: the row of the batch, and
        the first head and the one after the last; None is all.
    """

    form: str
    query: int
    rows: int
    key: int
    keys: int
    first: bool = False
    tiles: int = 1
    step: int = 0
    of_batch: int | None = None
    heads: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        return self.tiles

    @property
    def head_count(self) -> int:
        return -1 if self.heads is None else self.heads[1] - self.heads[0]

    def view_queries(self, x_bmh: torch.Tensor) -> torch.Tensor:
        """(batch, m, heads, ...) -> (batch, tiles, rows, heads, ...), a view."""
        return self._view(x_bmh, self.query, self.rows)

    def view_keys(self, x_bnh: torch.Tensor) -> torch.Tensor:
        return self._view(x_bnh, self.key, self.keys)

    def _view(self, x_bmh, start: int, count: int):
        if self.of_batch is not None:
            x_bmh = x_bmh[self.of_batch : self.of_batch + 1]
        if self.heads is not None:
            x_bmh = x_bmh[:, :, slice(*self.heads)]
        shape = (x_bmh.shape[0], self.tiles, count, *x_bmh.shape[2:])
        batch, row, *rest = x_bmh.stride()
        strides = (batch, self.step * row, row, *rest)
        return x_bmh.as_strided(shape, strides, x_bmh.storage_offset() + start * row)

    def turned(self, x_fhm):
        """Backwards, where the keys that a query sees shrink: then they grow."""
        return x_fhm.flip(2) if self.form == SHRINKS else x_fhm


class Runs(NamedTuple):
    """Query rows [query, query_stop) that see, of what their band gives them, the key rows [key,
    key_stop). Arrays: a number for each run."""

    query: np.ndarray
    query_stop: np.ndarray
    key: np.ndarray
    key_stop: np.ndarray


class Table(NamedTuple):
    """Pieces of one form as arrays; each as `Piece` has it, with the number of its run. No query
    row is in two of them."""

    form: str
    run: np.ndarray
    query: np.ndarray
    rows: np.ndarray
    key: np.ndarray
    keys: np.ndarray
    first: np.ndarray
    tiles: np.ndarray
    step: np.ndarray

    def where(self, these: np.ndarray) -> Table:
        return Table(self.form, *(x[these] for x in self[1:]))


def pieces(band: Band, queries: range, keys: range) -> tuple[Piece, ...]:
    """The pieces that these query rows have of these key rows: those that write their rows first
    come first."""
    ends = (queries.start, queries.stop, keys.start, keys.stop)
    runs = Runs(*(np.array([end]) for end in ends))
    found = [
        Piece(table.form, *map(int, numbers[:4]), bool(numbers[4]), *map(int, numbers[5:]))
        for table in tables(band, runs)
        for numbers in zip(*table[2:], strict=True)
    ]
    return tuple(sorted(found, key=lambda piece: not piece.first))


def tables(band: Band, runs: Runs) -> list[Table]:
    """The pieces of all runs. Those of one tile are in different tables, and any order will do but
    that the first of them writes its rows first."""
    run, start, stop = _tiles(band, runs)
    (low, high), (last_low, last_high) = (_seen(band, row, runs, run) for row in (start, stop - 1))
    rows, none = stop - start, np.zeros_like(start)
    one_range = (low == last_low) & (high == last_high)
    # Keys that grow: the ranges end one row later with each query, until the keys end.
    grown = np.where(one_range, 0, last_high - high + 1)
    # Keys that shrink: the ranges begin one row later with each of the last queries.
    shrunk = last_low - low
    steady = rows - 1 - shrunk
    before = np.where(one_range, 0, shrunk)
    # form, first query, rows, first key, keys
    cut = [
        (GROWS, start, grown, high - 1, grown),
        (ALL, start + grown, np.where(one_range, 0, rows - grown), high - 1, grown),
        (ALL, start, rows, last_low, np.where(one_range, high - low, high - 1 - last_low)),
        (ALL, start, steady, low, before),
        (SHRINKS, start + steady, before, low, before),
    ]
    rows_of = np.stack([np.where(x[4] > 0, np.maximum(x[2], 0), 0) for x in cut])
    largest = rows_of.argmax(0)
    found = []
    for number, (form, query, _, key, keys) in enumerate(cut):
        there = rows_of[number] > 0
        first = (largest == number) & (rows_of[number] == rows)
        columns = (run, query, rows_of[number], key, keys, first)
        found.append(_joined(Table(form, *(x[there] for x in (*columns, none + 1, none)))))
    return found


def _joined(table: Table) -> Table:
    """Tiles that look alike and follow at one distance as one piece, if no key row stands in two of
    them."""
    if not len(table.run):
        return table
    alike = (table.first, table.key - table.query, table.keys, table.rows, table.run)
    table = table.where(np.lexsort((table.query, *alike)))
    alike = np.stack((table.first, table.key - table.query, table.keys, table.rows, table.run))
    step = np.diff(table.query)
    breaks = (alike[:, 1:] != alike[:, :-1]).any(0) | (step < table.keys[1:])
    # Another distance than the one before, where that one joins two tiles.
    breaks[1:] |= ~breaks[:-1] & (step[1:] != step[:-1])
    begins = np.flatnonzero(np.append(True, breaks))
    tiles = np.diff(begins, append=len(table.run))
    steps = np.where(tiles > 1, np.append(step, 0)[begins], 0)
    return table.where(begins)._replace(tiles=tiles, step=steps)


def _tiles(band: Band, runs: Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query rows that are computed together, those that see nothing in none: of which run they are,
    their starts and stops."""
    along_diagonal = band.query_block == band.key_block == 1
    lead = np.zeros_like(runs.query)
    if not along_diagonal:  # a block of queries sees the same keys
        size, lead = band.query_block, (band.first + runs.query) % band.query_block
    elif band.before is None or band.after is None:
        size = max(int((runs.query_stop - runs.query).max(initial=1)), 1)
    else:  # so that what grows and what shrinks lie side by side
        size = band.before + band.after
    count = -(-(lead + runs.query_stop - runs.query) // size)
    run = np.repeat(np.arange(len(count)), count)
    number = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    start = (runs.query - lead)[run] + number * size
    stop = np.minimum(start + size, runs.query_stop[run])
    start = np.maximum(start, runs.query[run])
    if along_diagonal:  # the first rows may come before their keys, and the last ones behind
        if band.after is not None:
            start = np.maximum(start, runs.key[run] + 1 - band.first - band.after)
        if band.before is not None:
            stop = np.minimum(stop, runs.key_stop[run] - band.first + band.before)
    low, high = _seen(band, start, runs, run)
    there = (start < stop) & (low < high)
    return run[there], start[there], stop[there]


def _seen(band: Band, row: np.ndarray, runs: Runs, run: np.ndarray):
    """Where the key rows begin and stop that query rows see of those of their runs."""
    first, stop = runs.key[run], runs.key_stop[run]
    block = (band.first + row) // band.query_block
    low = first if band.before is None else (block - band.before) * band.key_block
    high = stop if band.after is None else (block + band.after) * band.key_block
    return np.clip(low, first, stop), np.clip(high, first, stop)
