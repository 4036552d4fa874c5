"""Dilated attention as two functions, forward and backward (`passes.Passes`).

Shape suffixes: b batch, s sequence (the shard's, where it is sharded), h query heads, g kv heads,
d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalong.attention import operators, sequence_parallel
from megalong.attention.dilated import checked_scale
from megalong.attention.documents import Documents, checked_documents
from megalong.attention.exchange import SequenceGroup
from megalong.attention.pattern import DilatedPattern
from megalong.attention.sequence_plan import subgroup_sizes


@dataclass(frozen=True)
class DilatedPasses:
    """Dilated attention of some heads, or of all, of a layer.

    pattern: of these heads alone (`DilatedPattern.for_heads`). sequence: the ranks that share a
    sequence, of which each calls the functions with its shard; None where q, k and v are whole.
    documents: kept apart, of the shard's positions with their places in the whole sequence. The
    others are those of `dilated_attention`.
    """

    pattern: DilatedPattern
    sequence: SequenceGroup | None = None
    scale: float | None = None
    backend: str = "auto"
    causal: bool = True
    documents: Documents | None = None

    subgroup_sizes = staticmethod(subgroup_sizes)

    @torch.no_grad()
    def forward(
        self,
        q_bshd: torch.Tensor,
        k_bsgd: torch.Tensor,
        v_bsgd: torch.Tensor,
        kept: tuple[torch.Tensor, ...] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns out, like q; the log-sum-exp (batch, heads, sequence), at least float32; and what
        `backward` needs besides: the rows of K and V that came from other ranks, so that they come
        once. Shapes, dtypes and errors are those of `dilated_attention`.

        kept: what an earlier call with the same tensors returned; nothing is exchanged then."""
        options = self._options(q_bshd, k_bsgd, v_bsgd)
        if self._sharded:
            return sequence_parallel.forward(
                q_bshd, k_bsgd, v_bsgd, self.pattern, self.sequence, kept=kept, **options
            )
        return *operators.forward(q_bshd, k_bsgd, v_bsgd, self.pattern, **options), ()

    @torch.no_grad()
    def backward(
        self,
        grad_bshd: torch.Tensor,
        q_bshd: torch.Tensor,
        k_bsgd: torch.Tensor,
        v_bsgd: torch.Tensor,
        out_bshd: torch.Tensor,
        lse_bhs: torch.Tensor,
        kept: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients (dq, dk, dv), in the inputs' dtype, of what `forward` returned."""
        options = self._options(q_bshd, k_bsgd, v_bsgd)
        tensors = (grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs)
        if self._sharded:
            return sequence_parallel.backward(
                *tensors, kept, self.pattern, self.sequence, **options
            )
        return operators.backward(*tensors, self.pattern, **options)

    @property
    def _sharded(self) -> bool:
        return self.sequence is not None and self.sequence.size > 1

    def _options(self, q_bshd, k_bsgd, v_bsgd) -> dict:
        scale = checked_scale(q_bshd, k_bsgd, v_bsgd, self.pattern, self.scale)
        documents = checked_documents(self.documents, q_bshd, self.causal)
        options = {"causal": self.causal, "scale": scale, "backend": self.backend}
        return {**options, "documents": documents}
