"""A Transformer layer, or one of its halves, as one function that keeps little.

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
from megalong.model.chunked.rows import AttentionWeights, GradientSums, MLPWeights, tiles


@dataclass(frozen=True)
class TiledLayer:
    """Attention and MLP after it, with tiles of one size; None: without that half.

    recompute: keep x alone.
    """

    attention: TiledAttention | None
    mlp: TiledMLP | None
    recompute: bool

    def __call__(
        self,
        x_lbh: torch.Tensor,
        angles_sd: torch.Tensor | None,
        attention_weights: AttentionWeights | None,
        mlp_weights: MLPWeights | None,
    ) -> torch.Tensor:
        """Return y = x + attention(norm(x)), and y + MLP(norm(y)) of it; like x, differentiable.

        angles: of the rotary encoding (rows of all tensor ranks, head_dim / 2), or None.
        """
        weights = *(attention_weights or ()), *(mlp_weights or ())
        return _TiledLayer.apply(x_lbh, angles_sd, self, *weights)

    def tiles(self, x_lbh: torch.Tensor):
        return tiles(len(x_lbh), (self.attention or self.mlp).tile_size)

    def attended_tile(self, x_lbh, rows, attended, weights) -> torch.Tensor:
        """One tile of y."""
        if self.attention is None:
            return x_lbh[rows]
        return self.attention.output_tile(x_lbh, rows, attended.out_sbad, weights)

    def split(self, weights) -> tuple[AttentionWeights | None, MLPWeights | None, list]:
        """The weights of both halves, and what follows."""
        found = []
        for half, kind in ((self.attention, AttentionWeights), (self.mlp, MLPWeights)):
            count = 0 if half is None else len(kind._fields)
            found.append(kind(*weights[:count]) if half is not None else None)
            weights = weights[count:]
        return *found, weights


class _TiledLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_lbh, angles_sd, layer, *weights):
        attention_weights, mlp_weights, _ = layer.split(weights)
        attended = Attended(None, [], [])
        if layer.attention is not None:
            attended = layer.attention.attend(x_lbh, attention_weights, angles_sd)
        out_lbh = torch.empty_like(x_lbh)
        for rows in layer.tiles(x_lbh):
            tile_lbh = layer.attended_tile(x_lbh, rows, attended, attention_weights)
            if layer.mlp is not None:
                tile_lbh = layer.mlp.forward_tile(tile_lbh, mlp_weights)
            out_lbh[rows] = tile_lbh
        ctx.layer, ctx.angles_sd = layer, angles_sd  # all layers share the angles
        ctx.keeps_output = layer.attention is not None and not layer.recompute
        ctx.overwritten = False
        ctx.num_kept = [len(kept) for kept in attended.kept]
        saved = [x_lbh, *weights, *(x for kept in attended.kept for x in kept)]
        if ctx.keeps_output:
            saved += [attended.out_sbad, *attended.lse]
        ctx.save_for_backward(*saved)
        return out_lbh

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lbh):
        layer, angles_sd = ctx.layer, ctx.angles_sd
        # Where autograd saves through hooks it does not see that.
        if ctx.overwritten:
            raise RuntimeError("a tiled layer goes backward once: it overwrites what it has saved")
        ctx.overwritten = ctx.keeps_output
        x_lbh, *saved = ctx.saved_tensors
        attention_weights, mlp_weights, saved = layer.split(saved)
        kept = []
        for count in ctx.num_kept:
            kept.append(tuple(saved[:count]))
            saved = saved[count:]
        attended = None
        if ctx.keeps_output:
            attended = Attended(saved[0], saved[1:], kept)
        elif layer.attention is not None:
            attended = layer.attention.attend(x_lbh, attention_weights, angles_sd, kept)
        del saved

        attention_sums = attention_weights and GradientSums(attention_weights)
        mlp_sums = mlp_weights and GradientSums(mlp_weights)
        grad_x_lbh = torch.empty_like(x_lbh)
        grad_y_lbh = grad_lbh if layer.mlp is None else grad_x_lbh
        out_norms = []
        for rows in layer.tiles(x_lbh):
            if layer.mlp is not None:
                y_lbh = layer.attended_tile(x_lbh, rows, attended, attention_weights)
                grad_y_lbh[rows] = layer.mlp.backward_tile(
                    grad_lbh[rows], y_lbh, mlp_weights, mlp_sums
                )
            if layer.attention is not None:
                out_norm = layer.attention.output_backward_tile(
                    grad_y_lbh[rows], rows, attended.out_sbad, attention_weights, attention_sums
                )
                out_norms.append(out_norm)
        if layer.attention is not None:
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
        sums = [of_half for of_half in (attention_sums, mlp_sums) if of_half is not None]
        return grad_x_lbh, None, None, *(g for of_half in sums for g in of_half.gradients())
