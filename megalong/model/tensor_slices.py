"""Which part of a parameter a tensor-parallel rank holds, and the whole out of the parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalong.config import ModelConfig
from megalong.model.parameters import Packing, Row, row_of


def cut_dimension(name: str) -> int | None:
    """The dimension along which tensor-parallel ranks divide a parameter, or None."""
    return row_of(name).cut


def tensor_slice(
    name: str, whole: torch.Tensor, rank: int, ranks: int, model: ModelConfig
) -> torch.Tensor:
    """The part of a whole parameter that tensor-parallel rank `rank` of `ranks` holds; a view, or
    a new tensor where the part is not in one piece."""
    row = row_of(name)
    if row.cut is None or ranks == 1:
        return whole
    pieces = [piece.chunk(ranks, row.cut)[rank] for piece in _pieces(row, whole, model)]
    return torch.cat(pieces, row.cut) if len(pieces) > 1 else pieces[0]


def join_slices(name: str, slices: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """The whole parameter from the parts of all tensor-parallel ranks: undoes `tensor_slice`."""
    row = row_of(name)
    if row.cut is None or len(slices) == 1:
        return slices[0]
    pieces = zip(*(_pieces(row, part, model) for part in slices), strict=True)
    return torch.cat([torch.cat(piece, row.cut) for piece in pieces], row.cut)


def _pieces(row: Row, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """What is divided one by one: of a gated MLP's first layer, gate and up projection."""
    if row.packing is Packing.STACKED:
        return tensor.chunk(len(row.parts_of(model)))
    return (tensor,)
