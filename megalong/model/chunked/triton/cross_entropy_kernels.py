"""Cross entropy: forward reads the logits; backward reads them and writes their gradient.

Shape suffixes: v columns of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megalong.model.chunked.triton.launch import BLOCK, launch

READ_WARPS, READ_BLOCK = 8, 4096  # few programs, each a row: 64 bytes of a thread under way


def read(
    logits_nv: torch.Tensor,
    labels_n: torch.Tensor,
    first: int,
    lse_n: torch.Tensor,
    target_n: torch.Tensor,
) -> None:
    """Writes the rows' logsumexp and the labels' logits, 0 where a label is not among them."""
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
    """Writes the gradient of the logits to out, which may be the logits."""
    rows, columns = logits_nv.shape
    launch(
        differentiate_kernel, rows * triton.cdiv(columns, BLOCK), logits_nv.device,
        logits_nv, labels_n.contiguous(), lse_n.contiguous(), grad_n.contiguous(), out_nv,
        logits_nv.stride(0), out_nv.stride(0), columns, first,
        BLOCK_V=BLOCK, ACC=accumulator(logits_nv),
    )  # fmt: skip


def accumulator(logits_nv: torch.Tensor) -> tl.dtype:
    return tl.float64 if logits_nv.dtype == torch.float64 else tl.float32


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
