"""Whether a label is the likeliest token, from logits or from what they are made of.

Of several tokens that are equally likely the one with the least id counts, as in torch.argmax. The
vocabulary may be cut over tensor-parallel ranks. Nothing is recorded for autograd.

Shape suffixes: s rows, l rows of this rank's own, b batch, h hidden, v this rank's slice of the
vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalong.tiling.rows import tiles, wide, wide_product
from megalong.tiling.tensor_ranks import ALONE, TensorRanks


@torch.no_grad()
def is_likeliest(
    logits_sbv: torch.Tensor, labels_sb: torch.Tensor, ranks: TensorRanks = ALONE
) -> torch.Tensor:
    """Bool (s, b). logits: (s, b, v), the slice of the vocabulary that begins at ranks.rank * v;
    labels: integers (s, b), any."""
    largest_sb, token_sb = logits_sbv.max(-1)
    token_sb += ranks.rank * logits_sbv.shape[-1]
    return _of_whole_vocabulary(largest_sb, token_sb, ranks) == labels_sb


@torch.no_grad()
def linear_is_likeliest(
    hidden_lbh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_sb: torch.Tensor,
    *,
    chunk_size: int,
    ranks: TensorRanks = ALONE,
) -> torch.Tensor:
    """The same of the logits hidden @ weight.T, which exist for a chunk of rows at a time.

    Arguments as `megalong.tiling.linear_cross_entropy` has them.
    """
    token_sb = torch.empty_like(labels_sb)
    largest_sb = hidden_lbh.new_empty(labels_sb.shape, dtype=wide(hidden_lbh.dtype))
    for rows in tiles(len(hidden_lbh), max(chunk_size // ranks.shares, 1)):
        x_rbh = ranks.enter(hidden_lbh[rows])
        largest_n, token_n = wide_product(x_rbh.flatten(0, 1), weight_vh.T).max(1)
        ranks.put_tile(largest_sb, rows, largest_n.view(x_rbh.shape[:2]))
        ranks.put_tile(token_sb, rows, token_n.view(x_rbh.shape[:2]))
    token_sb += ranks.rank * len(weight_vh)
    return _of_whole_vocabulary(largest_sb, token_sb, ranks) == labels_sb


def _of_whole_vocabulary(
    largest_sb: torch.Tensor, token_sb: torch.Tensor, ranks: TensorRanks
) -> torch.Tensor:
    """The likeliest tokens, from those of all ranks' slices and their logits."""
    if ranks.size == 1:
        return token_sb
    of_all_sb = largest_sb.clone()
    dist.all_reduce(of_all_sb, dist.ReduceOp.MAX, ranks.group)
    no_token = torch.iinfo(token_sb.dtype).max
    token_sb = token_sb.masked_fill(largest_sb != of_all_sb, no_token)
    dist.all_reduce(token_sb, dist.ReduceOp.MIN, ranks.group)
    return token_sb
