"""x + MLP(norm(x)) for a tile of rows, and the activations, of which a pass makes one reading.

Only x is kept for the backward pass, which makes the norm, the first matrix and the activation of
each tile once more, and not the second matrix. Activations are one Triton kernel each way on a GPU.
To add one: an Activation below, and its function and slope in FUNCTIONS, if they are new; in
triton/kernels.py `value_and_slope` may have it too, else it runs in PyTorch.

Shape suffixes: l rows of this tensor rank's own, b batch, h hidden, n all that a matrix is applied
to in a tile (rows of all tensor ranks x batch), f features: inner width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F

from megalong.model.chunked.norms import Moments, Norm, NormBackward, norm, norm_backward
from megalong.model.chunked.rows import (
    ALONE,
    GradientSums,
    MLPWeights,
    TensorRanks,
    require_dense_rows,
    tiles,
    wide,
)
from megalong.model.chunked.triton import kernels_for

TILE = 2**17  # numbers at a time without the kernels: temporaries that stay in a cache

# Operators, so that fake tensors run no kernel. Not torch.library.custom_op: slow to call.
torch.library.define("megalong::activate", "(Tensor x, str function, bool gated) -> Tensor")
torch.library.define(
    "megalong::activate_backward_",
    "(Tensor(a!) grad, Tensor(b!) x, str function, bool gated) -> ()",
)


@dataclass(frozen=True)
class Activation:
    """function(gate) * up of x, which has gate and up side by side, if gated; else function(x).

    Computed in at least float32; the numbers of a row lie side by side, else ValueError. Nothing is
    recorded for autograd. function: one of FUNCTIONS.
    """

    function: str
    gated: bool

    def forward(self, x_nf: torch.Tensor) -> torch.Tensor:
        """Return the activation of x, in its dtype."""
        require_dense_rows(x_nf)
        return torch.ops.megalong.activate(x_nf, self.function, self.gated)

    def backward(
        self, grad_nf: torch.Tensor, x_nf: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Overwrite the activation's gradient with the activation, and x with its gradient; return
        both. Raises ValueError where shapes or dtypes do not fit."""
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
    """Return the derivative of x sigmoid(x)."""
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def gelu_slope(x: torch.Tensor) -> torch.Tensor:
    """Return the derivative of x Phi(x), with the normal distribution's exact Phi."""
    density = (-x.square() / 2).exp_() / math.sqrt(2 * math.pi)
    return (1 + (x / math.sqrt(2)).erf_()) / 2 + x * density


FUNCTIONS = MappingProxyType({"silu": (F.silu, silu_slope), "gelu": (F.gelu, gelu_slope)})


def row_tiles(x_nf: torch.Tensor) -> Iterator[slice]:
    return tiles(len(x_nf), max(1, TILE // max(1, x_nf.shape[1])))


@torch.library.impl("megalong::activate", "CompositeExplicitAutograd")
def _(x_nf, function, gated):
    y_nf = empty_activation(x_nf, function, gated)
    if (on_gpu := kernels_for(x_nf)) and function in on_gpu.FUNCTIONS:
        on_gpu.activate(x_nf, y_nf, function, gated)
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
    if (on_gpu := kernels_for(x_nf)) and function in on_gpu.FUNCTIONS:
        return on_gpu.activate_backward(grad_nf, x_nf, function, gated)
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


@dataclass(frozen=True)
class TiledMLP:
    """How a norm and an MLP with a residual connection are computed.

    norm: also that before the second matrix, where the weights have one.
    tile_size: rows of the sequence in a tile, for each tensor rank that has rows of its own.
    ranks: those that share the matrices, the first along its outputs, the second along its inputs.
    """

    norm: Norm
    activation: Activation
    tile_size: int
    ranks: TensorRanks = ALONE

    def forward_tile(self, x_lbh: torch.Tensor, weights: MLPWeights) -> torch.Tensor:
        """Return x + MLP(norm(x)) of one tile, without autograd."""
        normed_lbh = norm(x_lbh, weights.norm_weight, weights.norm_bias, *self.norm)
        normed_nh = self.ranks.enter(normed_lbh).flatten(0, 1)
        inner_nf = F.linear(normed_nh, weights.in_weight, weights.in_bias)
        active_nf = self.activation.forward(inner_nf)
        del inner_nf
        if weights.out_norm_weight is not None:
            moments = Moments.of(active_nf, self.norm, self.ranks)
            active_nf = moments.normed(active_nf, weights.out_norm_weight, weights.out_norm_bias)
        out_sbh = F.linear(active_nf, weights.out_weight).unflatten(0, (-1, x_lbh.shape[1]))
        out_lbh = self.ranks.leave(out_sbh)
        if weights.out_bias is not None:
            out_lbh += weights.out_bias
        return out_lbh.add_(x_lbh)

    def backward_tile(
        self, grad_lbh: torch.Tensor, x_lbh: torch.Tensor, weights: MLPWeights, sums: GradientSums
    ) -> torch.Tensor:
        """Return the gradient of a tile's x; those of the weights are added to `sums`."""
        norm_inputs = (x_lbh, weights.norm_weight, weights.norm_bias, *self.norm)
        normed_nh = self.ranks.enter(norm(*norm_inputs)).flatten(0, 1)
        grad_nh = self.ranks.enter(grad_lbh).flatten(0, 1)
        inner_nf = F.linear(normed_nh, weights.in_weight, weights.in_bias)
        grad_active_nf = grad_nh @ weights.out_weight
        if weights.out_norm_weight is not None:
            active_nf = self.activation.forward(inner_nf)
            moments = Moments.of(active_nf, self.norm, self.ranks)
            normed_nf = moments.normed(active_nf, weights.out_norm_weight, weights.out_norm_bias)
            sums.add_weight("out", grad_nh, normed_nf)
            back, shares = NormBackward.of(
                grad_active_nf, active_nf, moments, weights.out_norm_weight, self.ranks
            )
            sums.add_norm("out_norm", shares)
            grad_nf = back.gradient(grad_active_nf, active_nf, weights.out_norm_weight)
            grad_active_nf = grad_nf.to(grad_active_nf.dtype)
            del active_nf, normed_nf, moments, back, grad_nf
        active_nf, grad_inner_nf = self.activation.backward(grad_active_nf, inner_nf)
        sums.add_weight("in", grad_inner_nf, normed_nh)
        sums.add_bias("in", grad_inner_nf)
        if weights.out_norm_weight is None:
            sums.add_weight("out", grad_nh, active_nf)
        sums.add_bias("out", grad_lbh.flatten(0, 1))  # each rank counts its own rows
        grad_sbh = (grad_inner_nf @ weights.in_weight).unflatten(0, (-1, x_lbh.shape[1]))
        grad_x_lbh, *gradients = norm_backward(self.ranks.leave(grad_sbh), *norm_inputs)
        sums.add_norm("norm", gradients)
        return grad_x_lbh.add_(grad_lbh)
