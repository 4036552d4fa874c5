"""The scales of xPos (arXiv 2212.10554): channels of queries and keys times a factor of their row.

A head's channels i and i + d/2 are a pair, as in `chunked/rotary.py`, and have one factor; a
rotation and these may be done in either order.

Shape suffixes: s sequence, b batch, h heads, d channels of a head, p their pairs (d / 2).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megalong.model.chunked.rows import tiles

TILE = 2**22  # numbers at a time in the dtype of the scales


def scale_(x_sbhd: torch.Tensor, scales_sp: torch.Tensor, *, inverse: bool = False) -> None:
    """Multiply each pair of x by the scale of its row, in place, in at least float32.

    scales: (s, d / 2), float32 or float64: of queries; inverse: divide, as keys are. The gradient's
    way is the same. Nothing is recorded for autograd. Raises ValueError where shapes do not fit.
    """
    _write(x_sbhd, x_sbhd, scales_sp, inverse)


def scaled(x_sbhd: torch.Tensor, scales_sp: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """What `scale_` makes of x, as a new tensor; differentiable."""
    return _Scaled.apply(x_sbhd, scales_sp, inverse)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_sbhd, scales_sp, inverse):
        ctx.how = scales_sp, inverse  # all layers share the scales
        return _write(torch.empty_like(x_sbhd), x_sbhd, *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sbhd):
        return _write(torch.empty_like(grad_sbhd), grad_sbhd, *ctx.how), None, None


def _write(out_sbhd, x_sbhd, scales_sp, inverse):
    length, batch, heads, head_dim = x_sbhd.shape
    if scales_sp.shape != (length, head_dim // 2) or head_dim % 2:
        raise ValueError(
            f"scales of {tuple(x_sbhd.shape)} are (sequence, head_dim / 2), got"
            f" {tuple(scales_sp.shape)}"
        )
    x, out = (tensor.unflatten(-1, (2, -1)) for tensor in (x_sbhd, out_sbhd))
    for rows in tiles(length, max(1, TILE // max(1, batch * heads * head_dim))):
        scales = scales_sp[rows, None, None, None]
        out[rows] = x[rows] / scales if inverse else x[rows] * scales
    return out_sbhd
