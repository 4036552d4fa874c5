"""Attention of rows to other rows: what the sequence axis and the bands are made of.

A rank that holds a slice of a sequence attends, in a long branch, to the compact rows that it
gathered from other ranks. Queries may be strided views of the local tensor (every r-th row), keys
are neighbouring rows; of these each query sees those of its band that lie in its range, if it has
one. The parts merge by log-sum-exp, and their gradients add, given the merged output and
log-sum-exp.

Shape suffixes: b batch, m query rows, n key rows, h query heads, g kv heads, d head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from megalong.attention.band import Band
from megalong.attention.pattern import DilatedPattern
from megalong.attention.strides import dense_rows, empty_rows
from megalong.attention.tensor_cache import PATTERNS
from megalong.attention.triton.launch import (
    accumulator,
    launch_delta,
    launch_dkdv,
    launch_dq,
    launch_forward,
)
from megalong.attention.triton.ranges import keys_in_ranges, queries_in_ranges
from megalong.attention.triton.tables import Tables, pattern_tables


def attend_rows(q_bmhd, k_bngd, v_bngd, band: Band, *, scale: float, ranges=None):
    q_bmhd, k_bngd, v_bngd = map(dense_rows, (q_bmhd, k_bngd, v_bngd))
    (batch, queries, heads, head_dim), kv_heads = q_bmhd.shape, k_bngd.shape[2]
    out_bmhd = empty_rows(q_bmhd)
    lse_bhm = q_bmhd.new_empty(batch, heads, queries, dtype=accumulator(q_bmhd.dtype))
    if not q_bmhd.numel() or not k_bngd.numel():
        return out_bmhd.zero_(), lse_bhm.fill_(-torch.inf)
    launch_forward(
        one_segment(queries, heads, kv_heads, q_bmhd.device), True,
        q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm,
        q_bmhd.new_empty(batch, heads, 0, head_dim), lse_bhm.new_empty(batch, heads, 0),
        causal=False, scale=scale, gathered=True, band=band_tensor(band, q_bmhd, k_bngd),
        ranges=keys_in_ranges(ranges),
    )  # fmt: skip
    return out_bmhd, lse_bhm


def attend_rows_backward(
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm, band: Band, *, scale: float, ranges=None
):  # fmt: skip
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd = map(
        dense_rows, (grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd)
    )
    lse_bhm = lse_bhm.contiguous()
    batch, queries, heads, head_dim = q_bmhd.shape
    keys, kv_heads = k_bngd.shape[1:3]
    gradients = [empty_rows(x, lse_bhm.dtype) for x in (q_bmhd, k_bngd, v_bngd)]
    dq_bmhd, dk_bngd, dv_bngd = gradients
    if not q_bmhd.numel() or not k_bngd.numel():
        return tuple(x.zero_() for x in gradients)
    inputs = (q_bmhd, k_bngd, v_bngd, grad_bmhd, lse_bhm, launch_delta(out_bmhd, grad_bmhd))
    options = {"causal": False, "scale": scale, "gathered": True}
    options["band"] = band_tensor(band, q_bmhd, k_bngd)
    launch_dq(
        one_segment(queries, heads, kv_heads, q_bmhd.device), True, *inputs, dq_bmhd,
        lse_bhm.new_empty(batch, heads, 0, head_dim), ranges=keys_in_ranges(ranges), **options,
    )  # fmt: skip
    nothing = lse_bhm.new_empty(batch, kv_heads, 1, 0, head_dim)
    launch_dkdv(
        one_segment(keys, heads, kv_heads, q_bmhd.device), True, *inputs, dk_bngd, dv_bngd,
        nothing, nothing, ranges=queries_in_ranges(ranges, keys), **options,
    )  # fmt: skip
    return dq_bmhd, dk_bngd, dv_bngd


def one_segment(rows: int, heads: int, kv_heads: int, device: torch.device) -> Tables:
    """The tables of rows that are all neighbours and belong together."""
    return pattern_tables(DilatedPattern((rows,), (1,)), rows, heads, kv_heads, device)


def band_tensor(band: Band, q_bmhd, k_bngd) -> torch.Tensor | None:
    """What the kernels read of a band; None where all queries see all keys."""
    if band.sees_all:
        return None
    return _band_tensor(band, q_bmhd.shape[1], k_bngd.shape[1], q_bmhd.device)


@lru_cache(maxsize=PATTERNS)
def _band_tensor(band: Band, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """before, after, first, query_block and key_block, int32: clipped to what makes a difference,
    so that the kernels' arithmetic stays within 32 bits."""
    most_before = (band.first + queries) // band.query_block + 1
    most_after = -(-keys // band.key_block) + 1
    before = most_before if band.before is None else min(band.before, most_before)
    after = most_after if band.after is None else min(band.after, most_after)
    values = (before, after, band.first, band.query_block, band.key_block)
    return torch.tensor(values, dtype=torch.int32).to(device)
