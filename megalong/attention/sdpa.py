"""The PyTorch backend: dense attention on strided views, merged by log-sum-exp.

Inside one segment the rows that take part form a smaller sequence whose neighbours lie r rows
apart, and on it dilated attention is plain dense attention. So nothing is gathered: `sdpa_blocks`
cuts a pattern into a few blocks, each of which is one strided view (batch, segments, rows, heads,
head_dim) of q, k and v, and a dense attention that also returns its log-sum-exp runs on each. Where
documents are kept apart, `sdpa_documents` cuts the blocks further.

Forward: partial results are merged into one running output and log-sum-exp (LongNet, arXiv
2307.02486, eq. 9-12). Backward: with the MERGED output and log-sum-exp, each block's own backward
gives its share of the exact gradient, P = exp(s - lse) and dS = P * (dP - rowsum(dO * O)); the
shares only add. Only q, k, v, output and log-sum-exp are kept between the two.

Shape suffixes: b batch, s sequence, h query heads, g kv heads, d head_dim, c segments of a block,
n rows of a segment, f batch and segments folded together.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from megalong.attention.sdpa_bands import attend_band, attend_band_backward
from megalong.attention.sdpa_blocks import blocks
from megalong.attention.sdpa_calls import Call, InPlace
from megalong.attention.sdpa_documents import calls_within
from megalong.attention.sdpa_gathered import prepared
from megalong.attention.tensor_cache import PATTERNS, has_numbers

# ------------------------------------------------------------------------------ the backend


def unsupported(device, dtype, head_dim) -> None:
    return None


def forward(q_bshd, k_bsgd, v_bsgd, pattern, *, causal, scale, documents=None):
    calls = _plan(q_bshd, k_bsgd, pattern, causal, documents)
    q_bshd, k_bsgd, v_bsgd = inputs = prepared(calls, q_bshd, k_bsgd, v_bsgd)
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)

    if _begins_whole(calls):  # its result becomes the running one
        out_bcnhd, lse_bcnh = calls[0].results(*inputs, scale)
        out_bshd = out_bcnhd.reshape(q_bshd.shape).to(dtype)
        out_bshd, lse_bsh = prepared(calls, out_bshd, lse_bcnh.reshape(q_bshd.shape[:3]))
        calls = calls[1:]
    else:
        out_bshd = q_bshd.new_zeros(q_bshd.shape, dtype=dtype)
        lse_bsh = q_bshd.new_full(q_bshd.shape[:3], -torch.inf, dtype=dtype)
    for call in calls:
        call.attend(*inputs, scale, out_bshd, lse_bsh)
    return out_bshd.to(q_bshd.dtype), lse_bsh.transpose(1, 2)


def backward(
    grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, pattern, *, causal, scale, documents=None
):  # fmt: skip
    calls = _plan(q_bshd, k_bsgd, pattern, causal, documents)
    lse_bsh = lse_bhs.transpose(1, 2)
    given = prepared(calls, grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bsh)
    q_bshd, k_bsgd, v_bsgd = inputs = given[1:4]
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)

    if _begins_whole(calls) and q_bshd.shape[2] == k_bsgd.shape[2]:
        parts = calls[0].gradients(*given, scale)
        totals = [part.reshape(x.shape).to(dtype) for part, x in zip(parts, inputs, strict=True)]
        totals, calls = prepared(calls, *totals), calls[1:]
    else:
        totals = [x.new_zeros(x.shape, dtype=dtype) for x in inputs]
    for call in calls:
        call.attend_backward(*given, scale, totals)
    return tuple(total.to(q_bshd.dtype) for total in totals)


def attend_rows(q_bmhd, k_bngd, v_bngd, band, *, scale, ranges=None):
    k_bnhd, v_bnhd = _per_head(q_bmhd, k_bngd, v_bngd)
    out_bmhd, lse_bmh = attend_band(q_bmhd, k_bnhd, v_bnhd, band, scale, ranges)
    return out_bmhd.to(q_bmhd.dtype), lse_bmh.transpose(1, 2)


def attend_rows_backward(
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm, band, *, scale, ranges=None
):  # fmt: skip
    k_bnhd, v_bnhd = _per_head(q_bmhd, k_bngd, v_bngd)
    dq_bmhd, *shares = attend_band_backward(
        grad_bmhd, q_bmhd, k_bnhd, v_bnhd, out_bmhd, lse_bhm.transpose(1, 2), band, scale, ranges
    )
    kv_heads = k_bngd.shape[2]
    return dq_bmhd, *(x.unflatten(2, (kv_heads, -1)).sum(3) for x in shares)


def _plan(q_bshd, k_bsgd, pattern, causal: bool, documents) -> tuple[Call, ...]:
    if not q_bshd.numel():
        return ()
    sizes = (*q_bshd.shape[1:3], k_bsgd.shape[2], bool(causal))
    if documents is None or not has_numbers(documents.start_bs):
        return _calls(pattern, *sizes)
    return calls_within(documents.start_bs, pattern, *sizes)


@lru_cache(maxsize=PATTERNS)
def _calls(pattern, length: int, heads: int, kv_heads: int, causal: bool) -> tuple[Call, ...]:
    return tuple(InPlace(block, causal) for block in blocks(pattern, length, heads, kv_heads))


def _begins_whole(calls: tuple[Call, ...]) -> bool:
    """What comes first is every row of every head."""
    return bool(calls) and isinstance(calls[0], InPlace) and calls[0].part.whole


def _per_head(q_bmhd, k_bngd, v_bngd):
    """k and v as (batch, rows, heads, head_dim), those of a group repeated for its heads."""
    group = q_bmhd.shape[2] // k_bngd.shape[2]
    return (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k_bngd, v_bngd))
