"""A band of (query row, key row) pairs as a few dense attentions, on PyTorch's operators.

The pairs are cut into rectangles and triangles, so that no mask is ever built: where the band's
edge runs along the diagonal, a tile of queries sees a triangle of keys that grows with the query,
which is causal attention, and one that shrinks, which is causal attention backwards. Tiles that
look alike are folded into one batch. Where queries have ranges of their own, those that share one
are cut into pieces by themselves. The parts are merged by log-sum-exp.

Shape suffixes: b batch, m query rows, n key rows, h heads, d head_dim, f batch and tiles folded
together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from megalong.attention.band import Band
from megalong.attention.documents import RowRanges
from megalong.attention.sdpa_calls import Call, in_calls
from megalong.attention.sdpa_operators import attend, attend_backward
from megalong.attention.tensor_cache import PATTERNS, has_numbers, kept_with_tensor

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
    def count(self) -> int:
        return self.tiles

    @property
    def head_count(self) -> int:
        return -1 if self.heads is None else self.heads[1] - self.heads[0]

    @property
    def shape(self) -> tuple:
        return self.form, self.keys

    def fold_queries(self, x_bhm: torch.Tensor) -> torch.Tensor:
        """(batch, heads, m, ...) -> (batch * tiles, heads, rows, ...), copied where strides forbid
        a view."""
        return self._turned(self._fold(x_bhm, self.query, self.rows))

    def fold_keys(self, x_bhn: torch.Tensor) -> torch.Tensor:
        return self._turned(self._fold(x_bhn, self.key, self.keys))

    def view_queries(self, x_bhm: torch.Tensor) -> torch.Tensor:
        """(batch, heads, m, ...) -> (batch, tiles, heads, rows, ...), a view."""
        return self._view(x_bhm, self.query, self.rows)

    def view_keys(self, x_bhn: torch.Tensor) -> torch.Tensor:
        return self._view(x_bhn, self.key, self.keys)

    def unfold(self, x_fhm: torch.Tensor) -> torch.Tensor:
        """A result (batch * tiles, heads, rows, ...) as the views are."""
        return self._turned(x_fhm).unflatten(0, (-1, self.tiles))

    def _view(self, x_bhm, start: int, count: int):
        if self.of_batch is not None:
            x_bhm = x_bhm[self.of_batch : self.of_batch + 1]
        if self.heads is not None:
            x_bhm = x_bhm[:, slice(*self.heads)]
        shape = (x_bhm.shape[0], self.tiles, x_bhm.shape[1], count, *x_bhm.shape[3:])
        batch, head, row, *rest = x_bhm.stride()
        strides = (batch, self.step * row, head, row, *rest)
        return x_bhm.as_strided(shape, strides, x_bhm.storage_offset() + start * row)

    def _fold(self, x_bhm, start: int, count: int):
        return self._view(x_bhm, start, count).flatten(0, 1)

    def _turned(self, x_fhm):
        """Backwards, where the keys that a query sees shrink: then they grow."""
        return x_fhm.flip(2) if self.form == SHRINKS else x_fhm


def attend_band(q_bhmd, k_bhnd, v_bhnd, band: Band, scale: float, ranges: RowRanges | None = None):
    """Output like q, log-sum-exp (batch, heads, m) in at least float32; 0 and -inf where a query
    sees no key. q, k and v have equally many heads, and their last stride is 1."""
    calls = _calls(band, ranges, q_bhmd, k_bhnd)
    if _is_one_attention(calls, q_bhmd, k_bhnd):
        return attend(q_bhmd, k_bhnd, v_bhnd, calls[0].parts[0].form == GROWS, scale)
    dtype = torch.promote_types(q_bhmd.dtype, torch.float32)
    out_bhmd = q_bhmd.new_zeros(q_bhmd.shape, dtype=dtype)
    lse_bhm = q_bhmd.new_full(q_bhmd.shape[:3], -torch.inf, dtype=dtype)
    for call in calls:
        causal = call.parts[0].form != ALL
        for piece, new_out, new_lse in call.attend(q_bhmd, k_bhnd, v_bhnd, causal, scale):
            out, lse = piece.view_queries(out_bhmd), piece.view_queries(lse_bhm)
            if piece.first:
                out.copy_(new_out)
                lse.copy_(new_lse)
            else:
                out.lerp_(new_out.to(dtype), torch.sigmoid(new_lse - lse)[..., None])
                torch.logaddexp(lse, new_lse.to(dtype), out=lse)
    return out_bhmd, lse_bhm


def attend_band_backward(
    grad_bhmd, q_bhmd, k_bhnd, v_bhnd, out_bhmd, lse_bhm, band, scale, ranges=None
):  # fmt: skip
    """Gradients (dq, dk, dv) in at least float32; out and lse may be those of a softmax over more
    keys."""
    calls = _calls(band, ranges, q_bhmd, k_bhnd)
    dtype = torch.promote_types(q_bhmd.dtype, torch.float32)
    if _is_one_attention(calls, q_bhmd, k_bhnd):
        causal = calls[0].parts[0].form == GROWS
        gradients = attend_backward(
            grad_bhmd, q_bhmd, k_bhnd, v_bhnd, out_bhmd, lse_bhm, causal, scale
        )
        return tuple(x.to(dtype) for x in gradients)
    sums = [x.new_zeros(x.shape, dtype=dtype) for x in (q_bhmd, k_bhnd, v_bhnd)]
    for call in calls:
        causal = call.parts[0].form != ALL
        for piece, *shares in call.attend_backward(
            grad_bhmd, q_bhmd, k_bhnd, v_bhnd, out_bhmd, lse_bhm, causal, scale
        ):
            views = (piece.view_queries, piece.view_keys, piece.view_keys)
            for view, x_sums, share in zip(views, sums, shares, strict=True):
                view(x_sums).add_(share)
    return tuple(sums)


def _calls(band: Band, ranges: RowRanges | None, q_bhmd, k_bhnd) -> tuple[Call, ...]:
    if not q_bhmd.numel() or not k_bhnd.numel():
        return ()
    heads, queries, keys = *q_bhmd.shape[1:3], k_bhnd.shape[2]
    start_bhm, stop_bhm = (ranges.start_bhm, ranges.stop_bhm) if ranges else (None, None)
    if start_bhm is None and stop_bhm is not None:
        start_bhm = torch.zeros_like(stop_bhm)
    if start_bhm is None or not has_numbers(start_bhm):
        return _calls_of_all(band, queries, keys)
    return _calls_in_ranges(start_bhm, stop_bhm, band, heads, keys)


def _is_one_attention(calls: tuple[Call, ...], q_bhmd, k_bhnd) -> bool:
    """Of all rows, forwards: nothing is to be merged."""
    queries, keys = q_bhmd.shape[2], k_bhnd.shape[2]
    return calls in (
        (Call((Piece(form, 0, queries, 0, keys, first=True),)),) for form in (ALL, GROWS)
    )


@lru_cache(maxsize=PATTERNS)
def _calls_of_all(band: Band, queries: int, keys: int) -> tuple[Call, ...]:
    return in_calls(pieces(band, range(queries), range(keys)))


@kept_with_tensor
def _calls_in_ranges(
    start_bhm: torch.Tensor, stop_bhm: torch.Tensor | None, band: Band, heads: int, keys: int
) -> tuple[Call, ...]:
    starts = start_bhm.cpu().numpy()
    stops = np.full_like(starts, keys) if stop_bhm is None else stop_bhm.cpu().numpy()
    bounds_bhm2 = np.stack((starts, stops), -1)
    if (bounds_bhm2 == (0, keys)).all():
        return _calls_of_all(band, bounds_bhm2.shape[2], keys)
    found = []
    for of_batch, bounds_hm2 in enumerate(bounds_bhm2):
        for these, bounds_m2 in _alike(bounds_hm2, heads):
            for queries, (start, stop) in _runs(bounds_m2):
                for piece in pieces(band, queries, range(start, stop)):
                    found.append(replace(piece, of_batch=of_batch, heads=these))
    return in_calls(found)


def _alike(bounds_hm2: np.ndarray, heads: int) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Neighbouring heads with the same ranges, and these."""
    if len(bounds_hm2) == 1:
        yield (0, heads), bounds_hm2[0]
        return
    changes = (bounds_hm2[1:] != bounds_hm2[:-1]).any((1, 2))
    for first, stop in pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), heads]):
        yield (first, stop), bounds_hm2[first]


