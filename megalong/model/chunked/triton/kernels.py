"""The kernels, and what launches them, in this order: activations, cross entropy, rotation.

Shape suffixes: r rows, f features of an activation, v columns of a block of logits, p pairs of
channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WARPS, BLOCK = 4, 1024  # numbers of a program: 8 a thread, which is 16 bytes of 16-bit numbers
READ_WARPS, READ_BLOCK = 8, 4096  # few programs, each a row: 64 bytes of a thread under way
HEADS = 4  # of a program that rotates: they share their rows' cosines and sines
FUNCTIONS = ("silu", "gelu")  # what `value_and_slope` knows


def launch(
    kernel, programs: int, device: torch.device, *arguments, warps: int = WARPS, **names
) -> None:
    """Start a kernel on so many programs, if any."""
    if programs:
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            kernel[(programs,)](*arguments, **names, num_warps=warps, enable_fp_fusion=True)


def accumulator(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def activate(x_nf: torch.Tensor, y_nf: torch.Tensor, function: str, gated: bool) -> None:
    """Write the activation of x to y."""
    launch_on_rows(activate_kernel, x_nf, y_nf, function, gated)


def activate_backward(
    grad_nf: torch.Tensor, x_nf: torch.Tensor, function: str, gated: bool
) -> None:
    """Overwrite the gradient of y with y, and x with its gradient."""
    launch_on_rows(activate_backward_kernel, x_nf, grad_nf, function, gated)


def launch_on_rows(kernel, x_nf, y_nf, function: str, gated: bool) -> None:
    rows, features = y_nf.shape
    block_f, block_r = blocks(features)
    programs = triton.cdiv(rows, block_r) * triton.cdiv(features, block_f) if rows else 0
    launch(
        kernel, programs, x_nf.device,
        x_nf, y_nf, x_nf.stride(0), y_nf.stride(0), rows, features,
        FUNCTION=function, GATED=gated, ACC=accumulator(x_nf), BLOCK_F=block_f, BLOCK_R=block_r,
    )  # fmt: skip


def blocks(features: int) -> tuple[int, int]:
    """Features and rows of a program."""
    block_f = min(BLOCK, triton.next_power_of_2(features))
    return block_f, BLOCK // block_f


@triton.jit
def value_and_slope(x, FUNCTION: tl.constexpr):
    """A function of FUNCTIONS and its derivative."""
    if FUNCTION == "silu":
        sigmoid = 1 / (1 + tl.exp(-x))
        value, slope = x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    else:
        tl.static_assert(FUNCTION == "gelu")
        probability = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        value, slope = x * probability, probability + x * density
    return value, slope


@triton.jit
def tile(x_ptr, y_ptr, x_row, y_row, rows, features, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr):
    """The program's pointers to x (or its gate) and y, and which of them are inside."""
    blocks = tl.cdiv(features, BLOCK_F)
    row_r = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    feature_f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    valid_rf = (row_r < rows)[:, None] & (feature_f < features)[None, :]
    wide_r = row_r.to(tl.int64)[:, None]
    x_rf, y_rf = x_ptr + wide_r * x_row, y_ptr + wide_r * y_row
    return x_rf + feature_f[None, :], y_rf + feature_f[None, :], valid_rf


