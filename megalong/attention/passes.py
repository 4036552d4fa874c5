"""An attention as two functions, forward and backward, and what autograd makes of them.

A layer that computes some heads at a time, and computes q, k and v again on its way back, asks for
one `Passes` for each group of heads, and does autograd's part itself; others call `attend`.

Shape suffixes: b batch, s sequence (the shard's, where it is sharded), h query heads, g kv heads,
d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

Rows = tuple[torch.Tensor, ...]


class Passes(Protocol):
    """What a kind of attention computes for some heads of a layer, or for all.

    A dataclass of the pattern of these heads; the ranks that share a sequence, of which each calls
    the functions with its shard, or None where q, k and v are whole; the options of
    `dilated_attention`: scale, backend, causal; and the documents that are kept apart, of the
    shard's positions with their places in the whole sequence, or None. All layers have the same
    two tensors, since what is made of them is kept. Nothing is recorded by autograd. Shapes, dtypes
    and errors are those of `dilated_attention`.
    """

    @staticmethod
    def subgroup_sizes(pattern: Any, shard: int, ranks: int) -> Iterable[int]:
        """Which numbers of consecutive ranks exchange rows, each with a shard of so many positions:
        the subgroups that `sequence` must have."""
        ...

    def forward(
        self,
        q_bshd: torch.Tensor,
        k_bsgd: torch.Tensor,
        v_bsgd: torch.Tensor,
        kept: Rows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Rows]:
        """Returns out, like q; the log-sum-exp (batch, heads, sequence), at least float32; and what
        `backward` needs besides: the rows of K and V that came from other ranks, so that they come
        once.

        kept: what an earlier call with the same tensors returned; nothing is exchanged then."""
        ...

    def backward(
        self,
        grad_bshd: torch.Tensor,
        q_bshd: torch.Tensor,
        k_bsgd: torch.Tensor,
        v_bsgd: torch.Tensor,
        out_bshd: torch.Tensor,
        lse_bhs: torch.Tensor,
        kept: Rows,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients (dq, dk, dv), in the inputs' dtype, of what `forward` returned."""
        ...


def attend(
    q_bshd: torch.Tensor, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor, passes: Passes
) -> torch.Tensor:
    """The output of an attention, like q, with gradients."""
    return _Attention.apply(q_bshd, k_bsgd, v_bsgd, passes)


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, output, log-sum-exp and the rows of other ranks."""

    @staticmethod
    def forward(ctx, q_bshd, k_bsgd, v_bsgd, passes):
        ctx.passes = passes
        out_bshd, lse_bhs, kept = passes.forward(q_bshd, k_bsgd, v_bsgd)
        ctx.save_for_backward(q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, *kept)
        return out_bshd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_bshd):
        *tensors, lse_bhs = ctx.saved_tensors[:5]
        kept = ctx.saved_tensors[5:]
        return *ctx.passes.backward(grad_bshd, *tensors, lse_bhs, kept), None
