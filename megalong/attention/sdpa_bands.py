"""A band of (query row, key row) pairs as a few dense attentions, on PyTorch's operators.

The pairs are cut into rectangles and triangles (`sdpa_pieces`), so that no mask is ever built.
Tiles that look alike are folded into one batch. Where queries have ranges of their own, those that
share one are cut into pieces by themselves, and short pieces are computed side by side. The parts
are merged by log-sum-exp.

Shape suffixes: b batch, m query rows, n key rows, h heads, d head_dim, f batch and tiles folded
together.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from megalong.attention.band import Band
from megalong.attention.documents import RowRanges
from megalong.attention.sdpa_calls import LONG, Call, InPlace
from megalong.attention.sdpa_gathered import Pieces, gathered, prepared
from megalong.attention.sdpa_pieces import (
    ALL,
    GROWS,
    SHRINKS,
    Piece,
    Runs,
    Table,
    pieces,
    tables,
)
from megalong.attention.tensor_cache import PATTERNS, has_numbers, kept_with_tensor


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
