"""Dilated attention: the public function, its autograd and its checks.

Shape suffixes: b batch, s sequence, h query heads, g kv heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megalong.attention import operators
from megalong.attention.arguments import checked
from megalong.attention.documents import checked_documents, copied, documents_of
from megalong.attention.pattern import DilatedPattern


def dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
    document_start: torch.Tensor | None = None,
    document_stop: torch.Tensor | None = None,
    return_lse: bool = False,
):
    """Dilated attention (LongNet, arXiv 2307.02486, eq. 2-15): linear in the sequence length.

    Every query takes ONE softmax over the multiset union of the keys that the branches of the
    pattern offer it: a key that m branches offer counts m times. This equals the paper's
    per-branch softmaxes mixed by their denominators (eq. 9-12). A query that takes part in no
    branch gets output 0 and log-sum-exp -inf.

    q: (batch, sequence, heads, head_dim); float64, float32, bfloat16 or float16, any strides.
    k, v: (batch, sequence, kv_heads, head_dim), heads a multiple of kv_heads; q head h
        reads kv head h // (heads / kv_heads).
    pattern: segment lengths, dilation rates and head offsets.
    causal: a query sees only keys at its own position and before.
    scale: factor on the scores, positive; None is head_dim ** -0.5.
    backend: "triton", "sdpa", "reference", or "auto", the first of the first two that can run.
    document_start, document_stop: int32 (batch, sequence), for documents that are kept apart: for
        each position the place in the sequence of the first position of its own document, and the
        place after the last. A query sees no key of another document; segments and offsets keep
        their places in the sequence. Where attention is causal, document_start is enough.
    return_lse: also return the log-sum-exp.

    Returns out, like q in shape and dtype; with return_lse (out, lse), lse (batch, heads,
    sequence) in natural units and float32 (float64 for float64 inputs). lse is not
    differentiable, in any backend. Raises ValueError naming the argument to change.
    """
    scale = checked_scale(q, k, v, pattern, scale)
    # torch.compile takes no tensor twice in one autograd.Function.
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is k else v
    given = documents_of(document_start, document_stop)
    documents = copied(checked_documents(given, q, causal))
    bounds = (documents.start_bs, documents.stop_bs) if documents else (None, None)
    out_bshd, lse_bhs = _DilatedAttention.apply(
        q, k, v, *bounds, pattern, bool(causal), scale, backend
    )
    return (out_bshd, lse_bhs) if return_lse else out_bshd


class _DilatedAttention(torch.autograd.Function):
    """Keeps q, k, v, output and log-sum-exp; every backend recomputes the rest."""

    @staticmethod
    def forward(ctx, q, k, v, document_start, document_stop, pattern, causal, scale, backend):
        ctx.pattern = pattern
        ctx.options = {"causal": causal, "scale": scale, "backend": backend}
        documents = documents_of(document_start, document_stop)
        out, lse = operators.forward(q, k, v, pattern, documents=documents, **ctx.options)
        ctx.save_for_backward(q, k, v, out, lse, document_start, document_stop)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        *tensors, document_start, document_stop = ctx.saved_tensors
        documents = documents_of(document_start, document_stop)
        gradients = operators.backward(
            grad_out, *tensors, ctx.pattern, documents=documents, **ctx.options
        )
        return (*gradients, *[None] * 6)


def checked_scale(q, k, v, pattern, scale) -> float:
    """The scale to compute with. Raises ValueError naming the argument to change."""
    scale = checked(q, k, v, scale)
    if not isinstance(pattern, DilatedPattern):
        raise ValueError(f"pattern must be a DilatedPattern, got {type(pattern).__name__}")
    pattern.offsets(q.shape[2], k.shape[2])  # a table must fit the heads
    return scale