def _runs(bounds_m2: np.ndarray) -> Iterator[tuple[range, list[int]]]:
    """Neighbouring queries with one range, and this, where it is not empty."""
    changes = (bounds_m2[1:] != bounds_m2[:-1]).any(1)
    for first, stop in pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(bounds_m2)]):
        low, high = bounds_m2[first].tolist()
        if low < high:
            yield range(first, stop), [low, high]


def pieces(band: Band, queries: range, keys: range) -> tuple[Piece, ...]:
    """The pieces that these query rows have of these key rows, those of one tile of queries in the
    order in which they are merged."""
    runs: list[Piece] = []
    last_of: dict[tuple, int] = {}  # the run that a piece of this shape may go on with
    for tile in _tiles(band, queries, keys):
        for piece in _tile_pieces(band, tile, keys):
            alike = (piece.form, piece.rows, piece.keys, piece.key - piece.query, piece.first)
            at = last_of.setdefault(alike, len(runs))
            if at < len(runs) and (longer := _joined(runs[at], piece)):
                runs[at] = longer
            else:
                last_of[alike] = len(runs)
                runs.append(piece)
    # What is written first comes first: runs are longer than tiles.
    return tuple(sorted(runs, key=lambda piece: not piece.first))


def _joined(run: Piece, piece: Piece) -> Piece | None:
    """A run that is longer by a piece, where that follows at the distance of the others and no key
    row stands in two of them."""
    step = piece.query - run.query - (run.tiles - 1) * run.step
    if step < piece.keys or (run.tiles > 1 and step != run.step):
        return None
    return replace(run, tiles=run.tiles + 1, step=step)


