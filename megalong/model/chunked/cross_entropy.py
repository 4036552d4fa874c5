"""Token losses and likeliest tokens, from logits, or without the logits of all tokens from hidden
states and the output layer's weight.

Logits exist for a chunk of rows at a time: the forward pass keeps their logsumexp of each row, and
the backward pass makes them again. They are float32, never rounded to 16 bits, and each pass makes
one reading of them: one Triton kernel on a GPU; the PyTorch code works in place. The vocabulary may
be cut over tensor-parallel ranks, as Megatron-core's output layer has it.

Shape suffixes: s rows, l rows of this rank's own, r rows of a chunk, b batch, h hidden, v this
rank's slice of the vocabulary; n = r x b.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megalong.model.chunked.rows import (
    ALONE,
    TensorRanks,
    add_weight_gradient,
    require_dense_rows,
    tiles,
    wide,
    wide_product,
)
from megalong.model.chunked.triton import kernels_for

# Operators, so that fake tensors run no kernel. Not torch.library.custom_op: slow to call.
torch.library.define(
    "megalong::read_logits_", "(Tensor(a!) logits, Tensor labels, int first) -> (Tensor, Tensor)"
)
torch.library.define(
    "megalong::differentiate_logits_",
    "(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor grad, int first, Tensor(b!)? out) -> ()",
)


def read_logits_(
    logits_nv: torch.Tensor, labels_n: torch.Tensor, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows' logsumexp, and the logits of their labels, 0 where the slice has not the
    label.

    logits: float32 or float64, not to be used after. labels: int64, any. first: the label of the
    slice's first column. Nothing is recorded for autograd. Raises ValueError where the numbers of a
    row are not side by side.
    """
    require_dense_rows(logits_nv)
    return torch.ops.megalong.read_logits_(logits_nv, labels_n, first)


def differentiate_logits_(
    logits_nv: torch.Tensor,
    labels_n: torch.Tensor,
    lse_n: torch.Tensor,
    grad_n: torch.Tensor,
    first: int = 0,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the gradient of the logits: (softmax - 1 at the label) * that of the row's loss.

    Arguments as of `read_logits_`; lse: of the whole vocabulary. Returns (n, v) in dtype: the
    logits, overwritten, where dtype is theirs; else a new tensor, and the logits are not to be used
    after. Nothing is recorded for autograd. Raises ValueError as `read_logits_` does.
    """
    require_dense_rows(logits_nv)
    out_nv = None if dtype == logits_nv.dtype else torch.empty_like(logits_nv, dtype=dtype)
    torch.ops.megalong.differentiate_logits_(logits_nv, labels_n, lse_n, grad_n, first, out_nv)
    return logits_nv if out_nv is None else out_nv


def places(labels_n: torch.Tensor, size: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels' columns in the slice, and whether it has them: (n, 1)."""
    place_n1 = labels_n[:, None] - first
    return place_n1.clamp(0, size - 1), (place_n1 >= 0) & (place_n1 < size)


@torch.library.impl("megalong::read_logits_", "CompositeExplicitAutograd")
def _(logits_nv, labels_n, first):
    if on_gpu := kernels_for(logits_nv):
        results = empty_results(logits_nv, labels_n, first)
        on_gpu.read(logits_nv, labels_n, first, *results)
        return results
    place_n1, here_n1 = places(labels_n, logits_nv.shape[1], first)
    target_n1 = logits_nv.gather(1, place_n1).masked_fill_(~here_n1, 0.0)
    largest_n1 = logits_nv.amax(1, keepdim=True)
    # In place: torch.logsumexp would need the memory of the logits once more.
    sum_n1 = logits_nv.sub_(largest_n1).exp_().sum(1, keepdim=True)
    return sum_n1.log_().add_(largest_n1).squeeze(1), target_n1.squeeze(1)


@torch.library.impl("megalong::differentiate_logits_", "CompositeExplicitAutograd")
def _(logits_nv, labels_n, lse_n, grad_n, first, out_nv):
    out_nv = logits_nv if out_nv is None else out_nv
    if on_gpu := kernels_for(out_nv):
        return on_gpu.differentiate(logits_nv, labels_n, lse_n, grad_n, first, out_nv)
    place_n1, here_n1 = places(labels_n, logits_nv.shape[1], first)
    softmax_nv = logits_nv.sub_(lse_n[:, None]).exp_()
    softmax_nv.scatter_add_(1, place_n1, here_n1.to(logits_nv.dtype).neg_())
    torch.mul(softmax_nv, grad_n[:, None], out=out_nv)


@torch.library.register_fake("megalong::read_logits_")
def empty_results(logits, labels, first):
    """Room for logsumexp and the labels' logits."""
    return logits.new_empty(len(logits)), logits.new_empty(len(logits))


@torch.library.register_fake("megalong::differentiate_logits_")
def _(logits, labels, lse, grad, first, out):
    pass


def linear_cross_entropy(
    hidden_sbh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_sb: torch.Tensor,
    *,
    chunk_size: int,
    ranks: TensorRanks = ALONE,
    with_logsumexp: bool = False,
) -> torch.Tensor:
    """Return the cross entropy of softmax(hidden @ weight.T) with the labels, in nats: (s, b), in
    the wide dtype; (2, s, b) with_logsumexp, of which the second is the logsumexp of the logits.

    hidden: (s, b, h), or this rank's share of it (l, b, h) where the ranks divide the rows.
    weight: (v, h), the slice of the vocabulary that begins at ranks.rank * v.
    labels: integers (s, b), of all rows, from 0 to the whole vocabulary's end; a token that is to
        be ignored may have any of them, and a loss that nothing depends on.
    chunk_size: rows of s whose logits exist at a time, times b; at least one of each rank's share.
    """
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
            lse_n, target_n = read_logits_(
                wide_product(x_nh, weight_vh.T), labels_rb.flatten(), ctx.first
            )
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
                wide_product(x_nh, weight_vh.T),
                labels_n,
                lse_n,
                grad_n,
                ctx.first,
                dtype=x_nh.dtype,
            )
            if grad_lse_sb is not None:
                grad_lse_n = ranks.tile(grad_lse_sb, rows).flatten()
                place_n1, here_n1 = places(labels_n, grad_nv.shape[1], ctx.first)
                grad_nv.scatter_add_(1, place_n1, (grad_lse_n[:, None] * here_n1).to(grad_nv.dtype))
            add_weight_gradient(grad_weight_vh, grad_nv, x_nh)
            grad_hidden_lbh[rows] = ranks.leave((grad_nv @ weight_vh).view_as(x_rbh))
            del grad_nv  # before the next chunk's logits
        return grad_hidden_lbh, grad_weight_vh.to(weight_vh.dtype), None, None, None, None


