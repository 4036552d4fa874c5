"""x + MLP(norm(x)) over tiles of the sequence: what is as wide as the MLP exists for one tile.

Only x is kept for the backward pass, which makes the norm, the first matrix and the activation of
each tile once more, and not the second matrix.

Shape suffixes: l rows of this tensor rank's own, b batch, h hidden, n all that a matrix is applied
to in a tile (rows of all tensor ranks x batch), f inner width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megalong.model.chunked.activations import Activation
from megalong.model.chunked.divided_norms import Moments, NormBackward
from megalong.model.chunked.norms import norm, norm_backward
from megalong.model.chunked.rows import tiles
from megalong.model.chunked.tensor_ranks import ALONE, TensorRanks
from megalong.model.chunked.weights import GradientSums, MLPWeights, Norm


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

    def __call__(self, x_lbh: torch.Tensor, weights: MLPWeights) -> torch.Tensor:
        """x + MLP(norm(x)), like x; differentiable."""
        return _TiledMLP.apply(x_lbh, self, *weights)

    def forward_tile(self, x_lbh: torch.Tensor, weights: MLPWeights) -> torch.Tensor:
        """One tile, without autograd."""
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
        self,
        grad_lbh: torch.Tensor,
        x_lbh: torch.Tensor,
        weights: MLPWeights,
        sums: GradientSums,
    ) -> torch.Tensor:
        """The gradient of a tile's x; those of the weights are added to `sums`."""
        norm_inputs = (x_lbh, weights.norm_weight, weights.norm_bias, *self.norm)
        normed_nh = self.ranks.enter(norm(*norm_inputs)).flatten(0, 1)
        grad_nh = self.ranks.enter(grad_lbh).flatten(0, 1)
        inner_nf = F.linear(normed_nh, weights.in_weight, weights.in_bias)
        grad_active_nf = grad_nh @ weights.out_weight
        if weights.out_norm_weight is not None:
            grad_active_nf = self._out_norm_backward(
                grad_active_nf, self.activation.forward(inner_nf), grad_nh, weights, sums
            )
        active_nf, grad_inner_nf = self.activation.backward(grad_active_nf, inner_nf)
        sums.add_linear("in", grad_inner_nf, normed_nh)
        if weights.out_norm_weight is None:
            sums.add_weight("out", grad_nh, active_nf)
        sums.add_bias("out", grad_lbh.flatten(0, 1))  # each rank counts its own rows
        grad_sbh = (grad_inner_nf @ weights.in_weight).unflatten(0, (-1, x_lbh.shape[1]))
        grad_x_lbh, *gradients = norm_backward(self.ranks.leave(grad_sbh), *norm_inputs)
        sums.add_norm("norm", gradients)
        return grad_x_lbh.add_(grad_lbh)

    def _out_norm_backward(self, grad_nf, active_nf, grad_nh, weights, sums) -> torch.Tensor:
        """The gradient of the activation, from that of its norm; adds those of the norm and of the
        matrix after it."""
        moments = Moments.of(active_nf, self.norm, self.ranks)
        normed_nf = moments.normed(active_nf, weights.out_norm_weight, weights.out_norm_bias)
        sums.add_weight("out", grad_nh, normed_nf)
        back, shares = NormBackward.of(
            grad_nf, active_nf, moments, weights.out_norm_weight, self.ranks
        )
        sums.add_norm("out_norm", shares)
        return back.gradient(grad_nf, active_nf, weights.out_norm_weight).to(grad_nf.dtype)


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_lbh, mlp, *weights):
        ctx.mlp = mlp
        ctx.save_for_backward(x_lbh, *weights)
        weights = MLPWeights(*weights)
        out_lbh = torch.empty_like(x_lbh)
        for rows in tiles(len(x_lbh), mlp.tile_size):
            out_lbh[rows] = mlp.forward_tile(x_lbh[rows], weights)
        return out_lbh

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lbh):
        x_lbh, *weights = ctx.saved_tensors
        weights = MLPWeights(*weights)
        sums = GradientSums(weights)
        grad_x_lbh = torch.empty_like(x_lbh)
        for rows in tiles(len(x_lbh), ctx.mlp.tile_size):
            grad_x_lbh[rows] = ctx.mlp.backward_tile(grad_lbh[rows], x_lbh[rows], weights, sums)
        return grad_x_lbh, None, *sums.gradients()
