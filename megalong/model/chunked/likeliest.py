"""Whether a label is the likeliest token, from logits or from what they are made of.

Of several tokens that are equally likely the one with the least id counts, as in torch.argmax. The
vocabulary may be cut over tensor-parallel ranks, and have rows at its end that only fill it up: no
model that is exported has them, so that they are never the likeliest. Nothing is recorded for
autograd.

Shape suffixes: s rows, l rows of this rank's own, b batch, h hidden, v this rank's slice of the
vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from megalong.model.chunked.rows import tiles, wide, wide_product
from megalong.model.chunked.tensor_ranks import ALONE, TensorRanks


@torch.no_grad()
def is_likeliest(
    logits_sbv: torch.Tensor,
    labels_sb: torch.Tensor,
    ranks: TensorRanks = ALONE,
    used_rows: int | None = None,
) -> torch.Tensor:
    """Bool (s, b). logits: (s, b, v), the slice of the vocabulary that begins at ranks.rank * v;
    labels: integers (s, b), any. used_rows: of the whole vocabulary, those from there on fill it
    up; None: none does."""
    used = _Used.of(logits_sbv.shape[-1], ranks, used_rows)
    largest_sb, token_sb = logits_sbv[..., used.looked_at].max(-1)
    return _of_whole_vocabulary(largest_sb, token_sb, ranks, used) == labels_sb


@torch.no_grad()
def likeliest(
    logits_nv: torch.Tensor, ranks: TensorRanks = ALONE, used_rows: int | None = None
) -> torch.Tensor:
    """The likeliest tokens themselves, int64 (n,). logits: (n, v), else as of `is_likeliest`."""
    used = _Used.of(logits_nv.shape[-1], ranks, used_rows)
    largest_n, token_n = logits_nv[..., used.looked_at].max(-1)
    return _of_whole_vocabulary(largest_n, token_n, ranks, used)


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
    """The same of the logits hidden @ weight.T, which exist for a chunk of rows at a time.

    Arguments as `megalong.model.chunked.linear_cross_entropy` and `is_likeliest` have them.
    """
    used = _Used.of(len(weight_vh), ranks, used_rows)
    weight_vh = weight_vh[used.looked_at]
    token_sb = torch.empty_like(labels_sb)
    largest_sb = hidden_lbh.new_empty(labels_sb.shape, dtype=wide(hidden_lbh.dtype))
    for rows in tiles(len(hidden_lbh), max(chunk_size // ranks.shares, 1)):
        x_rbh = ranks.enter(hidden_lbh[rows])
        largest_n, token_n = wide_product(x_rbh.flatten(0, 1), weight_vh.T).max(1)
        ranks.put_tile(largest_sb, rows, largest_n.view(x_rbh.shape[:2]))
        ranks.put_tile(token_sb, rows, token_n.view(x_rbh.shape[:2]))
    return _of_whole_vocabulary(largest_sb, token_sb, ranks, used) == labels_sb


class _Used(NamedTuple):
    """Of a rank's slice of the vocabulary: its first id, and how many are no filling."""

    first: int
    size: int

    @classmethod
    def of(cls, rows: int, ranks: TensorRanks, used_rows: int | None) -> _Used:
        first = ranks.rank * rows
        return cls(first, rows if used_rows is None else min(max(used_rows - first, 0), rows))

    @property
    def looked_at(self) -> slice:
        """At least one row, of which there is a largest logit."""
        return slice(max(self.size, 1))


def _of_whole_vocabulary(
    largest_sb: torch.Tensor, token_sb: torch.Tensor, ranks: TensorRanks, used: _Used
) -> torch.Tensor:
    """The likeliest tokens, from those of all ranks' slices, counted in these, and their logits,
    both of which may be overwritten."""
    token_sb += used.first
    if not used.size:
        largest_sb.fill_(-torch.inf)
    if ranks.size == 1:
        return token_sb
    of_all_sb = largest_sb.clone()
    dist.all_reduce(of_all_sb, dist.ReduceOp.MAX, ranks.group)
    no_token = torch.iinfo(token_sb.dtype).max
    token_sb = token_sb.masked_fill(largest_sb != of_all_sb, no_token)
    dist.all_reduce(token_sb, dist.ReduceOp.MIN, ranks.group)
    return token_sb
