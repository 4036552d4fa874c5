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

from megalong.tiling.rows import add_weight_gradient, tiles, wide, wide_product
from megalong.tiling.tensor_ranks import ALONE, TensorRanks


def linear_cross_entropy(
    hidden_sbh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_sb: torch.Tensor,
    *,
    chunk_size: int,
    ranks: TensorRanks = ALONE,
) -> torch.Tensor:
    """Cross entropy of softmax(hidden @ weight.T) with the labels, in nats: (s, b), float32, or
    float64 for float64 inputs.

    hidden: (s, b, h), or this rank's share of it (l, b, h) where the ranks divide the rows.
    weight: (v, h), the slice of the vocabulary that begins at ranks.rank * v.
    labels: integers (s, b), of all rows, from 0 to the whole vocabulary's end; a token that is to
        be ignored may have any of them, and a loss that nothing depends on.
    chunk_size: rows of s whose logits exist at a time, times b; at least one of each rank's share.
    Raises ValueError where chunk_size is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"a chunk must have at least one row, got {chunk_size}")
    return _LinearCrossEntropy.apply(hidden_sbh, weight_vh, labels_sb, chunk_size, ranks)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_lbh, weight_vh, labels_sb, chunk_size, ranks):
        ctx.ranks, ctx.chunk = ranks, max(chunk_size // ranks.shares, 1)
        lse_sb = hidden_lbh.new_empty(labels_sb.shape, dtype=wide(hidden_lbh.dtype))
        target_sb = torch.empty_like(lse_sb)  # the logit of the label
        for rows in tiles(len(hidden_lbh), ctx.chunk):
            x_rbh = ranks.enter(hidden_lbh[rows])
            labels_rb = ranks.tile(labels_sb, rows)
            lse_rb, target_rb = _read_logits(x_rbh, weight_vh, labels_rb, ranks)
            ranks.put_tile(lse_sb, rows, lse_rb)
            ranks.put_tile(target_sb, rows, target_rb)
        if ranks.size > 1:
            lse_sb, target_sb = _of_whole_vocabulary(lse_sb, target_sb, ranks)
        ctx.save_for_backward(hidden_lbh, weight_vh, labels_sb, lse_sb)
        return lse_sb - target_sb

    @staticmethod
    def backward(ctx, grad_sb):
        hidden_lbh, weight_vh, labels_sb, lse_sb = ctx.saved_tensors
        ranks = ctx.ranks
        grad_hidden_lbh = torch.empty_like(hidden_lbh)
        grad_weight_vh = torch.zeros_like(weight_vh, dtype=wide(weight_vh.dtype))
        for rows in tiles(len(hidden_lbh), ctx.chunk):
            x_rbh = ranks.enter(hidden_lbh[rows])
            labels_rb, lse_rb, grad_rb = (
                ranks.tile(whole_sb, rows) for whole_sb in (labels_sb, lse_sb, grad_sb)
            )
            grad_nv = _grad_logits(grad_rb, x_rbh, weight_vh, labels_rb, lse_rb, ranks)
            add_weight_gradient(grad_weight_vh, grad_nv, x_rbh.flatten(0, 1))
            grad_hidden_lbh[rows] = ranks.leave((grad_nv @ weight_vh).view_as(x_rbh))
            del grad_nv  # before the next chunk's logits
        return grad_hidden_lbh, grad_weight_vh.to(weight_vh.dtype), None, None, None


def _logits(x_rbh: torch.Tensor, weight_vh: torch.Tensor) -> torch.Tensor:
    return wide_product(x_rbh.flatten(0, 1), weight_vh.T)


def _targets(
    labels_rb: torch.Tensor, weight_vh: torch.Tensor, ranks: TensorRanks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the labels are in this rank's slice of the vocabulary, and whether they are: (n, 1)."""
    size = len(weight_vh)
    place_n1 = labels_rb.reshape(-1, 1) - ranks.rank * size
    return place_n1.clamp(0, size - 1), (place_n1 >= 0) & (place_n1 < size)


def _read_logits(
    x_rbh: torch.Tensor, weight_vh: torch.Tensor, labels_rb: torch.Tensor, ranks: TensorRanks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a chunk, logsumexp over this rank's slice of the vocabulary, and the label's logit, or 0
    where the slice does not have the label: (r, b) each."""
    logits_nv = _logits(x_rbh, weight_vh)
    place_n1, here_n1 = _targets(labels_rb, weight_vh, ranks)
    target_n1 = logits_nv.gather(1, place_n1).masked_fill_(~here_n1, 0.0)
    largest_n1 = logits_nv.amax(1, keepdim=True)
    # In place: torch.logsumexp would need the memory of the logits once more.
    sum_n1 = logits_nv.sub_(largest_n1).exp_().sum(1, keepdim=True)
    lse_n1 = sum_n1.log_().add_(largest_n1)
    return lse_n1.view_as(labels_rb), target_n1.view_as(labels_rb)


def _of_whole_vocabulary(
    lse_sb: torch.Tensor, target_sb: torch.Tensor, ranks: TensorRanks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both of `_read_logits`, from those of all ranks: two small collectives for all chunks."""
    largest_sb = lse_sb.clone()
    dist.all_reduce(largest_sb, dist.ReduceOp.MAX, ranks.group)
    sums_2sb = torch.stack((lse_sb.sub_(largest_sb).exp_(), target_sb))
    dist.all_reduce(sums_2sb, group=ranks.group)
    return largest_sb.add_(sums_2sb[0].log_()), sums_2sb[1]


def _grad_logits(
    grad_rb: torch.Tensor,
    x_rbh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_rb: torch.Tensor,
    lse_rb: torch.Tensor,
    ranks: TensorRanks,
) -> torch.Tensor:
    """The gradient of a chunk's logits, (n, v), in the dtype of x: (softmax - 1 at the label) x
    the gradient of the loss."""
    grad_nv = _logits(x_rbh, weight_vh).sub_(lse_rb.reshape(-1, 1)).exp_()
    place_n1, here_n1 = _targets(labels_rb, weight_vh, ranks)
    grad_nv.scatter_add_(1, place_n1, here_n1.to(grad_nv.dtype).neg_())
    narrow = grad_nv.dtype != x_rbh.dtype
    out_nv = torch.empty_like(grad_nv, dtype=x_rbh.dtype) if narrow else grad_nv
    return torch.mul(grad_nv, grad_rb.reshape(-1, 1), out=out_nv)
