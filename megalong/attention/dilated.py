"""Dilated attention: the public functions, on a whole sequence and on a sharded one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalong.attention import operators, sequence_parallel
from megalong.attention.documents import checked_documents, copied, documents_of
from megalong.attention.exchange import SequenceGroup
from megalong.attention.passes import Passes, attend_with_lse
from megalong.attention.pattern import DilatedPattern
from megalong.attention.sequence_plan import subgroup_sizes


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
    return sequence_parallel_attention(
        q, k, v, pattern, None, causal=causal, scale=scale, backend=backend,
        document_start=document_start, document_stop=document_stop, return_lse=return_lse,
    )  # fmt: skip


def sequence_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    sequence: SequenceGroup | None,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
    document_start: torch.Tensor | None = None,
    document_stop: torch.Tensor | None = None,
    return_lse: bool = False,
):
    """`dilated_attention` of this rank's queries within the whole sequence.

    Called by all ranks of the sequence group, with shards of equal length: rank p holds the
    positions [p l, (p + 1) l). Equals the slice of dilated_attention on the whole sequence, for
    any pattern; nothing is approximated. The bytes that go over the network are in `sequence_plan`.

    q: (batch, shard, heads, head_dim); k, v: (batch, shard, kv_heads, head_dim).
    sequence: the ranks; its subgroups must hold the sizes `sequence_plan.subgroup_sizes`.
    document_start, document_stop: of the shard's positions, with places in the whole sequence.
    The other arguments, the results and the errors are those of dilated_attention.
    """
    given = documents_of(document_start, document_stop)
    documents = copied(checked_documents(given, q, causal))
    passes = DilatedPasses(pattern, sequence, scale, backend, bool(causal), documents)
    out, lse = attend_with_lse(q, k, v, passes)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class DilatedPasses(Passes):
    """Dilated attention of some heads, or of all, of a layer."""

    subgroup_sizes = staticmethod(subgroup_sizes)

    def forward(self, q_bshd, k_bsgd, v_bsgd, kept: tuple[torch.Tensor, ...] | None = None):
        options, inputs = self.options(q_bshd, k_bsgd, v_bsgd), (q_bshd, k_bsgd, v_bsgd)
        with torch.no_grad():
            if not self.sharded:
                return *operators.forward(*inputs, self.pattern, **options), ()
            return sequence_parallel.forward(
                *inputs, self.pattern, self.sequence, kept=kept, **options
            )

    def backward(self, grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, kept):
        options = self.options(q_bshd, k_bsgd, v_bsgd)
        tensors = (grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs)
        with torch.no_grad():
            if not self.sharded:
                return operators.backward(*tensors, self.pattern, **options)
            return sequence_parallel.backward(
                *tensors, kept, self.pattern, self.sequence, **options
            )

    def options(self, q_bshd, k_bsgd, v_bsgd) -> dict:
        options = Passes.options(self, q_bshd, k_bsgd, v_bsgd)
        if not isinstance(self.pattern, DilatedPattern):
            raise ValueError(f"pattern must be a DilatedPattern, got {type(self.pattern).__name__}")
        self.pattern.offsets(q_bshd.shape[2], k_bsgd.shape[2])  # a table must fit the heads
        documents = checked_documents(self.documents, q_bshd, self.causal)
        return {**options, "causal": self.causal, "documents": documents}
