"""Rotary position encoding in place: x is read once and written once.

Shape suffixes: r rows (sequence and batch), p pairs of channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megalong.model.chunked.triton.launch import BLOCK, launch

HEADS = 4  # of a program: they share their rows' cosines and sines


def rotate_(x_sbhd: torch.Tensor, angles_sp: torch.Tensor, inverse: bool) -> None:
    """As `megalong.model.chunked.rotary.rotate_`."""
    length, batch, heads, head_dim = x_sbhd.shape
    if angles_sp.stride(-1) != 1:
        angles_sp = angles_sp.contiguous()
    block_p = triton.next_power_of_2(head_dim // 2)
    block_r = max(1, BLOCK // block_p)
    programs = triton.cdiv(length * batch, block_r) * triton.cdiv(heads, HEADS)
    launch(
        rotate_kernel, programs if x_sbhd.numel() else 0, x_sbhd.device,
        x_sbhd, angles_sp, *x_sbhd.stride()[:3], angles_sp.stride(0), length * batch, batch, heads,
        INVERSE=inverse, HEADS=HEADS, PAIRS=head_dim // 2, BLOCK_P=block_p, BLOCK_R=block_r,
        ACC=tl.float64 if x_sbhd.dtype == torch.float64 else tl.float32,
    )  # fmt: skip


@triton.jit
def cos_sin(angle):
    """Cosine and sine, float64 or float32 to 1e-7 for angles of a few turns.

    float32 by hand: the library's also take huge angles, for which they keep a table on the stack.
    The angle's distance from the nearest quarter turn, exact in three steps whose first two
    constants have 15 bits, and Taylor's series for it, at most 1/8 turn: off by 2e-9.
    """
    if angle.dtype == tl.float64:
        cos, sin = tl.cos(angle), tl.sin(angle)
    else:
        quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
        x = angle - quarter * 1.57080078125
        x = x - quarter * -4.454515874385834e-06
        x = x - quarter * 6.077100506506192e-11
        y = x * x
        odd = x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))) + x
        even = 1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))
        even = y * y * even + (1 - 0.5 * y)
        quadrant = quarter.to(tl.int32) & 3
        turned = (quadrant & 1) == 1
        cos, sin = tl.where(turned, odd, even), tl.where(turned, even, odd)
        cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
        sin = tl.where(quadrant >= 2, -sin, sin)
    return cos, sin


@triton.jit
def rotate_kernel(
    x_ptr, angles_ptr, x_sequence, x_batch, x_head, angles_sequence, rows, batch, heads,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_R rows of HEADS heads."""
    groups = tl.cdiv(heads, HEADS)
    first_head = tl.program_id(0) % groups * HEADS
    row_r = tl.program_id(0) // groups * BLOCK_R + tl.arange(0, BLOCK_R)
    pair_p = tl.arange(0, BLOCK_P)
    valid_rp = (row_r < rows)[:, None] & (pair_p < PAIRS)[None, :]
    sequence_r, batch_r = (row_r // batch).to(tl.int64), (row_r % batch).to(tl.int64)
    angle_rp = tl.load(
        angles_ptr + (sequence_r * angles_sequence)[:, None] + pair_p[None, :], valid_rp, other=0
    )
    cos_rp, sin_rp = cos_sin(angle_rp.to(ACC))
    if INVERSE:
        sin_rp = -sin_rp
    start_r = sequence_r * x_sequence + batch_r * x_batch + first_head.to(tl.int64) * x_head
    x_rp = x_ptr + start_r[:, None] + pair_p[None, :]
    for _ in tl.range(first_head, tl.minimum(first_head + HEADS, heads)):
        first_rp = tl.load(x_rp, valid_rp, other=0).to(ACC)
        second_rp = tl.load(x_rp + PAIRS, valid_rp, other=0).to(ACC)
        tl.store(x_rp, first_rp * cos_rp - second_rp * sin_rp, valid_rp)
        tl.store(x_rp + PAIRS, second_rp * cos_rp + first_rp * sin_rp, valid_rp)
        x_rp += x_head
