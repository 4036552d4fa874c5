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
from megalong.attention.sdpa_calls import Call, in_calls
from megalong.attention.sdpa_documents import calls_within
from megalong.attention.tensor_cache import PATTERNS, has_numbers

# ------------------------------------------------------------------------------ the backend


def unsupported(device, dtype, head_dim) -> None:
    return None


def forward(q_bshd, k_bsgd, v_bsgd, pattern, *, causal, scale, documents=None):
    q_bshd, k_bsgd, v_bsgd = map(_dense_rows, (q_bshd, k_bsgd, v_bsgd))
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)
    plan = _plan(q_bshd, k_bsgd, pattern, documents)

    if not _begins_whole(plan):
        out_bshd = q_bshd.new_zeros(q_bshd.shape, dtype=dtype)
        lse_bsh = q_bshd.new_full(q_bshd.shape[:3], -torch.inf, dtype=dtype)
    for call in plan:
        for block, out_bcnhd, lse_bcnh in call.attend(q_bshd, k_bsgd, v_bsgd, causal, scale):
            if block.whole:  # its result becomes the running one
                out_bshd = out_bcnhd.reshape(q_bshd.shape).to(dtype)
                lse_bsh = lse_bcnh.reshape(q_bshd.shape[:3])
                continue
            out, lse = block.view_queries(out_bshd), block.view_queries(lse_bsh)
            if block.first:
                out.copy_(out_bcnhd)
                lse.copy_(lse_bcnh)
            else:
                _merge(out, lse, out_bcnhd.to(dtype), lse_bcnh)
    return out_bshd.to(q_bshd.dtype), lse_bsh.transpose(1, 2)


def backward(
    grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, pattern, *, causal, scale, documents=None
):  # fmt: skip
    q_bshd, k_bsgd, v_bsgd, grad_bshd = map(_dense_rows, (q_bshd, k_bsgd, v_bsgd, grad_bshd))
    lse_bsh = lse_bhs.transpose(1, 2)
    inputs = (q_bshd, k_bsgd, v_bsgd)
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)
    plan = _plan(q_bshd, k_bsgd, pattern, documents)

    adopts = _begins_whole(plan) and q_bshd.shape[2] == k_bsgd.shape[2]
    if not adopts:
        totals = [x.new_zeros(x.shape, dtype=dtype) for x in inputs]
    for call in plan:
        for block, *parts in call.attend_backward(
            grad_bshd, *inputs, out_bshd, lse_bsh, causal, scale
        ):
            if block.whole and adopts:
                totals = [
                    part.reshape(x.shape).to(dtype) for part, x in zip(parts, inputs, strict=True)
                ]
            else:
                dq_bcnhd, dk_bcnhd, dv_bcnhd = parts
                block.view_queries(totals[0]).add_(dq_bcnhd)
                block.view_keys(totals[1]).add_(block.sum_shared(dk_bcnhd, dtype))
                block.view_keys(totals[2]).add_(block.sum_shared(dv_bcnhd, dtype))
    return tuple(total.to(q_bshd.dtype) for total in totals)


def attend_rows(q_bmhd, k_bngd, v_bngd, band, *, scale, ranges=None):
    q_bmhd, k_bngd, v_bngd = map(_dense_rows, (q_bmhd, k_bngd, v_bngd))
    out_bhmd, lse_bhm = attend_band(*_per_head(q_bmhd, k_bngd, v_bngd), band, scale, ranges)
    return out_bhmd.transpose(1, 2).to(q_bmhd.dtype), lse_bhm


def attend_rows_backward(
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm, band, *, scale, ranges=None
):  # fmt: skip
    grad_bmhd, q_bmhd, k_bngd, v_bngd = map(_dense_rows, (grad_bmhd, q_bmhd, k_bngd, v_bngd))
    grad_bhmd, out_bhmd = grad_bmhd.transpose(1, 2), out_bmhd.transpose(1, 2)
    dq_bhmd, *shares = attend_band_backward(
        grad_bhmd, *_per_head(q_bmhd, k_bngd, v_bngd), out_bhmd, lse_bhm, band, scale, ranges
    )
    kv_heads = k_bngd.shape[2]
    dk_bgnd, dv_bgnd = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in shares)
    return dq_bhmd.transpose(1, 2), dk_bgnd.transpose(1, 2), dv_bgnd.transpose(1, 2)


def _plan(q_bshd, k_bsgd, pattern, documents) -> tuple[Call, ...]:
    if not q_bshd.numel():
        return ()
    sizes = (*q_bshd.shape[1:3], k_bsgd.shape[2])
    if documents is None or not has_numbers(documents.start_bs):
        return _calls(pattern, *sizes)
    return calls_within(documents.start_bs, pattern, *sizes)


@lru_cache(maxsize=PATTERNS)
def _calls(pattern, length: int, heads: int, kv_heads: int) -> tuple[Call, ...]:
    return in_calls(blocks(pattern, length, heads, kv_heads))


def _begins_whole(plan: tuple[Call, ...]) -> bool:
    """What comes first is every row of every head."""
    return bool(plan) and plan[0].parts[0].whole


def _per_head(q_bmhd, k_bngd, v_bngd):
    """q, k and v as (batch, heads, rows, head_dim), the keys of a group repeated for its heads."""
    group = q_bmhd.shape[2] // k_bngd.shape[2]
    k_bnhd, v_bnhd = (x.repeat_interleave(group, dim=2) for x in (k_bngd, v_bngd))
    return tuple(x.transpose(1, 2) for x in (q_bmhd, k_bnhd, v_bnhd))


def _dense_rows(x_bshd):
    """The operators want the numbers of a row side by side; every other stride is free."""
    return x_bshd if x_bshd.stride(-1) == 1 else x_bshd.contiguous()


def _merge(out_bcnhd, lse_bcnh, new_out_bcnhd, new_lse_bcnh):
    """Merge a partial softmax into the running one, in place.

    The weight of the new part is e^new / (e^old + e^new) = sigmoid(new - old): 1 where nothing
    was there yet (old = -inf).
    """
    out_bcnhd.lerp_(new_out_bcnhd, torch.sigmoid(new_lse_bcnh - lse_bcnh)[..., None])
    torch.logaddexp(lse_bcnh, new_lse_bcnh, out=lse_bcnh)
