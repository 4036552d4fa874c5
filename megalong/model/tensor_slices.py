"""Which part of a parameter a tensor-parallel rank holds: one table, by canonical name.

Column-parallel matrices are cut along their outputs, row-parallel ones along their inputs, the
embedding along the vocabulary (Megatron-LM, arXiv 1909.08053, section 3). Everything else is whole
on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_CUT_DIMENSION = {
    "self_attention.linear_qkv": 0,
    "mlp.linear_fc1": 0,
    "self_attention.linear_proj": 1,
    "mlp.linear_fc2": 1,
    "embedding.word_embeddings": 0,
    "output_layer": 0,
}


def cut_dimension(name: str) -> int | None:
    """The dimension along which tensor-parallel ranks divide a parameter, or None."""
    module, kind = name.rsplit(".", 1)
    for suffix, dimension in _CUT_DIMENSION.items():
        if module.endswith(suffix):
            # The bias of a row-parallel layer is added once, after the ranks' sums.
            return None if dimension == 1 and kind == "bias" else dimension
    return None


def tensor_slice(
    name: str, whole: torch.Tensor, rank: int, ranks: int, gated: bool
) -> torch.Tensor:
    """The part of a whole parameter that tensor-parallel rank `rank` of `ranks` holds; a view, or
    a new tensor where the part is not in one piece.

    gated: the MLP's first layer holds gate and up projection, one above the other, and a rank has
    a part of each.
    """
    dimension = cut_dimension(name)
    if dimension is None or ranks == 1:
        return whole
    pieces = [half.chunk(ranks, dimension)[rank] for half in _halves(name, whole, gated)]
    return torch.cat(pieces, dimension) if len(pieces) > 1 else pieces[0]


def join_slices(name: str, slices: Sequence[torch.Tensor], gated: bool) -> torch.Tensor:
    """The whole parameter from the parts of all tensor-parallel ranks: undoes `tensor_slice`."""
    dimension = cut_dimension(name)
    if dimension is None or len(slices) == 1:
        return slices[0]
    halves = zip(*(_halves(name, part, gated) for part in slices), strict=True)
    return torch.cat([torch.cat(half, dimension) for half in halves], dimension)


def _halves(name: str, tensor: torch.Tensor, gated: bool) -> tuple[torch.Tensor, ...]:
    return tensor.chunk(2) if gated and "linear_fc1" in name else (tensor,)
