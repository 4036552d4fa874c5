"""LayerNorm and RMSNorm over the last dimension, a tile of rows at a time.

The values are those of torch.nn's modules. PyTorch's own operators keep, or make on the way, whole
tensors in float32 where the input has 16 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megalong.model.chunked.rows import tiles, wide

KINDS = ("RMSNorm", "LayerNorm")


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str, eps: float
) -> torch.Tensor:
    """The norm of each row of x (..., h), in its dtype.

    weight, bias: (h,); bias is None for RMSNorm. kind: one of KINDS.
    Raises ValueError for a kind that is none of these, or an RMSNorm with a bias.
    """
    if kind == "LayerNorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind != "RMSNorm" or bias is not None:
        raise ValueError(f"a norm is an RMSNorm without or a LayerNorm with a bias, not {kind}")
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """The gradients of x, of weight and, where there is one, of bias, from that of `norm`.

    All in the wide dtype: what is summed up over tiles must not be rounded to 16 bits before.
    """
    dtype = wide(x.dtype)
    inputs = [None if tensor is None else tensor.detach().to(dtype) for tensor in (x, weight, bias)]
    needed = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
    with torch.enable_grad():
        out = norm(*inputs, kind, eps)
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
    """`norm` with `tile_size` rows of x's first dimension at a time, forward and backward: only x
    is kept, and beside x, the result and their gradients nothing grows with the sequence.

    The gradients of weight and bias are summed up over the tiles in the wide dtype.
    Raises ValueError where tile_size is not positive, and as `norm` does.
    """
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
