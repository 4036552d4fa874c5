"""Tiles of rows, and sums over tiles that lose nothing to the dtype of their parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch


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
    """a @ b, (m, n), as it was summed up: not rounded to 16 bits at the end."""
    dtype = wide(a_mk.dtype)
    if dtype == a_mk.dtype:
        return a_mk @ b_kn
    if a_mk.is_cuda:
        return torch.mm(a_mk, b_kn, out_dtype=dtype)
    return a_mk.to(dtype) @ b_kn.to(dtype)  # PyTorch has no such product for the CPU


def add_weight_gradient(total_oi: torch.Tensor, grad_no: torch.Tensor, x_ni: torch.Tensor) -> None:
    """Add a tile's share of the gradient of the weight of y = x @ weight.T, in place.

    total: (out, in), in the wide dtype. grad: (rows, out) of y; x: (rows, in).
    """
    if grad_no.dtype == total_oi.dtype:  # no product beside the total, which may be large
        torch.addmm(total_oi, grad_no.T, x_ni, out=total_oi)
    else:
        total_oi += wide_product(grad_no.T, x_ni)
