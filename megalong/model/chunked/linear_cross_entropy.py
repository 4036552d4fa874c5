"""Token losses from hidden states and the output layer's weight, without the logits of all tokens.

Logits exist for a chunk of rows at a time: the forward pass keeps their logsumexp of each row, and
the backward pass makes them again. They are float32, never rounded to 16 bits. The vocabulary may
be cut over tensor-parallel ranks, as Megatron-core's output layer has it.

Shape suffixes: s rows, l rows of this rank's own, r rows of a chunk, b batch, h hidden, v this
rank's slice of the vocabulary; n = r x b.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megalong.model.chunked.cross_entropy import add_at_labels_, differentiate_logits_, read_logits_
from megalong.model.chunked.rows import add_weight_gradient, tiles, wide, wide_product
from megalong.model.chunked.tensor_ranks import ALONE, TensorRanks


def linear_cross_entropy(
    hidden_sbh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_sb: torch.Tensor,
    *,
    chunk_size: int,
    ranks: TensorRanks = ALONE,
    with_logsumexp: bool = False,
) -> torch.Tensor:
    """Cross entropy of softmax(hidden @ weight.T) with the labels, in nats: (s, b), float32, or
    float64 for float64 inputs. with_logsumexp: (2, s, b), of which the second is the logsumexp of a
    row's logits.

    hidden: (s, b, h), or this rank's share of it (l, b, h) where the ranks divide the rows.
    weight: (v, h), the slice of the vocabulary that begins at ranks.rank * v.
    labels: integers (s, b), of all rows, from 0 to the whole vocabulary's end; a token that is to
        be ignored may have any of them, and a loss that nothing depends on.
    chunk_size: rows of s whose logits exist at a time, times b; at least one of each rank's share.
    Raises ValueError where chunk_size is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"a chunk must have at least one row, got {chunk_size}")
    apply = _LinearCrossEntropy.apply
    return apply(hidden_sbh, weight_vh, labels_sb, chunk_size, ranks, with_logsumexp)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_lbh, weight_vh, labels_sb, chunk_size, ranks, with_logsumexp):
        ctx.ranks, ctx.chunk = ranks, max(chunk_size // ranks.shares, 1)
        ctx.first = ranks.rank * len(weight_vh)  # the label of this rank's first logit
        lse_sb = hidden_lbh.new_empty(labels_sb.shape, dtype=wide(hidden_lbh.dtype))
        target_sb = torch.empty_like(lse_sb)  # the logit of the label
        for rows in tiles(len(hidden_lbh), ctx.chunk):
            x_nh = ranks.enter(hidden_lbh[rows]).flatten(0, 1)
            labels_rb = ranks.tile(labels_sb, rows)
            lse_n, target_n = read_logits_(_logits(x_nh, weight_vh), labels_rb.flatten(), ctx.first)
            ranks.put_tile(lse_sb, rows, lse_n.view_as(labels_rb))
            ranks.put_tile(target_sb, rows, target_n.view_as(labels_rb))
        if ranks.size > 1:
            lse_sb, target_sb = _of_whole_vocabulary(lse_sb, target_sb, ranks)
        ctx.save_for_backward(hidden_lbh, weight_vh, labels_sb, lse_sb)
        losses_sb = lse_sb - target_sb
        return torch.stack((losses_sb, lse_sb)) if with_logsumexp else losses_sb

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_sb, grad_lse_sb = grad if grad.dim() == 3 else (grad, None)
        # Both are of the logsumexp; of the label's logit the loss's alone.
        grad_both_sb = grad_sb if grad_lse_sb is None else grad_sb + grad_lse_sb
        hidden_lbh, weight_vh, labels_sb, lse_sb = ctx.saved_tensors
        ranks = ctx.ranks
        grad_hidden_lbh = torch.empty_like(hidden_lbh)
        grad_weight_vh = torch.zeros_like(weight_vh, dtype=wide(weight_vh.dtype))
        for rows in tiles(len(hidden_lbh), ctx.chunk):
            x_rbh = ranks.enter(hidden_lbh[rows])
            x_nh = x_rbh.flatten(0, 1)
            labels_n, lse_n, grad_n = (
                ranks.tile(whole_sb, rows).flatten()
                for whole_sb in (labels_sb, lse_sb, grad_both_sb)
            )
            grad_nv = differentiate_logits_(
                _logits(x_nh, weight_vh), labels_n, lse_n, grad_n, ctx.first, dtype=x_nh.dtype
            )
            if grad_lse_sb is not None:
                grad_lse_n = ranks.tile(grad_lse_sb, rows).flatten()
                add_at_labels_(grad_nv, labels_n, grad_lse_n, ctx.first)
            add_weight_gradient(grad_weight_vh, grad_nv, x_nh)
            grad_hidden_lbh[rows] = ranks.leave((grad_nv @ weight_vh).view_as(x_rbh))
            del grad_nv  # before the next chunk's logits
        return grad_hidden_lbh, grad_weight_vh.to(weight_vh.dtype), None, None, None, None


def _logits(x_nh: torch.Tensor, weight_vh: torch.Tensor) -> torch.Tensor:
    return wide_product(x_nh, weight_vh.T)


def _of_whole_vocabulary(
    lse_sb: torch.Tensor, target_sb: torch.Tensor, ranks: TensorRanks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logsumexp and the label's logit, from those of all ranks' slices: two small collectives for
    all chunks."""
    largest_sb = lse_sb.clone()
    dist.all_reduce(largest_sb, dist.ReduceOp.MAX, ranks.group)
    sums_2sb = torch.stack((lse_sb.sub_(largest_sb).exp_(), target_sb))
    dist.all_reduce(sums_2sb, group=ranks.group)
    return largest_sb.add_(sums_2sb[0].log_()), sums_2sb[1]
