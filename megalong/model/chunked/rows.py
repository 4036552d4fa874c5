"""Tiles of rows, the tensor-parallel ranks that share the matrices, and sums over tiles.

Shape suffixes: s rows of all ranks, l rows of a rank's own, b batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist


def tiles(rows: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows that cover `rows`; the last may be shorter.

    Raises ValueError where size is not positive.
    """
    if size < 1:
        raise ValueError(f"a tile must have at least one row, got {size}")
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tiles: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def wide_product(a_mk: torch.Tensor, b_kn: torch.Tensor) -> torch.Tensor:
    """Return a @ b, (m, n), as it was summed up: not rounded to 16 bits at the end."""
    dtype = wide(a_mk.dtype)
    if dtype == a_mk.dtype:
        return a_mk @ b_kn
    if a_mk.is_cuda:
        return torch.mm(a_mk, b_kn, out_dtype=dtype)
    return a_mk.to(dtype) @ b_kn.to(dtype)  # PyTorch has no such product for the CPU


def add_weight_gradient(total_oi: torch.Tensor, grad_no: torch.Tensor, x_ni: torch.Tensor) -> None:
    """Add a tile's share of the gradient of the weight of y = x @ weight.T, in place.

    total: in the wide dtype. grad: of y.
    """
    if grad_no.dtype == total_oi.dtype:  # no product beside the total, which may be large
        torch.addmm(total_oi, grad_no.T, x_ni, out=total_oi)
    else:
        total_oi += wide_product(grad_no.T, x_ni)


def require_dense_rows(*tensors: torch.Tensor) -> None:
    """Raise ValueError where the numbers of a row are not side by side."""
    if any(x_nf.stride(1) != 1 for x_nf in tensors):
        raise ValueError("these are not rows with their numbers side by side")


@dataclass(frozen=True)
class TensorRanks:
    """The ranks that share each layer's matrices, and this one's place among them.

    A matrix that is cut along its outputs is entered by `enter`, one that is cut along its inputs
    is left by `leave`.

    divides_rows: outside of the two each rank has its own share of the rows (Megatron's sequence
        parallelism); in between, tile i has tile i of the shares of all ranks, one after the other.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    divides_rows: bool = False

    @property
    def shares(self) -> int:
        """Into how many shares the rows are divided."""
        return self.size if self.divides_rows else 1

    def enter(self, x_lb: torch.Tensor) -> torch.Tensor:
        """Gather a tile (l, batch, ...), or its gradient, as (shares * l, batch, ...)."""
        if self.shares == 1:
            return x_lb
        x_lb = x_lb.contiguous()
        x_sb = x_lb.new_empty(self.size * x_lb.shape[0], *x_lb.shape[1:])
        dist.all_gather_into_tensor(x_sb, x_lb, group=self.group)
        return x_sb

    def leave(self, part_sb: torch.Tensor) -> torch.Tensor:
        """Sum up the ranks' parts (shares * l, batch, ...) of a tile; of it return this rank's own
        rows (l, batch, ...). May be computed in place."""
        if not self.divides_rows:
            return self.sum_(part_sb.contiguous()) if self.size > 1 else part_sb
        if self.size == 1:
            return part_sb
        part_sb = part_sb.contiguous()
        own_lb = part_sb.new_empty(part_sb.shape[0] // self.size, *part_sb.shape[1:])
        dist.reduce_scatter_tensor(own_lb, part_sb, group=self.group)
        return own_lb

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite x with its sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def tile(self, x_s: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return, of x (s, ...), the rows that a tile's `enter` gives: (shares * l, ...).

        rows: the tile, counted in a share. A view where there is one share, else a copy.
        """
        if self.shares == 1:
            return x_s[rows]
        return x_s.unflatten(0, (self.shares, -1))[:, rows].flatten(0, 1)

    def put_tile(self, x_s: torch.Tensor, rows: slice, value_s: torch.Tensor) -> None:
        """Write what `tile` reads."""
        if self.shares == 1:
            x_s[rows] = value_s
        else:
            x_s.unflatten(0, (self.shares, -1))[:, rows] = value_s.unflatten(0, (self.shares, -1))


ALONE = TensorRanks()


class MLPWeights(NamedTuple):
    """This tensor rank's part of norm and MLP; None where there is none.

    in_weight: (inner, hidden), for a gated activation the gate above the rest. out_weight: (hidden,
    inner or half of it). out_norm_*: of the norm before the second matrix.
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
    """This tensor rank's part of norm, projections and norms of heads; None where there is none.

    qkv_weight: (rows, hidden), for each kv head those of its query heads, of its key and of its
    value, head_dim each. q_norm_*, k_norm_*: (head_dim,). out_weight: (hidden, heads * head_dim).
    out_norm_*: of the norm before the output projection.
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

    def add_weight(self, name: str, grad_no: torch.Tensor, x_ni: torch.Tensor) -> None:
        """Add a tile's share of the gradient of y = x @ `name`_weight.T. grad: of y."""
        add_weight_gradient(self._totals[f"{name}_weight"], grad_no, x_ni)

    def add_bias(self, name: str, grad_no: torch.Tensor) -> None:
        """Add a tile's share of the gradient of `name`_bias, if there is one."""
        total = self._totals.get(f"{name}_bias")
        if total is not None:
            total += grad_no.sum(0, dtype=total.dtype)

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Return the sums in the order and the dtypes of the weights; called once."""
        return tuple(
            None if weight is None else self._totals.pop(name).to(weight.dtype)
            for name, weight in self._weights._asdict().items()
        )
