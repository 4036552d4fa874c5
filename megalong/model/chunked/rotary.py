"""Rotary position encoding in place (RoPE, arXiv 2104.09864): no copy of queries or keys.

A head's channels i and i + d/2 are a pair, which turns by the angle of its row: the half-rotation
layout, Megatron-core's where `rotary_interleaved` is off. Cosines and sines exist for a tile of
rows only. On a GPU a Triton kernel reads and writes x once.

Shape suffixes: s sequence, b batch, h heads, d channels of a head, p their pairs (d / 2).
"""

from __future__ import annotations

import torch

from megalong.model.chunked import triton
from megalong.model.chunked.rows import tiles, wide

TILE = 2**17  # numbers at a time without the kernel: temporaries that stay in a cache

# An operator, so that fake tensors run no kernel. Not torch.library.custom_op: slow to call.
torch.library.define("megalong::rotate_", "(Tensor(a!) x, Tensor angles, bool inverse) -> ()")


def rotate_(x_sbhd: torch.Tensor, angles_sp: torch.Tensor, *, inverse: bool = False) -> None:
    """Turn the pairs of every row's heads by the row's angles, in place.

    x: (sequence, batch, heads, d), float64, float32, bfloat16 or float16, a head's channels side by
    side, other strides free. angles: (sequence, d / 2), float32 or float64, in [0, 2 pi).
    inverse: turn back, which is also the gradient's way. Computed in at least float32. Nothing is
    recorded for autograd. Raises ValueError where shapes or strides do not fit.
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
    if triton.runs_on(x_sbhd):
        from megalong.model.chunked.triton import rotary_kernel

        return rotary_kernel.rotate_(x_sbhd, angles_sp, inverse)
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
