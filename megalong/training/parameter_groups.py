"""The engine's parameter groups and their state; whole matrices for optimizers that need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megalong.config import Config
from megalong.model.optimizers import Optimizer
from megalong.model.parameters import decays, is_layer_matrix
from megalong.model.stage import PipelineStage, named_parameters
from megalong.model.tensor_slices import (
    holds_queries,
    join_matrices,
    join_slices,
    split_matrices,
    tensor_slice,
)
from megalong.parallel.deepspeed_private import (
    link_state,
    partitions,
    piece_of,
    stepping_optimizer,
)
from megalong.parallel.mesh import Mesh
from megalong.parallel.whole_matrices import DividedMatrices, DividedMatrix


def parameter_groups(
    model: PipelineStage, optimizer: Optimizer, weight_decay: float
) -> list[dict[str, Any]]:
    """Make the parameter groups, as many on each pipeline stage: weight decay on matrices only;
    those of the layers apart, where the optimizer wants it."""
    named = list(named_parameters(model))
    matrices = [parameter for name, parameter in named if decays(name)]
    vectors = [parameter for name, parameter in named if not decays(name)]
    if not optimizer.layer_matrices_apart:
        return [_group(matrices, weight_decay), _group(vectors, 0.0)]
    of_layers = [parameter for name, parameter in named if is_layer_matrix(name)]
    others = [p for name, p in named if decays(name) and not is_layer_matrix(name)]
    rest = _group(others, weight_decay)
    if not others:
        # A stage without embedding and output layer. DeepSpeed drops empty groups, but the stages
        # sum up the norms of their gradients group by group.
        rest = _group([vectors.pop()], 0.0)
    return [_group(of_layers, weight_decay, layer_matrices=True), rest, _group(vectors, 0.0)]


def _group(
    parameters: list[torch.nn.Parameter], weight_decay: float, **more: Any
) -> dict[str, Any]:
    return {"params": parameters, "weight_decay": weight_decay, **more}


def create_state(engine: Any, optimizer: Optimizer, fused: bool) -> None:
    """Give every partition its optimizer state now: at PyTorch's first step, ZeRO 1 and 2 would
    ask for that of all groups when the first alone has it."""
    stepping = stepping_optimizer(engine)
    of_matrices = {
        id(partition)
        for group in stepping.param_groups
        if group.get("layer_matrices")
        for partition in group["params"]
    }
    for partition in partitions(engine):
        state = optimizer.first_state(partition, fused, id(partition) in of_matrices)
        stepping.state[partition] = state
    link_state(engine)


def show_whole_matrices(engine: Any, model: PipelineStage, config: Config, mesh: Mesh) -> None:
    """Give the group of the layers' matrices its "whole_matrices" (`WholeMatrices`)."""
    [group] = [g for g in stepping_optimizer(engine).param_groups if g.get("layer_matrices")]
    [partition] = group["params"]
    matrices = [
        DividedMatrix(parameter.shape, piece, *_whole_and_back(name, config, mesh))
        for name, parameter in named_parameters(model)
        if is_layer_matrix(name) and (piece := piece_of(parameter)) is not None
    ]
    group["whole_matrices"] = DividedMatrices(
        matrices, partition.numel(), mesh.replica_group, mesh.tensor_group
    )


def _whole_and_back(name: str, config: Config, mesh: Mesh):
    """`DividedMatrix.matrices` and `slice_of` of a parameter."""
    model, rank, ranks = config.model, mesh.tensor_parallel_rank, mesh.tensor_parallel_size
    splits = config.training.muon_split_qkv or not holds_queries(name)

    def matrices(slices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        whole = join_slices(name, slices, model)
        return split_matrices(name, whole, model) if splits else [whole]

    def slice_of(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = join_matrices(name, matrices, model) if splits else matrices[0]
        return tensor_slice(name, whole, rank, ranks, model)

    return matrices, slice_of
