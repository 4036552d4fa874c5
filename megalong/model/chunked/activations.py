"""Activations of the MLP, with what the backward pass needs from one reading of their input.

On a GPU each way is one Triton kernel. To add an activation: an Activation below, and its function
and slope in FUNCTIONS, if they are new; triton/activation_kernels.py may have a function too, those
that it has not run in PyTorch.

Shape suffixes: n rows, f features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType, ModuleType

import torch
from torch.nn import functional

from megalong.model.chunked import triton
from megalong.model.chunked.rows import tiles, wide

TILE = 2**17  # numbers at a time without the kernels: temporaries that stay in a cache

# Operators, so that fake tensors run no kernel. Not torch.library.custom_op: slow to call.
torch.library.define("megalong::activate", "(Tensor x, str function, bool gated) -> Tensor")
torch.library.define(
    "megalong::activate_backward_",
    "(Tensor(a!) grad, Tensor(b!) x, str function, bool gated) -> ()",
)


@dataclass(frozen=True)
class Activation:
    """function: one of FUNCTIONS. gated: x has gate and up side by side, and the activation is
    function(gate) * up, half as wide as x; otherwise function(x).

    Tensors: any float dtype, inside in at least float32; the numbers of a row side by side, else
    ValueError. Nothing is recorded for autograd.
    """

    function: str
    gated: bool

    def forward(self, x_nf: torch.Tensor) -> torch.Tensor:
        """The activation of x (rows, features), in its dtype: (rows, features), or half of them."""
        require_dense_rows(x_nf)
        return torch.ops.megalong.activate(x_nf, self.function, self.gated)

    def backward(
        self, grad_nf: torch.Tensor, x_nf: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The activation again, and the gradient of x: both inputs are overwritten with them.

        grad: the gradient of the activation. Returns (grad, x), which then hold activation and
        gradient of x. Raises ValueError where shapes or dtypes do not fit.
        """
        width = x_nf.shape[1] // (2 if self.gated else 1)
        if grad_nf.shape != (len(x_nf), width) or grad_nf.dtype != x_nf.dtype:
            raise ValueError(
                f"gradient {tuple(grad_nf.shape)} {grad_nf.dtype} is not that of an activation"
                f" of {tuple(x_nf.shape)} {x_nf.dtype}"
            )
        require_dense_rows(grad_nf, x_nf)
        torch.ops.megalong.activate_backward_(grad_nf, x_nf, self.function, self.gated)
        torch.autograd.graph.increment_version((grad_nf, x_nf))
        return grad_nf, x_nf


SWIGLU = Activation("silu", gated=True)
GELU = Activation("gelu", gated=False)


def silu_slope(x: torch.Tensor) -> torch.Tensor:
    """Of x sigmoid(x)."""
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def gelu_slope(x: torch.Tensor) -> torch.Tensor:
    """Of x Phi(x), with the normal distribution's exact Phi."""
    density = (-x.square() / 2).exp_() / math.sqrt(2 * math.pi)
    return (1 + (x / math.sqrt(2)).erf_()) / 2 + x * density


FUNCTIONS = MappingProxyType(
    {"silu": (functional.silu, silu_slope), "gelu": (functional.gelu, gelu_slope)}
)


def require_dense_rows(*tensors: torch.Tensor) -> None:
    if any(x_nf.stride(1) != 1 for x_nf in tensors):
        raise ValueError("an activation takes rows with their numbers side by side")


def kernels(x_nf: torch.Tensor, function: str) -> ModuleType | None:
    """The kernels, where they can run and know the function."""
    if not triton.runs_on(x_nf):
        return None
    from megalong.model.chunked.triton import activation_kernels

    return activation_kernels if function in activation_kernels.FUNCTIONS else None


def row_tiles(x_nf: torch.Tensor) -> Iterator[slice]:
    return tiles(len(x_nf), max(1, TILE // max(1, x_nf.shape[1])))


@torch.library.impl("megalong::activate", "CompositeExplicitAutograd")
def _(x_nf, function, gated):
    y_nf = empty_activation(x_nf, function, gated)
    if on_gpu := kernels(x_nf, function):
        on_gpu.forward(x_nf, y_nf, function, gated)
        return y_nf
    value, _ = FUNCTIONS[function]
    for rows in row_tiles(x_nf):
        x = x_nf[rows].to(wide(x_nf.dtype))
        if gated:
            gate, up = x.chunk(2, -1)
            y_nf[rows] = value(gate).mul_(up)
        else:
            y_nf[rows] = value(x)
    return y_nf


@torch.library.impl("megalong::activate_backward_", "CompositeExplicitAutograd")
def _(grad_nf, x_nf, function, gated):
    if on_gpu := kernels(x_nf, function):
        return on_gpu.backward(grad_nf, x_nf, function, gated)
    value, slope = FUNCTIONS[function]
    for rows in row_tiles(x_nf):
        x, grad = (t[rows].to(wide(t.dtype)) for t in (x_nf, grad_nf))
        if gated:
            gate, up = x.chunk(2, -1)
            y = value(gate)
            grad_x = torch.cat((slope(gate).mul_(up).mul_(grad), grad * y), -1)
            y.mul_(up)
        else:
            y, grad_x = value(x), slope(x).mul_(grad)
        grad_nf[rows], x_nf[rows] = y, grad_x


@torch.library.register_fake("megalong::activate")
def empty_activation(x_nf, function, gated):
    """Room for the activation."""
    rows, features = x_nf.shape
    return x_nf.new_empty(rows, features // 2 if gated else features)


@torch.library.register_fake("megalong::activate_backward_")
def _(grad, x, function, gated):
    pass
