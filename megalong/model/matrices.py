"""The matrices that a parameter of a layer is made of: one, or those of queries, keys and values,
or gate and up projection of a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalong.config import ModelConfig
from megalong.model.parameters import Packing, row_of, sizes


def matrix_shapes(
    name: str, model: ModelConfig, split_queries: bool = True
) -> list[tuple[int, ...]]:
    """(rows, columns) of the matrices in a parameter of a layer. model: resolved. split_queries:
    whether queries, keys and values are three."""
    shapes = [part.size(sizes(model, 0)) for part in row_of(name).parts_of(model)]
    if split_queries or not holds_queries(name):
        return shapes
    return [(sum(rows for rows, _ in shapes), shapes[0][1])]


def split_matrices(name: str, whole: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """The matrices in a whole parameter, (rows, columns) each. model: resolved."""
    row, words = row_of(name), sizes(model, 0)
    heights = [part.size(words)[0] for part in row.parts_of(model)]
    if row.packing is not Packing.GROUPED:
        return list(whole.split(heights))
    heads = model.num_query_groups
    parts = whole.unflatten(0, (heads, -1)).split([rows // heads for rows in heights], dim=1)
    return [part.flatten(0, 1) for part in parts]


def join_matrices(name: str, matrices: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """The whole parameter again: undoes `split_matrices`."""
    if row_of(name).packing is not Packing.GROUPED:
        return torch.cat(list(matrices)) if len(matrices) > 1 else matrices[0]
    heads = model.num_query_groups
    return torch.cat([part.unflatten(0, (heads, -1)) for part in matrices], dim=1).flatten(0, 1)


def holds_queries(name: str) -> bool:
    """Whether the parameter is the fused projection to queries, keys and values."""
    return row_of(name).packing is Packing.GROUPED
