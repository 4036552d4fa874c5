"""The definition of dilated attention in plain PyTorch: slow, obvious, any dtype.

One softmax over the multiset union of all branches' keys: a key that m branches offer counts m
times. LongNet (arXiv 2307.02486) writes it as per-branch softmaxes mixed by their denominators
(eq. 9-12) and says that this equals gathering the keys and taking one softmax over all of them.
Memory and time are quadratic in the sequence length; autograd gives the gradient.

Shape suffixes: b batch, i query position, j key position, h query heads, g kv heads, d head_dim,
n branches.
"""

from __future__ import annotations

import math

import torch

from megalong.attention.documents import Documents, RowRanges
from megalong.attention.pattern import DilatedPattern
from megalong.attention.patterns import Band


def dilated_attention_reference(
    q, k, v, pattern, *, causal=True, scale=None, document_start=None, document_stop=None
):
    """Output (batch, sequence, heads, head_dim) and log-sum-exp (batch, heads, sequence).

    Arguments as in dilated_attention. Computes in the inputs' dtype, but at least float32; the
    output has the inputs' dtype. Differentiable by autograd, except for the log-sum-exp, which
    comes detached.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    documents = None if document_start is None else Documents(document_start, document_stop)
    out, lse = forward(q, k, v, pattern, causal=causal, scale=scale, documents=documents)
    return out, lse.detach()


def offered_keys(pattern: DilatedPattern, length, heads, kv_heads, causal, device=None):
    """(branches, heads, length, length) booleans: the branch offers key j to the head's query i."""
    position = torch.arange(length, device=device)
    branches = []
    for (segment_length, rate), offsets in zip(
        pattern.branches, pattern.offsets(heads, kv_heads), strict=True
    ):
        segment = position // segment_length
        same_ij = segment[:, None] == segment
        if causal:
            same_ij = same_ij & (position[:, None] >= position)
        offset_h1 = torch.tensor(offsets, device=device)[:, None]
        takes_part_hi = position % segment_length % rate == offset_h1
        branches.append(same_ij & takes_part_hi[:, :, None] & takes_part_hi[:, None, :])
    return torch.stack(branches)


def softmax_with_multiplicity(scores_bhij, v_bhjd, multiplicity):
    """Attention in which key j stands multiplicity times in the softmax of query i.

    multiplicity: broadcasts to the scores.

    A query without keys gets output 0 and log-sum-exp -inf.
    """
    scores_bhij = scores_bhij.masked_fill(multiplicity == 0, -math.inf)
    largest_bhi = scores_bhij.detach().amax(-1)
    largest_bhi = largest_bhi.masked_fill(largest_bhi == -math.inf, 0.0)
    weights_bhij = multiplicity * torch.exp(scores_bhij - largest_bhi[..., None])
    total_bhi = weights_bhij.sum(-1)
    out_bhid = weights_bhij @ v_bhjd / total_bhi.masked_fill(total_bhi == 0, 1.0)[..., None]
    return out_bhid, largest_bhi + torch.log(total_bhi.detach())


# ------------------------------------------------------------------------------ the backend


def unsupported(device, dtype, head_dim) -> None:
    return None


def forward(q_bihd, k_bjgd, v_bjgd, pattern, *, causal, scale, documents=None):
    multiplicity = _multiplicity(q_bihd, k_bjgd, pattern, causal, documents)
    return _attend(q_bihd, k_bjgd, v_bjgd, multiplicity, scale)


def backward(
    grad_bihd, q_bihd, k_bjgd, v_bjgd, out_bihd, lse_bhi, pattern, *, causal, scale, documents=None
):  # fmt: skip
    multiplicity = _multiplicity(q_bihd, k_bjgd, pattern, causal, documents)
    gradients = _gradients(
        grad_bihd, q_bihd, k_bjgd, v_bjgd, out_bihd, lse_bhi, multiplicity, scale
    )
    return tuple(x.to(q_bihd.dtype) for x in gradients)


def attend_rows(q_bihd, k_bjgd, v_bjgd, band, *, scale, ranges=None):
    return _attend(q_bihd, k_bjgd, v_bjgd, seen_keys(band, q_bihd, k_bjgd, ranges), scale)


def attend_rows_backward(
    grad_bihd, q_bihd, k_bjgd, v_bjgd, out_bihd, lse_bhi, band, *, scale, ranges=None
):  # fmt: skip
    seen = seen_keys(band, q_bihd, k_bjgd, ranges)
    return _gradients(grad_bihd, q_bihd, k_bjgd, v_bjgd, out_bihd, lse_bhi, seen, scale)


