"""Activations: forward reads x and writes y; backward reads x and y's gradient and overwrites both.

Shape suffixes: r rows, f features of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megalong.model.chunked.triton.launch import BLOCK, launch

FUNCTIONS = ("silu", "gelu")  # what `value_and_slope` knows


def forward(x_nf: torch.Tensor, y_nf: torch.Tensor, function: str, gated: bool) -> None:
    """Writes the activation of x to y."""
    launch(activate_kernel, *arguments(x_nf, y_nf), **constants(x_nf, y_nf, function, gated))


def backward(grad_nf: torch.Tensor, x_nf: torch.Tensor, function: str, gated: bool) -> None:
    """Overwrites the gradient of y with y, and x with its gradient."""
    launch(
        activate_backward_kernel,
        *arguments(x_nf, grad_nf),
        **constants(x_nf, grad_nf, function, gated),
    )


def arguments(x_nf, y_nf) -> tuple:
    rows, features = y_nf.shape
    block_f, block_r = blocks(features)
    programs = triton.cdiv(rows, block_r) * triton.cdiv(features, block_f) if rows else 0
    return programs, x_nf.device, x_nf, y_nf, x_nf.stride(0), y_nf.stride(0), rows, features


def constants(x_nf, y_nf, function: str, gated: bool) -> dict:
    block_f, block_r = blocks(y_nf.shape[1])
    acc = tl.float64 if x_nf.dtype == torch.float64 else tl.float32
    names = {"FUNCTION": function, "GATED": gated, "ACC": acc}
    return {**names, "BLOCK_F": block_f, "BLOCK_R": block_r}


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
