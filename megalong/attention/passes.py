"""An attention as two functions, forward and backward, and what autograd makes of them.

A layer that computes some heads at a time, and computes q, k and v again on its way back, asks for
one `Passes` for each group of heads, and does autograd's part itself; others call `attend`.

Shape suffixes: b batch, s sequence (the shard's, where it is sharded), h query heads, g kv heads,
d head_dim, n rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megalong.attention.documents import Documents
from megalong.attention.exchange import SequenceGroup
from megalong.attention.tensors import checked

Rows = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Passes:
    """Base class of what a kind of attention computes for some heads of a layer, or for all.

    pattern: of these heads alone (`for_heads`). sequence: the ranks that share a sequence, of which
    each calls the functions with its shard; None where q, k and v are whole. documents: kept apart,
    of the shard's positions with their places in the whole sequence. All layers have the same two
    tensors, since what is made of them is kept. The others are those of `dilated_attention`, as are
    shapes, dtypes and errors. Nothing is recorded by autograd.
    """

    pattern: Any
    sequence: SequenceGroup | None = None
    scale: float | None = None
    backend: str = "auto"
    causal: bool = True
    documents: Documents | None = None

    @staticmethod
    def subgroup_sizes(pattern: Any, shard: int, ranks: int) -> Iterable[int]:
        """Return the numbers of consecutive ranks that exchange rows, each with a shard of so many
        positions: the subgroups that `sequence` must have."""
        return ()

    def forward(
        self,
        q_bshd: torch.Tensor,
        k_bsgd: torch.Tensor,
        v_bsgd: torch.Tensor,
        kept: Rows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Rows]:
        """Return out, like q; the log-sum-exp (batch, heads, sequence), at least float32; and what
        `backward` needs besides: the rows of K and V that came from other ranks, so that they come
        once.

        kept: what an earlier call with the same tensors returned; nothing is exchanged then."""
        raise NotImplementedError

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
        """Return the gradients (dq, dk, dv), in the inputs' dtype, of what `forward` returned."""
        raise NotImplementedError

    @property
    def sharded(self) -> bool:
        """Whether other ranks hold parts of the sequence."""
        return self.sequence is not None and self.sequence.size > 1

    def options(self, q_bshd, k_bsgd, v_bsgd) -> dict:
        """Return what every operator takes by name. Raises ValueError as `tensors.checked`."""
        return {"scale": checked(q_bshd, k_bsgd, v_bsgd, self.scale), "backend": self.backend}


def attend(
    q_bshd: torch.Tensor, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor, passes: Passes
) -> torch.Tensor:
    """Return the output of an attention, like q, with gradients."""
    return attend_with_lse(q_bshd, k_bsgd, v_bsgd, passes)[0]


def attend_with_lse(q_bshd, k_bsgd, v_bsgd, passes: Passes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output with gradients, and the log-sum-exp, which is not differentiable."""
    # torch.compile takes no tensor twice in one autograd.Function.
    k_bsgd = k_bsgd.view_as(k_bsgd) if k_bsgd is q_bshd else k_bsgd
    v_bsgd = v_bsgd.view_as(v_bsgd) if v_bsgd is q_bshd or v_bsgd is k_bsgd else v_bsgd
    return _Attention.apply(q_bshd, k_bsgd, v_bsgd, passes)


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, output, log-sum-exp and the rows of other ranks; the rest is recomputed."""

    @staticmethod
    def forward(ctx, q_bshd, k_bsgd, v_bsgd, passes):
        ctx.passes = passes
        out_bshd, lse_bhs, kept = passes.forward(q_bshd, k_bsgd, v_bsgd)
        ctx.save_for_backward(q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, *kept)
        ctx.mark_non_differentiable(lse_bhs)
        return out_bshd, lse_bhs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_bshd, _):
        saved = ctx.saved_tensors  # once: recomputation unpacks a tensor a single time
        tensors, kept = saved[:5], saved[5:]
        return *ctx.passes.backward(grad_bshd, *tensors, kept), None


def merge(out_bnd, lse_bn, new_out_bnd, new_lse_bn):
    """Merge two softmaxes over different keys (eq. 9-12); absent ones have log-sum-exp -inf."""
    # A backend's order of axes must not show: numbers side by side in memory are computed in
    # vectors, with other last bits than one by one.
    new_lse_bn = new_lse_bn.contiguous()
    # e^new / (e^old + e^new), and 0 where there is nothing on either side
    weight_bn = torch.sigmoid(new_lse_bn - lse_bn).nan_to_num(0.0)
    merged_bnd = torch.lerp(out_bnd, new_out_bnd.to(out_bnd.dtype), weight_bn[..., None])
    return merged_bnd, torch.logaddexp(lse_bn, new_lse_bn)