def _attend(q_bihd, k_bjgd, v_bjgd, multiplicity, scale):
    q_bhid, k_bhjd, v_bhjd = _per_head(q_bihd, k_bjgd, v_bjgd)
    scores_bhij = q_bhid @ k_bhjd.mT * scale
    out_bhid, lse_bhi = softmax_with_multiplicity(scores_bhij, v_bhjd, multiplicity)
    return out_bhid.transpose(1, 2).to(q_bihd.dtype), lse_bhi


def _multiplicity(q_bihd, k_bjgd, pattern, causal, documents: Documents | None) -> torch.Tensor:
    """How often each key stands in the softmax of each query: (batch or 1, heads, i, j)."""
    length, heads, kv_heads = *q_bihd.shape[1:3], k_bjgd.shape[2]
    times_hij = offered_keys(pattern, length, heads, kv_heads, causal, q_bihd.device).sum(0)
    if documents is None:
        return times_hij[None]
    bounds = (x if x is None else x[:, None] for x in (documents.start_bs, documents.stop_bs))
    return times_hij * keys_in(RowRanges(*bounds), length)


def keys_in(ranges: RowRanges, keys: int) -> torch.Tensor:
    """(batch, heads or 1, query rows, keys) booleans: the key lies in the query's range."""
    start, stop = ranges.start_bhm, ranges.stop_bhm
    key_j = torch.arange(keys, device=(stop if start is None else start).device)
    from_start = True if start is None else start[..., None] <= key_j
    return from_start & (True if stop is None else key_j < stop[..., None])


def seen_keys(band: Band, q_bihd, k_bjgd, ranges: RowRanges | None = None) -> torch.Tensor:
    """(batch or 1, heads or 1, query rows, key rows) booleans: the query sees the key."""
    queries, keys = q_bihd.shape[1], k_bjgd.shape[1]
    ends = [(band.start(row, keys), band.stop(row, keys)) for row in range(queries)]
    start_i1, stop_i1 = torch.tensor(ends, device=q_bihd.device).view(queries, 2, 1).unbind(1)
    key_j = torch.arange(keys, device=q_bihd.device)
    seen_ij = (start_i1 <= key_j) & (key_j < stop_i1)
    return seen_ij[None, None] if ranges is None else seen_ij & keys_in(ranges, keys)


def _gradients(grad_bihd, q_bihd, k_bjgd, v_bjgd, out_bihd, lse_bhi, multiplicity, scale):
    """The gradients that go through these keys: P = exp(scores - lse), dS = P (dP - rowsum(dO O)).

    The merged output sum_j P_j v_j has d out / d score_j = P_j (v_j - out), however many other
    keys there are.
    """
    q_bhid, k_bhjd, v_bhjd = _per_head(q_bihd, k_bjgd, v_bjgd)
    grad_bhid, out_bhid = (x.to(q_bhid.dtype).transpose(1, 2) for x in (grad_bihd, out_bihd))
    scores_bhij = (q_bhid @ k_bhjd.mT * scale).masked_fill(multiplicity == 0, -math.inf)
    lse_bhi = lse_bhi.masked_fill(lse_bhi == -math.inf, math.inf)  # queries without keys
    p_bhij = multiplicity * torch.exp(scores_bhij - lse_bhi[..., None])
    delta_bhi = (grad_bhid * out_bhid).sum(-1)
    ds_bhij = p_bhij * (grad_bhid @ v_bhjd.mT - delta_bhi[..., None]) * scale
    shares = ds_bhij.mT @ q_bhid, p_bhij.mT @ grad_bhid
    dk_bgjd, dv_bgjd = (x.unflatten(1, (k_bjgd.shape[2], -1)).sum(2) for x in shares)
    gradients = ds_bhij @ k_bhjd, dk_bgjd, dv_bgjd
    return tuple(x.transpose(1, 2) for x in gradients)


def _per_head(q_bihd, k_bjgd, v_bjgd):
    """q, k and v as (batch, heads, rows, head_dim), at least float32, keys once for each head."""
    dtype = torch.promote_types(q_bihd.dtype, torch.float32)
    group = q_bihd.shape[2] // k_bjgd.shape[2]
    k_bjhd, v_bjhd = (x.repeat_interleave(group, dim=2) for x in (k_bjgd, v_bjgd))
    return tuple(x.to(dtype).transpose(1, 2) for x in (q_bihd, k_bjhd, v_bjhd))