@triton.jit
def activate_kernel(
    x_ptr, y_ptr, x_row, y_row, rows, features,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    x_rf, y_rf, valid_rf = tile(x_ptr, y_ptr, x_row, y_row, rows, features, BLOCK_F, BLOCK_R)
    y, _ = value_and_slope(tl.load(x_rf, valid_rf, other=0).to(ACC), FUNCTION)
    if GATED:
        y *= tl.load(x_rf + features, valid_rf, other=0).to(ACC)
    tl.store(y_rf, y, valid_rf)


@triton.jit
def activate_backward_kernel(
    x_ptr, grad_ptr, x_row, grad_row, rows, features,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    x_rf, grad_rf, valid_rf = tile(
        x_ptr, grad_ptr, x_row, grad_row, rows, features, BLOCK_F, BLOCK_R
    )
    grad = tl.load(grad_rf, valid_rf, other=0).to(ACC)
    value, slope = value_and_slope(tl.load(x_rf, valid_rf, other=0).to(ACC), FUNCTION)
    if GATED:
        up = tl.load(x_rf + features, valid_rf, other=0).to(ACC)
        tl.store(x_rf + features, grad * value, valid_rf)
        value *= up
        slope *= up
    tl.store(x_rf, grad * slope, valid_rf)
    tl.store(grad_rf, value, valid_rf)


def read(
    logits_nv: torch.Tensor,
    labels_n: torch.Tensor,
    first: int,
    lse_n: torch.Tensor,
    target_n: torch.Tensor,
) -> None:
    """Write the rows' logsumexp and the labels' logits, 0 where a label is not among them."""
    rows, columns = logits_nv.shape
    launch(
        read_kernel, rows, logits_nv.device,
        logits_nv, labels_n.contiguous(), lse_n, target_n, logits_nv.stride(0), columns, first,
        BLOCK_V=READ_BLOCK, ACC=accumulator(logits_nv), warps=READ_WARPS,
    )  # fmt: skip


def differentiate(
    logits_nv: torch.Tensor,
    labels_n: torch.Tensor,
    lse_n: torch.Tensor,
    grad_n: torch.Tensor,
    first: int,
    out_nv: torch.Tensor,
) -> None:
    """Write the gradient of the logits to out, which may be the logits."""
    rows, columns = logits_nv.shape
    launch(
        differentiate_kernel, rows * triton.cdiv(columns, BLOCK), logits_nv.device,
        logits_nv, labels_n.contiguous(), lse_n.contiguous(), grad_n.contiguous(), out_nv,
        logits_nv.stride(0), out_nv.stride(0), columns, first,
        BLOCK_V=BLOCK, ACC=accumulator(logits_nv),
    )  # fmt: skip


@triton.jit
def read_kernel(
    logits_ptr, labels_ptr, lse_ptr, target_ptr, logits_row, columns, first,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program: a row. Each lane has a softmax of its own columns, and they are merged once."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row
    largest_v = tl.full([BLOCK_V], -3e38, ACC)  # finite, so that no difference is inf - inf
    total_v = tl.zeros([BLOCK_V], ACC)
    for start in tl.range(0, columns, BLOCK_V):
        column_v = start + tl.arange(0, BLOCK_V)
        x_v = tl.load(logits_ptr + column_v, column_v < columns, other=float("-inf")).to(ACC)
        new_v = tl.maximum(largest_v, x_v)
        total_v = total_v * tl.exp(largest_v - new_v) + tl.exp(x_v - new_v)
        largest_v = new_v
    largest = tl.max(largest_v, 0)
    total = tl.sum(total_v * tl.exp(largest_v - largest), 0)
    tl.store(lse_ptr + row, largest + tl.log(total))
    place = tl.load(labels_ptr + row) - first
    here = (place >= 0) & (place < columns)
    tl.store(target_ptr + row, tl.load(logits_ptr + place, here, other=0))


@triton.jit
def differentiate_kernel(
    logits_ptr, labels_ptr, lse_ptr, grad_loss_ptr, out_ptr, logits_row, out_row, columns, first,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program: a block of a row. It has read its logits before it writes."""
    blocks = tl.cdiv(columns, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column_v = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    valid_v = column_v < columns
    place = tl.load(labels_ptr + row) - first
    lse, grad = tl.load(lse_ptr + row), tl.load(grad_loss_ptr + row).to(ACC)
    x_v = tl.load(logits_ptr + row * logits_row + column_v, valid_v, other=0).to(ACC)
    softmax_v = tl.exp(x_v - lse)
    gradient_v = tl.where(column_v == place, softmax_v - 1, softmax_v) * grad
    tl.store(out_ptr + row * out_row + column_v, gradient_v, valid_v)


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
        ACC=accumulator(x_sbhd),
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