def _seen(band: Band, row: int, keys: range) -> tuple[int, int]:
    """Where the key rows begin and stop that a query row sees of these."""
    start, stop = band.start(row, keys.stop), band.stop(row, keys.stop)
    return max(start, keys.start), max(stop, keys.start)


def _tiles(band: Band, queries: range, keys: range) -> Iterator[range]:
    """Query rows that are computed together; those that see nothing in none."""
    along_diagonal = band.query_block == band.key_block == 1
    start = queries.start
    while start < queries.stop:
        if not along_diagonal:  # a block of queries sees the same keys
            size = band.query_block - (band.first + start) % band.query_block
        elif band.before is None or band.after is None:
            size = len(queries)
        else:  # so that what grows and what shrinks lie side by side
            size = band.before + band.after
        stop = min(start + size, queries.stop)
        low, high = start, stop
        if along_diagonal:  # the first rows may come before their keys, and the last ones behind
            if band.after is not None:
                low = max(low, keys.start + 1 - band.first - band.after)
            if band.before is not None:
                high = min(high, keys.stop - band.first + band.before)
        if low < high and operator.lt(*_seen(band, low, keys)):
            yield range(low, high)
        start = stop


def _tile_pieces(band: Band, tile: range, keys: range) -> list[Piece]:
    """The pieces of query rows all of which see a key."""
    start, rows = tile.start, len(tile)
    (low, high), (last_low, last_high) = (_seen(band, row, keys) for row in (start, tile[-1]))
    if (low, high) == (last_low, last_high):
        return [Piece(ALL, start, rows, low, high - low, first=True)]
    # Keys that grow: the ranges end one row later with each query, until the keys end.
    grown = last_high - high + 1
    # Keys that shrink: the ranges begin one row later with each of the last queries.
    shrunk = last_low - low
    steady = rows - 1 - shrunk
    found = [
        Piece(GROWS, start, grown, high - 1, grown),
        Piece(ALL, start + grown, rows - grown, high - 1, grown),
        Piece(ALL, start, rows, last_low, high - 1 - last_low),
        Piece(ALL, start, steady, low, shrunk),
        Piece(SHRINKS, start + steady, shrunk, low, shrunk),
    ]
    found = [piece for piece in found if piece.rows > 0 and piece.keys > 0]
    found.sort(key=lambda piece: -piece.rows)
    if found[0].rows == rows:
        found[0] = replace(found[0], first=True)
    return found
