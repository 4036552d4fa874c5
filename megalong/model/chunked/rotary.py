"""Rotary position encoding (RoPE, arXiv 2104.09864) and the scales of xPos (arXiv 2212.10554), in
place: no copy of queries or keys.

A head's channels i and i + d/2 are a pair, which turns by the angle of its row and has one scale:
Megatron-core's layout where `rotary_interleaved` is off. On a GPU a Triton kernel rotates, reading
and writing x once.

Shape suffixes: s sequence, b batch, h heads, d channels of a head, p their pairs (d / 2).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megalong.model.chunked.rows import tiles, wide
from megalong.model.chunked.triton import kernels_for

TILE = 2**17  # numbers rotated at a time without the kernel: temporaries that stay in a cache
SCALED_TILE = 2**22  # numbers at a time in the dtype of the scales

# An operator, so that fake tensors run no kernel. Not torch.library.custom_op: slow to call.
torch.library.define("megalong::rotate_", "(Tensor(a!) x, Tensor angles, bool inverse) -> ()")


def rotate_(x_sbhd: torch.Tensor, angles_sp: torch.Tensor, *, inverse: bool = False) -> None:
    """Turn the pairs of every row's heads by the row's angles, in place, in at least float32.

    x: any float dtype, a head's channels side by side, other strides free. angles: float32 or
    float64, in [0, 2 pi). inverse: turn back, which is also the gradient's way. Nothing is recorded
    for autograd. Raises ValueError where shapes or strides do not fit.
    """
    length, _, _, head_dim = x_sbhd.shape
    if head_dim % 2 or angles_sp.shape != (length, head_dim // 2):
        raise ValueError(
            f"rotation of {tuple(x_sbhd.shape)} takes angles (sequence, head_dim / 2),"
            f" got {tuple(angles_sp.shape)}"
        )
    if x_sbhd.stride(-1) != 1:
        raise ValueError("rotation in place takes heads with their channels side by side")
    if x_sbhd.requires_grad and torch.is_grad_enabled():
        raise ValueError("rotation in place is not recorded for autograd: call it in no_grad")
    torch.ops.megalong.rotate_(x_sbhd, angles_sp, inverse)
    torch.autograd.graph.increment_version(x_sbhd)


@torch.library.impl("megalong::rotate_", "CompositeExplicitAutograd")
def _(x_sbhd, angles_sp, inverse):
    if on_gpu := kernels_for(x_sbhd):
        return on_gpu.rotate_(x_sbhd, angles_sp, inverse)
    _, batch, heads, head_dim = x_sbhd.shape
    dtype = wide(x_sbhd.dtype)
    for rows in tiles(len(x_sbhd), max(1, TILE // max(1, batch * heads * head_dim))):
        angles = angles_sp[rows, None, None].to(dtype)
        cos, sin = angles.cos(), angles.sin()
        first, second = x_sbhd[rows].to(dtype).chunk(2, -1)
        if inverse:
            sin = sin.neg_()
        turned = first * cos - second * sin, second * cos + first * sin
        for to, value in zip(x_sbhd[rows].chunk(2, -1), turned, strict=True):
            to.copy_(value)


@torch.library.register_fake("megalong::rotate_")
def _(x, angles, inverse):
    pass


def scale_(x_sbhd: torch.Tensor, scales_sp: torch.Tensor, *, inverse: bool = False) -> None:
    """Multiply each pair of x by the scale of its row, in place, in at least float32.

    scales: of queries, float32 or float64; inverse: divide, as keys are. The gradient's way is the
    same. Nothing is recorded for autograd. Raises ValueError where shapes do not fit.
    """
    _write(x_sbhd, x_sbhd, scales_sp, inverse)


def scaled(x_sbhd: torch.Tensor, scales_sp: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Return what `scale_` makes of x, as a new tensor; differentiable."""
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
    for rows in tiles(length, max(1, SCALED_TILE // max(1, batch * heads * head_dim))):
        scales = scales_sp[rows, None, None, None]
        out[rows] = x[rows] / scales if inverse else x[rows] * scales
    return out_sbhd
