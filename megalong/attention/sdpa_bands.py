"""A band of (query row, key row) pairs as a few dense attentions, on PyTorch's operators.

The pairs are cut into rectangles and triangles, so that no mask is ever built: where the band's
edge runs along the diagonal, a tile of queries sees a triangle of keys that grows with the query,
which is causal attention, and one that shrinks, which is causal attention backwards. Tiles that
look alike are folded into one batch. The parts are merged by log-sum-exp.

Shape suffixes: b batch, m query rows, n key rows, h heads, d head_dim, f batch and tiles folded
together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from megalong.attention.band import Band
from megalong.attention.sdpa_operators import attend, attend_backward
from megalong.attention.tensor_cache import PATTERNS

ALL, GROWS, SHRINKS = "all", "grows", "shrinks"  # which keys of a piece its queries see


@dataclass(frozen=True)
class Piece:
    """`tiles` dense attentions of one shape: of query rows [query, query + rows) to key rows
    [key, key + keys), and again for each tile, `step` rows further on both sides.

    form: ALL; or GROWS, where query i sees the keys up to i; or SHRINKS, those from i on. Then rows
        is keys.
    first: no other piece has written the rows before it.
    """

    form: str
    query: int
    rows: int
    key: int
    keys: int
    first: bool = False
    tiles: int = 1
    step: int = 0

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
        shape = (x_bhm.shape[0], self.tiles, x_bhm.shape[1], count, *x_bhm.shape[3:])
        batch, head, row, *rest = x_bhm.stride()
        strides = (batch, self.step * row, head, row, *rest)
        return x_bhm.as_strided(shape, strides, x_bhm.storage_offset() + start * row)

    def _fold(self, x_bhm, start: int, count: int):
        return self._view(x_bhm, start, count).flatten(0, 1)

    def _turned(self, x_fhm):
        """Backwards, where the keys that a query sees shrink: then they grow."""
        return x_fhm.flip(2) if self.form == SHRINKS else x_fhm


def attend_band(q_bhmd, k_bhnd, v_bhnd, band: Band, scale: float):
    """Output like q, log-sum-exp (batch, heads, m) in at least float32; 0 and -inf where a query
    sees no key. q, k and v have equally many heads, and their last stride is 1."""
    parts = _pieces(band, q_bhmd, k_bhnd)
    if _is_one_attention(parts, q_bhmd, k_bhnd):
        return attend(q_bhmd, k_bhnd, v_bhnd, parts[0].form == GROWS, scale)
    dtype = torch.promote_types(q_bhmd.dtype, torch.float32)
    out_bhmd = q_bhmd.new_zeros(q_bhmd.shape, dtype=dtype)
    lse_bhm = q_bhmd.new_full(q_bhmd.shape[:3], -torch.inf, dtype=dtype)
    for piece in parts:
        results = attend(
            piece.fold_queries(q_bhmd), piece.fold_keys(k_bhnd), piece.fold_keys(v_bhnd),
            piece.form != ALL, scale,
        )  # fmt: skip
        new_out, new_lse = map(piece.unfold, results)
        out, lse = piece.view_queries(out_bhmd), piece.view_queries(lse_bhm)
        if piece.first:
            out.copy_(new_out)
            lse.copy_(new_lse)
        else:
            out.lerp_(new_out.to(dtype), torch.sigmoid(new_lse - lse)[..., None])
            torch.logaddexp(lse, new_lse.to(dtype), out=lse)
    return out_bhmd, lse_bhm


def attend_band_backward(grad_bhmd, q_bhmd, k_bhnd, v_bhnd, out_bhmd, lse_bhm, band, scale):
    """Gradients (dq, dk, dv) in at least float32; out and lse may be those of a softmax over more
    keys."""
    parts = _pieces(band, q_bhmd, k_bhnd)
    dtype = torch.promote_types(q_bhmd.dtype, torch.float32)
    if _is_one_attention(parts, q_bhmd, k_bhnd):
        gradients = attend_backward(
            grad_bhmd, q_bhmd, k_bhnd, v_bhnd, out_bhmd, lse_bhm, parts[0].form == GROWS, scale
        )
        return tuple(x.to(dtype) for x in gradients)
    sums = [x.new_zeros(x.shape, dtype=dtype) for x in (q_bhmd, k_bhnd, v_bhnd)]
    for piece in parts:
        q_fhmd, grad_fhmd, out_fhmd, lse_fhm = map(
            piece.fold_queries, (q_bhmd, grad_bhmd, out_bhmd, lse_bhm)
        )
        shares = attend_backward(
            grad_fhmd, q_fhmd, piece.fold_keys(k_bhnd), piece.fold_keys(v_bhnd), out_fhmd, lse_fhm,
            piece.form != ALL, scale,
        )  # fmt: skip
        views = (piece.view_queries, piece.view_keys, piece.view_keys)
        for view, x_sums, share in zip(views, sums, shares, strict=True):
            view(x_sums).add_(piece.unfold(share))
    return tuple(sums)


def _pieces(band: Band, q_bhmd, k_bhnd) -> tuple[Piece, ...]:
    if not q_bhmd.numel() or not k_bhnd.numel():
        return ()
    return pieces(band, q_bhmd.shape[2], k_bhnd.shape[2])


def _is_one_attention(parts: tuple[Piece, ...], q_bhmd, k_bhnd) -> bool:
    """Of all rows, forwards: nothing is to be merged."""
    return parts in (
        (Piece(form, 0, q_bhmd.shape[2], 0, k_bhnd.shape[2], first=True),) for form in (ALL, GROWS)
    )


@lru_cache(maxsize=PATTERNS)
def pieces(band: Band, queries: int, keys: int) -> tuple[Piece, ...]:
    """The pieces of a band, those of one tile of queries in the order in which they are merged."""
    runs: list[Piece] = []
    last_of: dict[tuple, int] = {}  # the run that a piece of this shape may go on with
    for tile in _tiles(band, queries, keys):
        for piece in _tile_pieces(band, *tile, keys):
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


def _tiles(band: Band, queries: int, keys: int) -> Iterator[tuple[int, int]]:
    """Query rows [start, stop) that are computed together; those that see nothing in none."""
    along_diagonal = band.query_block == band.key_block == 1
    start = 0
    while start < queries:
        if not along_diagonal:  # a block of queries sees the same keys
            size = band.query_block - (band.first + start) % band.query_block
        elif band.before is None or band.after is None:
            size = queries
        else:  # so that what grows and what shrinks lie side by side, and begin at multiples
            size = band.before + band.after
            size -= (band.first + start) % size
        stop = min(start + size, queries)
        while start < stop and band.stop(start, keys) == 0:
            start = min(stop, start + 1 if along_diagonal else stop)
        last = stop
        while last > start and band.start(last - 1, keys) == keys:
            last = last - 1 if along_diagonal else start
        if last > start:
            yield start, last
        start = stop


def _tile_pieces(band: Band, start: int, stop: int, keys: int) -> list[Piece]:
    """The pieces of query rows [start, stop), all of which see a key."""
    (low, high), (last_low, last_high) = (
        (band.start(row, keys), band.stop(row, keys)) for row in (start, stop - 1)
    )
    rows = stop - start
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
