"""The order of the axes in memory: what the kernels accept and what they hand back."""

from __future__ import annotations

import torch


def dense_rows(x_bshd: torch.Tensor) -> torch.Tensor:
    """x with the numbers of a row side by side, as the kernels want; other strides are free."""
    return x_bshd if x_bshd.stride(-1) == 1 else x_bshd.contiguous()


def empty_rows(x_bshd: torch.Tensor, dtype=None, device=None) -> torch.Tensor:
    """Uninitialised, with x's order of the axes in memory where that keeps rows dense."""
    empty = torch.empty_like(x_bshd, dtype=dtype, device=device)
    if empty.stride(-1) == 1:
        return empty
    return x_bshd.new_empty(x_bshd.shape, dtype=dtype, device=device)


def laid_out_like(x_bshd: torch.Tensor, like_bshd: torch.Tensor) -> torch.Tensor:
    """x, copied if its strides are not those of empty_rows(like)."""
    strides = empty_rows(like_bshd, device="meta").stride()
    axes = zip(x_bshd.shape, x_bshd.stride(), strides, strict=True)
    if all(found == wanted for size, found, wanted in axes if size > 1):
        return x_bshd
    return empty_rows(like_bshd, x_bshd.dtype).copy_(x_bshd)
