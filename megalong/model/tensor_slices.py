"""The tensors that a parameter is made of, and the slices of it that tensor-parallel ranks hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalong.config import ModelConfig
from megalong.model.parameters import Packing, row_of, sizes


def views_of_parts(
    whole: torch.Tensor, heights: Sequence[int], packing: Packing, model: ModelConfig
) -> Sequence[torch.Tensor]:
    """Return the parts of a whole parameter, views: (rows, ...), of a GROUPED one (kv heads, rows
    of a head, ...). heights: rows of each part. model: resolved."""
    if packing is not Packing.GROUPED:
        return whole.split(heights)
    heads = model.num_query_groups
    return whole.unflatten(0, (heads, -1)).split([rows // heads for rows in heights], dim=1)


def split_parts(
    whole: torch.Tensor, heights: Sequence[int], packing: Packing, model: ModelConfig
) -> list[torch.Tensor]:
    """Return the parts of a whole parameter as (rows, ...) each; see `views_of_parts`."""
    parts = views_of_parts(whole, heights, packing, model)
    return [part.flatten(0, 1) for part in parts] if packing is Packing.GROUPED else list(parts)


def join_parts(parts: Sequence[torch.Tensor], packing: Packing, model: ModelConfig) -> torch.Tensor:
    """Return the whole parameter again: undo `split_parts`."""
    if packing is not Packing.GROUPED:
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    heads = model.num_query_groups
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)


def matrix_shapes(
    name: str, model: ModelConfig, split_queries: bool = True
) -> list[tuple[int, ...]]:
    """Return (rows, columns) of the matrices in a parameter of a layer. model: resolved.
    split_queries: whether queries, keys and values are three."""
    shapes = [part.size(sizes(model, 0)) for part in row_of(name).parts_of(model)]
    if split_queries or not holds_queries(name):
        return shapes
    return [(sum(rows for rows, _ in shapes), shapes[0][1])]


def split_matrices(name: str, whole: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """Return the matrices in a whole parameter of a layer, (rows, columns) each."""
    heights = [rows for rows, _ in matrix_shapes(name, model)]
    return split_parts(whole, heights, row_of(name).packing, model)


def join_matrices(name: str, matrices: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Return the whole parameter again: undo `split_matrices`."""
    return join_parts(matrices, row_of(name).packing, model)


def holds_queries(name: str) -> bool:
    """Return whether the parameter is the fused projection to queries, keys and values."""
    return row_of(name).packing is Packing.GROUPED


def cut_dimension(name: str) -> int | None:
    """Return the dimension along which tensor-parallel ranks divide a parameter, or None."""
    return row_of(name).cut


def tensor_slice(
    name: str, whole: torch.Tensor, rank: int, ranks: int, model: ModelConfig
) -> torch.Tensor:
    """Return the part of a whole parameter that tensor-parallel rank `rank` of `ranks` holds; a
    view, or a new tensor where the part is not in one piece."""
    cut = cut_dimension(name)
    if cut is None or ranks == 1:
        return whole
    pieces = [piece.chunk(ranks, cut)[rank] for piece in _pieces(name, whole, model)]
    return torch.cat(pieces, cut) if len(pieces) > 1 else pieces[0]


def join_slices(name: str, slices: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Return the whole parameter from the parts of all tensor-parallel ranks."""
    cut = cut_dimension(name)
    if cut is None or len(slices) == 1:
        return slices[0]
    pieces = zip(*(_pieces(name, part, model) for part in slices), strict=True)
    return torch.cat([torch.cat(piece, cut) for piece in pieces], cut)


def _pieces(name: str, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """What is divided one by one: of a gated MLP's first layer, gate and up projection."""
    row = row_of(name)
    return tensor.chunk(len(row.parts_of(model)) if row.packing is Packing.STACKED else 1)
