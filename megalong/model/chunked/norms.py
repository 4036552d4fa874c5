"""LayerNorm and RMSNorm over the last dimension, a tile of rows at a time; also of rows whose
channels the tensor ranks share.

PyTorch's own operators keep, or make on the way, whole tensors in float32 where the input has 16
bits. Where ranks share the channels, the moments are sums over the ranks of one number a row;
weight and bias are divided as the channels are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megalong.model.chunked.rows import TensorRanks, tiles, wide

TILE = 2**24  # numbers of divided rows that exist in the wide dtype at a time


class Norm(NamedTuple):
    """Which norm it is. kind: "RMSNorm" or "LayerNorm"."""

    kind: str
    eps: float


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str, eps: float
) -> torch.Tensor:
    """Return the norm of each row of x, in its dtype; the values are those of torch.nn's modules.

    Raises ValueError for another kind than those of `Norm`, or an RMSNorm with a bias.
    """
    if kind == "LayerNorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind != "RMSNorm" or bias is not None:
        raise ValueError(f"a norm is an RMSNorm without or a LayerNorm with a bias, not {kind}")
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *how: Any
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of x, weight and, where there is one, bias, from that of `norm`; all in
    the wide dtype, since what is summed up over tiles must not be rounded to 16 bits before.

    how: kind and eps.
    """
    dtype = wide(x.dtype)
    inputs = [None if tensor is None else tensor.detach().to(dtype) for tensor in (x, weight, bias)]
    needed = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
    with torch.enable_grad():
        out = norm(*inputs, *how)
    return torch.autograd.grad(out, needed, grad.to(dtype))


def tiled_norm(
    x_sbh: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    kind: str,
    eps: float,
    tile_size: int,
) -> torch.Tensor:
    """Return `norm` of x with `tile_size` rows at a time, forward and backward: only x is kept."""
    return _TiledNorm.apply(x_sbh, weight, bias, kind, eps, tile_size)


class _TiledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_sbh, weight, bias, kind, eps, tile_size):
        ctx.save_for_backward(x_sbh, weight, bias)
        ctx.how, ctx.tile_size = (kind, eps), tile_size
        out_sbh = torch.empty_like(x_sbh)
        for rows in tiles(len(x_sbh), tile_size):
            out_sbh[rows] = norm(x_sbh[rows], weight, bias, *ctx.how)
        return out_sbh

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sbh):
        x_sbh, weight, bias = ctx.saved_tensors
        grad_x_sbh = torch.empty_like(x_sbh)
        parameters = [weight] if bias is None else [weight, bias]
        totals = [torch.zeros_like(p, dtype=wide(p.dtype)) for p in parameters]
        for rows in tiles(len(x_sbh), ctx.tile_size):
            grad_x_sbh[rows], *shares = norm_backward(
                grad_sbh[rows], x_sbh[rows], weight, bias, *ctx.how
            )
            for total, share in zip(totals, shares, strict=True):
                total += share
        grads = [total.to(p.dtype) for total, p in zip(totals, parameters, strict=True)]
        return grad_x_sbh, *grads, *[None] * (5 - len(grads))


class Moments(NamedTuple):
    """Moments of each divided row, (..., 1), in the wide dtype. mean: None for RMSNorm."""

    mean: torch.Tensor | None
    inverse_deviation: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, norm: Norm, ranks: TensorRanks) -> Moments:
        """Those of x (..., channels of this rank)."""
        x, mean, channels = x.to(wide(x.dtype)), None, x.shape[-1] * ranks.size
        if norm.kind == "LayerNorm":
            mean = ranks.sum_(x.sum(-1, keepdim=True)).div_(channels)
            x = x - mean
        variance = ranks.sum_(x.square().sum(-1, keepdim=True)).div_(channels)
        return cls(mean, variance.add_(norm.eps).rsqrt_())

    def standardized(self, x: torch.Tensor) -> torch.Tensor:
        """x, or some of its channels, in the wide dtype with no mean and deviation 1."""
        x = x.to(self.inverse_deviation.dtype)
        return (x if self.mean is None else x - self.mean) * self.inverse_deviation

    def normed(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The norm of x, in its dtype."""
        out = self.standardized(x).mul_(weight)
        return (out if bias is None else out.add_(bias)).to(x.dtype)


class NormBackward(NamedTuple):
    """Beside its moments, what a row's gradient needs of the whole row, (..., 1): the means of the
    gradient, as it is before the weight, and of its product with the standardized row."""

    moments: Moments
    mean: torch.Tensor | None
    product: torch.Tensor

    @classmethod
    def of(
        cls,
        grad: torch.Tensor,
        x: torch.Tensor,
        moments: Moments,
        weight: torch.Tensor,
        ranks: TensorRanks,
    ) -> tuple[NormBackward, list[torch.Tensor]]:
        """From the gradient of the norm of x; also those of weight and, for LayerNorm, of bias."""
        standardized, grad = moments.standardized(x), grad.to(moments.inverse_deviation.dtype)
        products = grad * standardized
        rows = tuple(range(grad.ndim - 1))
        shares, sums = [products.sum(rows)], [(products.mul_(weight)).sum(-1, keepdim=True)]
        if moments.mean is not None:
            shares.append(grad.sum(rows))
            sums.append((grad * weight).sum(-1, keepdim=True))
        means = ranks.sum_(torch.cat(sums, -1)).div_(x.shape[-1] * ranks.size)
        mean = means[..., 1:] if moments.mean is not None else None
        return cls(moments, mean, means[..., :1]), shares

    def gradient(self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """That of x, or of some of its channels, in the wide dtype. grad: of their norm."""
        out = grad.to(self.product.dtype) * weight
        out -= self.moments.standardized(x).mul_(self.product)
        if self.mean is not None:
            out -= self.mean
        return out.mul_(self.moments.inverse_deviation)


def divided_norm(
    x_sbc: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Norm,
    ranks: TensorRanks,
) -> torch.Tensor:
    """Return the norm of rows (s, b, channels of this rank), in their dtype; differentiable. All
    ranks have to call it, and to go backward."""
    return _DividedNorm.apply(x_sbc, weight, bias, norm, ranks)


class _DividedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_sbc, weight, bias, norm, ranks):
        out_sbc, kept = torch.empty_like(x_sbc), []
        for rows in _tiles(x_sbc):
            moments = Moments.of(x_sbc[rows], norm, ranks)
            out_sbc[rows] = moments.normed(x_sbc[rows], weight, bias)
            kept += moments
        ctx.ranks = ranks
        ctx.save_for_backward(x_sbc, weight, *kept)
        return out_sbc

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sbc):
        x_sbc, weight, *kept = ctx.saved_tensors
        grad_x_sbc, totals = torch.empty_like(x_sbc), None
        for number, rows in enumerate(_tiles(x_sbc)):
            moments = Moments(*kept[2 * number : 2 * number + 2])
            part = grad_sbc[rows], x_sbc[rows]
            back, shares = NormBackward.of(*part, moments, weight, ctx.ranks)
            grad_x_sbc[rows] = back.gradient(*part, weight)
            totals = (
                shares if totals is None else [a + b for a, b in zip(totals, shares, strict=True)]
            )
        grads = [total.to(weight.dtype) for total in totals]
        return grad_x_sbc, *grads, *[None] * (4 - len(grads))


def _tiles(x_sbc: torch.Tensor):
    return tiles(len(x_sbc), max(TILE // max(x_sbc[0].numel(), 1), 1))