def _of_whole_vocabulary(
    lse_sb: torch.Tensor, target_sb: torch.Tensor, ranks: TensorRanks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logsumexp and the label's logit, from those of all ranks' slices."""
    largest_sb = lse_sb.clone()
    dist.all_reduce(largest_sb, dist.ReduceOp.MAX, ranks.group)
    sums_2sb = torch.stack((lse_sb.sub_(largest_sb).exp_(), target_sb))
    dist.all_reduce(sums_2sb, group=ranks.group)
    return largest_sb.add_(sums_2sb[0].log_()), sums_2sb[1]


@torch.no_grad()
def is_likeliest(
    logits_sbv: torch.Tensor,
    labels_sb: torch.Tensor,
    ranks: TensorRanks = ALONE,
    used_rows: int | None = None,
) -> torch.Tensor:
    """Return whether each label is the likeliest token, bool (s, b); see `likeliest`."""
    return likeliest(logits_sbv, ranks, used_rows) == labels_sb


@torch.no_grad()
def likeliest(
    logits_nv: torch.Tensor, ranks: TensorRanks = ALONE, used_rows: int | None = None
) -> torch.Tensor:
    """Return the likeliest tokens, int64; of several that are equally likely the least id.

    logits: (..., v), the slice of the vocabulary that begins at ranks.rank * v. used_rows: of the
    whole vocabulary, those from there on only fill it up and are never the likeliest; None: all.
    """
    rows = logits_nv.shape[-1]
    largest_n, token_n = logits_nv[..., : _looked_at(rows, ranks, used_rows)].max(-1)
    return _likeliest_of_all(largest_n, token_n, rows, ranks, used_rows)


@torch.no_grad()
def linear_is_likeliest(
    hidden_lbh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_sb: torch.Tensor,
    *,
    chunk_size: int,
    ranks: TensorRanks = ALONE,
    used_rows: int | None = None,
) -> torch.Tensor:
    """Return the same of the logits hidden @ weight.T, which exist for a chunk of rows at a time.

    Arguments as of `linear_cross_entropy` and `likeliest`.
    """
    used_vh = weight_vh[: _looked_at(len(weight_vh), ranks, used_rows)]
    token_sb = torch.empty_like(labels_sb)
    largest_sb = hidden_lbh.new_empty(labels_sb.shape, dtype=wide(hidden_lbh.dtype))
    for rows in tiles(len(hidden_lbh), max(chunk_size // ranks.shares, 1)):
        x_rbh = ranks.enter(hidden_lbh[rows])
        largest_n, token_n = wide_product(x_rbh.flatten(0, 1), used_vh.T).max(1)
        ranks.put_tile(largest_sb, rows, largest_n.view(x_rbh.shape[:2]))
        ranks.put_tile(token_sb, rows, token_n.view(x_rbh.shape[:2]))
    return _likeliest_of_all(largest_sb, token_sb, len(weight_vh), ranks, used_rows) == labels_sb


def _looked_at(rows: int, ranks: TensorRanks, used_rows: int | None) -> int:
    """How many rows of this rank's slice are used; at least one, of which there is a largest."""
    return rows if used_rows is None else min(max(used_rows - ranks.rank * rows, 1), rows)


def _likeliest_of_all(
    largest_sb: torch.Tensor,
    token_sb: torch.Tensor,
    rows: int,
    ranks: TensorRanks,
    used_rows: int | None,
) -> torch.Tensor:
    """The likeliest tokens, from those of all ranks' slices, counted in these, and their logits,
    both of which may be overwritten."""
    first = ranks.rank * rows
    token_sb += first
    if used_rows is not None and used_rows <= first:
        largest_sb.fill_(-torch.inf)
    if ranks.size == 1:
        return token_sb
    of_all_sb = largest_sb.clone()
    dist.all_reduce(of_all_sb, dist.ReduceOp.MAX, ranks.group)
    no_token = torch.iinfo(token_sb.dtype).max
    token_sb = token_sb.masked_fill(largest_sb != of_all_sb, no_token)
    dist.all_reduce(token_sb, dist.ReduceOp.MIN, ranks.group)
    return token_sb
