"""LayerNorm and RMSNorm of rows whose channels the tensor ranks share, each a slice of them.

The moments are those of whole rows: sums over the ranks, of one number a row, in the forward pass
(two, one after the other, for LayerNorm) and of one or two in the backward pass. Weight and bias
are divided as the channels are, and so are their gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megalong.model.chunked.rows import tiles, wide
from megalong.model.chunked.tensor_ranks import TensorRanks
from megalong.model.chunked.weights import Norm

TILE = 2**24  # numbers that exist in the wide dtype at a time


class Moments(NamedTuple):
    """What a norm needs of each row, (..., 1), in the wide dtype. mean: None for RMSNorm."""

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
    """What the gradient of a row needs of the whole row besides its moments, (..., 1): the means
    of the gradient, as it is before the weight, and of its product with the standardized row."""

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
        """From the gradient of the norm of x; and the gradients of weight and, for LayerNorm, of
        bias, in the wide dtype."""
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
    """The norm of rows (s, b, channels of this rank), in their dtype; differentiable.

    weight, bias: (channels of this rank,). All ranks have to call it, and to go backward. Kept are
    x and two numbers a row; in the wide dtype `TILE` numbers exist at a time.
    """
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
