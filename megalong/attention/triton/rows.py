"""Dense attention of local queries to gathered keys: what the sequence axis is made of.

A rank that holds a slice of a sequence attends, in a long branch, to the compact rows that it
gathered from other ranks. Queries may be strided views of the local tensor (every r-th row), keys
are neighbouring rows. The parts merge by log-sum-exp, and their gradients add, given the merged
output and log-sum-exp.

Shape suffixes: b batch, m query rows, n key rows, h query heads, g kv heads, d head_dim.
"""

from __future__ import annotations

import torch

from megalong.attention.pattern import DilatedPattern
from megalong.attention.strides import dense_rows, empty_rows
from megalong.attention.triton.launch import (
    accumulator,
    launch_delta,
    launch_dkdv,
    launch_dq,
    launch_forward,
)
from megalong.attention.triton.tables import Tables, pattern_tables


def attend_rows(q_bmhd, k_bngd, v_bngd, *, scale: float):
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
        causal=False, scale=scale, gathered=True,
    )  # fmt: skip
    return out_bmhd, lse_bhm


def attend_rows_backward(grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm, *, scale: float):
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
    launch_dq(
        one_segment(queries, heads, kv_heads, q_bmhd.device), True, *inputs, dq_bmhd,
        lse_bhm.new_empty(batch, heads, 0, head_dim), **options,
    )  # fmt: skip
    nothing = lse_bhm.new_empty(batch, kv_heads, 1, 0, head_dim)
    launch_dkdv(
        one_segment(keys, heads, kv_heads, q_bmhd.device), True, *inputs, dk_bngd, dv_bngd,
        nothing, nothing, **options,
    )  # fmt: skip
    return dq_bmhd, dk_bngd, dv_bngd


def one_segment(rows: int, heads: int, kv_heads: int, device: torch.device) -> Tables:
    """The tables of rows that are all neighbours and belong together."""
    return pattern_tables(DilatedPattern((rows,), (1,)), rows, heads, kv_heads, device)
