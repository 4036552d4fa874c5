"""A band of (query row, key row) pairs, cut into rectangles and triangles.

Where the band's edge runs along the diagonal, a tile of queries sees a triangle of keys that grows
with the query, which is causal attention, and one that shrinks, which is causal attention
backwards. Tiles that look alike and follow at one distance are one piece, however many they are.

Numpy cuts all tiles at once: there may be as many as queries.

Shape suffixes: b batch, m query rows, n key rows, h heads, f batch and tiles folded together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megalong.attention.band import Band

ALL, GROWS, SHRINKS = "all", "grows", "shrinks"  # which keys of a piece its queries see


@dataclass(frozen=True)
class Piece:
    """`tiles` dense attentions of one shape: of query rows [query, query + rows) to key rows
    [key, key + keys), and again for each tile, `step` rows further on both sides.

    form: ALL; or GROWS, where query i sees the keys up to i; or SHRINKS, those from i on. Then rows
        is keys.
    first: no other piece has written the rows before it. of_batch, heads: the row of the batch, and
        the first head and the one after the last; None is all. So it is a `sdpa_calls.Part`.
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
    def head_count(self) -> int:
        return -1 if self.heads is None else self.heads[1] - self.heads[0]

    def fold_queries(self, x_bmh: torch.Tensor) -> torch.Tensor:
        """(batch, m, heads, ...) -> (batch * tiles, heads, rows, ...), copied where strides forbid
        a view."""
        return self._turned(self.view_queries(x_bmh).transpose(2, 3).flatten(0, 1))

    def fold_keys(self, x_bnh: torch.Tensor) -> torch.Tensor:
        return self._turned(self.view_keys(x_bnh).transpose(2, 3).flatten(0, 1))

    def view_queries(self, x_bmh: torch.Tensor) -> torch.Tensor:
        """(batch, m, heads, ...) -> (batch, tiles, rows, heads, ...), a view."""
        return self._view(x_bmh, self.query, self.rows)

    def view_keys(self, x_bnh: torch.Tensor) -> torch.Tensor:
        return self._view(x_bnh, self.key, self.keys)

    def unfold(self, x_fhm: torch.Tensor) -> torch.Tensor:
        """A result (batch * tiles, heads, rows, ...) as the views are."""
        return self._turned(x_fhm).unflatten(0, (-1, self.tiles)).transpose(2, 3)

    def sum_shared(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Heads share no keys here."""
        return x

    def _view(self, x_bmh, start: int, count: int):
        if self.of_batch is not None:
            x_bmh = x_bmh[self.of_batch : self.of_batch + 1]
        if self.heads is not None:
            x_bmh = x_bmh[:, :, slice(*self.heads)]
        shape = (x_bmh.shape[0], self.tiles, count, *x_bmh.shape[2:])
        batch, row, *rest = x_bmh.stride()
        strides = (batch, self.step * row, row, *rest)
        return x_bmh.as_strided(shape, strides, x_bmh.storage_offset() + start * row)

    def _turned(self, x_fhm):
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
