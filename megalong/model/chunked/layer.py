"""A Transformer layer, or its attention half, as one function that keeps little.

Kept for the backward pass are x and, unless all is recomputed, the attention's output with its
log-sum-exp, from which x + attention(norm(x)) is one matrix product away: the attention itself runs
once. What goes with `recompute` is computed again in the backward pass, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from megalong.model.chunked.attention import Attended, TiledAttention
from megalong.model.chunked.mlp import TiledMLP
from megalong.model.chunked.rows import tiles
from megalong.model.chunked.weights import AttentionWeights, GradientSums, MLPWeights


@dataclass(frozen=True)
class TiledLayer:
    """attention and, unless it is None, mlp after it, with tiles of one size.

    recompute: keep x alone.
    """

    attention: TiledAttention
    mlp: TiledMLP | None
    recompute: bool

    def __call__(
        self,
        x_lbh: torch.Tensor,
        angles_sd: torch.Tensor | None,
        attention_weights: AttentionWeights,
        mlp_weights: MLPWeights | None,
    ) -> torch.Tensor:
        """y = x + attention(norm(x)), and y + MLP(norm(y)) of it; like x, differentiable.

        angles: of the rotary encoding (rows of all tensor ranks, head_dim / 2), or None.
        """
        return _TiledLayer.apply(x_lbh, angles_sd, self, *attention_weights, *(mlp_weights or ()))


class _TiledLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_lbh, angles_sd, layer, *weights):
        attention_weights, mlp_weights = _split(layer, weights)
        attended = layer.attention.attend(x_lbh, attention_weights, angles_sd)
        out_lbh = torch.empty_like(x_lbh)
        for rows in tiles(len(x_lbh), layer.attention.tile_size):
            tile_lbh = layer.attention.output_tile(
                x_lbh, rows, attended.out_sbad, attention_weights
            )
            if layer.mlp is not None:
                tile_lbh = layer.mlp.forward_tile(tile_lbh, mlp_weights)
            out_lbh[rows] = tile_lbh
        ctx.layer, ctx.angles_sd = layer, angles_sd  # all layers share the angles
        ctx.overwritten = False
        ctx.num_kept = [len(kept) for kept in attended.kept]
        saved = [x_lbh, *weights, *(x for kept in attended.kept for x in kept)]
        if not layer.recompute:
            saved += [attended.out_sbad, *attended.lse]
        ctx.save_for_backward(*saved)
        return out_lbh

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lbh):
        layer, angles_sd, groups = ctx.layer, ctx.angles_sd, len(ctx.num_kept)
        # Where autograd saves through hooks it does not see that.
        if ctx.overwritten:
            raise RuntimeError("a tiled layer goes backward once: it overwrites what it has saved")
        ctx.overwritten = not layer.recompute
        x_lbh, *saved = ctx.saved_tensors
        num_weights = len(AttentionWeights._fields)
        num_weights += len(MLPWeights._fields) if layer.mlp is not None else 0
        attention_weights, mlp_weights = _split(layer, saved[:num_weights])
        saved = saved[num_weights:]
        kept = []
        for count in ctx.num_kept:
            kept.append(tuple(saved[:count]))
            saved = saved[count:]
        if layer.recompute:
            attended = layer.attention.attend(x_lbh, attention_weights, angles_sd, kept)
        else:
            attended = Attended(saved[0], saved[1 : groups + 1], kept)
        del saved

        attention_sums = GradientSums(attention_weights)
        mlp_sums = None if mlp_weights is None else GradientSums(mlp_weights)
        grad_x_lbh = torch.empty_like(x_lbh)
        grad_y_lbh = grad_lbh if layer.mlp is None else grad_x_lbh
        out_norms = []
        for rows in tiles(len(x_lbh), layer.attention.tile_size):
            if layer.mlp is not None:
                y_lbh = layer.attention.output_tile(
                    x_lbh, rows, attended.out_sbad, attention_weights
                )
                grad_y_lbh[rows] = layer.mlp.backward_tile(
                    grad_lbh[rows], y_lbh, mlp_weights, mlp_sums
                )
            out_norms.append(
                layer.attention.output_backward_tile(
                    grad_y_lbh[rows], rows, attended.out_sbad, attention_weights, attention_sums
                )
            )
        layer.attention.backward(
            grad_y_lbh,
            x_lbh,
            attended,
            attention_weights,
            angles_sd,
            attention_sums,
            grad_x_lbh,
            out_norms,
        )
        gradients = attention_sums.gradients()
        if mlp_sums is not None:
            gradients += mlp_sums.gradients()
        return grad_x_lbh, None, None, *gradients


def _split(layer: TiledLayer, weights) -> tuple[AttentionWeights, MLPWeights | None]:
    count = len(AttentionWeights._fields)
    attention_weights = AttentionWeights(*weights[:count])
    return attention_weights, None if layer.mlp is None else MLPWeights(*weights[count:])
