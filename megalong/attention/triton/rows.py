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


def attend_rows(q_bmhd, k_bngd, v_bngd, *, causal: bool, query_shift: int, scale: float):
    """Output like q and log-sum-exp (batch, heads, query rows), float32 (float64 for float64).

    q: (batch, query rows, heads, head_dim); k, v: (batch, key rows, kv_heads, head_dim); any
    strides. causal: query row i sees the key rows j <= i + query_shift: with the first query at
    sparse index a of its segment and the first key at b, query_shift is a - b. It may be negative;
    a query without keys gets output 0 and log-sum-exp -inf. Not differentiable.
    """
    q_bmhd, k_bngd, v_bngd = map(dense_rows, (q_bmhd, k_bngd, v_bngd))
    batch, queries, heads, head_dim = q_bmhd.shape
    keys, kv_heads = k_bngd.shape[1:3]
    out_bmhd = empty_rows(q_bmhd)
    lse_bhm = q_bmhd.new_empty(batch, heads, queries, dtype=accumulator(q_bmhd.dtype))
    if not q_bmhd.numel() or not k_bngd.numel():
        return out_bmhd.zero_(), lse_bhm.fill_(-torch.inf)
    launch_forward(
        one_segment(queries, heads, kv_heads, q_bmhd.device), True, "merge",
        q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm,
        q_bmhd.new_empty(batch, heads, 0, head_dim), lse_bhm.new_empty(batch, heads, 0),
        causal=causal, scale=scale, gathered_keys=keys, shift=query_shift,
    )  # fmt: skip
    return out_bmhd, lse_bhm


def attend_rows_backward(
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm, *, causal: bool, query_shift: int,
    scale: float,
):  # fmt: skip
    """Shares of the gradients of q, k and v, from the output and log-sum-exp of all parts."""
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd = map(
        dense_rows, (grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd)
    )
    lse_bhm = lse_bhm.contiguous()
    batch, queries, heads, head_dim = q_bmhd.shape
    keys, kv_heads = k_bngd.shape[1:3]
    dq_bmhd, dk_bngd, dv_bngd = gradients = [empty_rows(x) for x in (q_bmhd, k_bngd, v_bngd)]
    if not q_bmhd.numel() or not k_bngd.numel():
        return tuple(x.zero_() for x in gradients)
    inputs = (q_bmhd, k_bngd, v_bngd, grad_bmhd, lse_bhm, launch_delta(out_bmhd, grad_bmhd))
    options = {"causal": causal, "scale": scale, "shift": query_shift}
    launch_dq(
        one_segment(queries, heads, kv_heads, q_bmhd.device), True, *inputs, dq_bmhd,
        lse_bhm.new_empty(batch, heads, 0, head_dim), **options, gathered_keys=keys,
    )  # fmt: skip
    nothing = lse_bhm.new_empty(batch, kv_heads, 1, 0, head_dim)
    launch_dkdv(
        one_segment(keys, heads, kv_heads, q_bmhd.device), True, *inputs, dk_bngd, dv_bngd,
        nothing, nothing, **options, gathered_queries=queries,
    )  # fmt: skip
    return dq_bmhd, dk_bngd, dv_bngd


def one_segment(rows: int, heads: int, kv_heads: int, device: torch.device) -> Tables:
    """The tables of rows that are all neighbours and belong together."""
    return pattern_tables(DilatedPattern((rows,), (1,)), rows, heads, kv_heads, None, device)
