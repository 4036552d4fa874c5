"""A module's parameters as a tuple of tensors, and the sums of their gradients over tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megalong.model.chunked.rows import add_weight_gradient, wide


class Norm(NamedTuple):
    """Which norm it is: its kind and epsilon, as `megalong.model.chunked.norms.norm` takes them."""

    kind: str
    eps: float


class MLPWeights(NamedTuple):
    """Norm and MLP; this tensor rank's part. What there is none of is None.

    norm_weight, norm_bias: (hidden,). in_weight: (inner, hidden), for a gated activation the gate
    above the rest; in_bias: (inner,). out_weight: (hidden, inner or half of it); out_bias:
    (hidden,). out_norm_*: of the norm before the second matrix, as long as its rows.
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor | None
    in_weight: torch.Tensor
    in_bias: torch.Tensor | None
    out_weight: torch.Tensor
    out_bias: torch.Tensor | None
    out_norm_weight: torch.Tensor | None = None
    out_norm_bias: torch.Tensor | None = None


class AttentionWeights(NamedTuple):
    """Norm, projections and the norms of each head's queries and keys; this tensor rank's part.
    What there is none of is None.

    norm_weight, norm_bias: (hidden,). qkv_weight: (rows, hidden), for each kv head those of its
    query heads, of its key and of its value, head_dim each; qkv_bias: (rows,). q_norm_*, k_norm_*:
    (head_dim,). out_weight: (hidden, heads * head_dim); out_bias: (hidden,). out_norm_*: of the
    norm before the output projection, (heads * head_dim,).
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor | None
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm_weight: torch.Tensor | None
    q_norm_bias: torch.Tensor | None
    k_norm_weight: torch.Tensor | None
    k_norm_bias: torch.Tensor | None
    out_weight: torch.Tensor
    out_bias: torch.Tensor | None
    out_norm_weight: torch.Tensor | None = None
    out_norm_bias: torch.Tensor | None = None


class GradientSums:
    """Gradients of the weights, summed over tiles in at least float32."""

    def __init__(self, weights: MLPWeights | AttentionWeights):
        self._weights = weights
        self._totals = {
            name: torch.zeros_like(weight, dtype=wide(weight.dtype))
            for name, weight in weights._asdict().items()
            if weight is not None
        }

    def add_norm(self, name: str, gradients: Sequence[torch.Tensor]) -> None:
        """Add a tile's gradients of a norm's `name`_weight and, if there is one, `name`_bias."""
        for part, gradient in zip(("weight", "bias"), gradients, strict=False):
            self._totals[f"{name}_{part}"] += gradient

    def add_linear(self, name: str, grad_no: torch.Tensor, x_ni: torch.Tensor) -> None:
        """Add a tile's share of the gradients of y = x @ weight.T + bias, of `name`_weight and, if
        there is one, `name`_bias. grad: (rows, out) of y; x: (rows, in)."""
        self.add_weight(name, grad_no, x_ni)
        self.add_bias(name, grad_no)

    def add_weight(self, name: str, grad_no: torch.Tensor, x_ni: torch.Tensor) -> None:
        """Of `add_linear` the weight's part."""
        add_weight_gradient(self._totals[f"{name}_weight"], grad_no, x_ni)

    def add_bias(self, name: str, grad_no: torch.Tensor) -> None:
        """Of `add_linear` the bias's part."""
        total = self._totals.get(f"{name}_bias")
        if total is not None:
            total += grad_no.sum(0, dtype=total.dtype)

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """The sums in the order and the dtypes of the weights; called once."""
        return tuple(
            None if weight is None else self._totals.pop(name).to(weight.dtype)
            for name, weight in self._weights._asdict().items()
        )
