"""Dense attentions of one shape, computed in one call.

`InPlace` takes long ones where they are, on views of q, k and v (a `Part`: `sdpa_blocks`,
`sdpa_bands`). Short ones, which documents cut a sequence into, are copied side by side
(`sdpa_gathered`). Either is a `Call`.

Shape suffixes: b batch, h heads, m query rows, n key rows, f whatever is folded together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megalong.attention.sdpa_operators import attend, attend_backward

LONG = 256  # rows from which on a call of its own is cheaper than copies


class Call(Protocol):
    """q, grad and out (batch, m, heads, head_dim), k and v (batch, n, kv_heads, head_dim), lse
    (batch, m, heads). out, lse and sums are in at least float32."""

    def attend(self, q, k, v, scale: float, out, lse) -> None:
        """Merge this share of the softmax into out and lse, in place."""
        ...

    def attend_backward(self, grad, q, k, v, out, lse, scale: float, sums) -> None:
        """Add this share of the gradients to sums (dq, dk, dv), in place."""
        ...


class Part(Protocol):
    """Dense attentions of one shape.

    first: no other part has written its rows before. head_count: the heads of each.
    """

    first: bool
    head_count: int

    def fold_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Of a tensor like q: (f, heads, rows, ...), copied only where strides forbid a view."""
        ...

    def fold_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Of a tensor like k; one head where all share it."""
        ...

    def view_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor like q, to write to."""
        ...

    def view_keys(self, x: torch.Tensor) -> torch.Tensor: ...

    def unfold(self, x_fhm: torch.Tensor) -> torch.Tensor:
        """A result (f, heads, rows, ...) as the views are."""
        ...

    def sum_shared(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The gradients of keys, unfolded, summed over the heads that share them."""
        ...


@dataclass(frozen=True)
class InPlace:
    """A part, computed where it is."""

    part: Part
    causal: bool

    def results(self, q, k, v, scale: float) -> list[torch.Tensor]:
        """Output and log-sum-exp as the part's views are."""
        folded = self.part.fold_queries(q), self._keys(k), self._keys(v)
        return [self.part.unfold(x) for x in attend(*folded, self.causal, scale)]

    def gradients(self, grad, q, k, v, out, lse, scale: float) -> list[torch.Tensor]:
        """dq, dk and dv as the part's views are."""
        grad, q, out, lse = map(self.part.fold_queries, (grad, q, out, lse))
        found = attend_backward(grad, q, self._keys(k), self._keys(v), out, lse, self.causal, scale)
        return [self.part.unfold(x) for x in found]

    def attend(self, q, k, v, scale: float, out, lse) -> None:
        new_out, new_lse = self.results(q, k, v, scale)
        out, lse = self.part.view_queries(out), self.part.view_queries(lse)
        if self.part.first:
            out.copy_(new_out)
            lse.copy_(new_lse)
        else:
            merge(out, lse, new_out, new_lse)

    def attend_backward(self, grad, q, k, v, out, lse, scale: float, sums) -> None:
        dq, *shares = self.gradients(grad, q, k, v, out, lse, scale)
        self.part.view_queries(sums[0]).add_(dq)
        for x_sums, share in zip(sums[1:], shares, strict=True):
            self.part.view_keys(x_sums).add_(self.part.sum_shared(share, x_sums.dtype))

    def _keys(self, x: torch.Tensor) -> torch.Tensor:
        """With as many heads as the queries."""
        x_fhn = self.part.fold_keys(x)
        return x_fhn.expand(-1, self.part.head_count, *x_fhn.shape[2:])


def merge(out, lse, new_out, new_lse) -> None:
    """Merge a partial softmax into the running one, in place.

    The weight of the new part is e^new / (e^old + e^new) = sigmoid(new - old): 1 where nothing
    was there yet (old = -inf).
    """
    new_lse = new_lse.to(lse.dtype)
    out.lerp_(new_out.to(out.dtype), torch.sigmoid(new_lse - lse)[..., None])
    torch.logaddexp(lse, new_lse, out=lse)
