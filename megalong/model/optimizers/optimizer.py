"""What the rest of megalong knows of an optimizer: what it keeps, and how it is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch

from megalong.config.training import TrainingConfig


class WholeMatrices(Protocol):
    """What an optimizer that needs whole matrices knows of how a partition is cut out of them."""

    def updates(
        self,
        direction: Callable[[int, int], torch.Tensor],
        update_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Of each matrix, where this rank's piece of it begins in the partition, and the update of
        this piece, flat. Called by all ranks that share the matrices.

        direction: the elements [start, stop) of the partition of what the matrices are made of, a
        new tensor. update_of: from one whole matrix, of these, to its update.
        """
        ...


class Optimizer(ABC):
    """One of PyTorch's optimizers, with the settings of a run.

    ZeRO steps it on flat partitions, which are cut anywhere in a parameter. So whatever it keeps of
    a parameter is elementwise: float32 tensors of the parameter's shape, zero before the first
    step. A factored state, such as Adafactor's sums over rows and columns, does not fit.

    moments: the names of these tensors, in PyTorch's state and in a checkpoint, of any parameter.
    deepspeed_types: the names by which a DeepSpeed file may ask for it, its own first.
    flags: how the names of its own settings begin.
    layer_matrices_apart: whether the matrices of the layers have a parameter group of their own,
        with a true "layer_matrices", and are seen whole (`WholeMatrices`).
    """

    moments: ClassVar[tuple[str, ...]]
    deepspeed_types: ClassVar[tuple[str, ...]]
    flags: ClassVar[tuple[str, ...]]
    layer_matrices_apart: ClassVar[bool] = False

    def __init__(self, training: TrainingConfig):
        self.training = training

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        """PyTorch's optimizer for these parameter groups, each with its `weight_decay`.

        fused: with one kernel for many tensors, on a GPU, where PyTorch has such a one.
        """

    def moments_of(self, is_layer_matrix: bool) -> tuple[str, ...]:
        """Those of its `moments` that it keeps of such a parameter."""
        return self.moments

    def matrix_products(self, rows: int, columns: int) -> tuple[int, ...]:
        """FLOPs of each product in the update of a whole matrix of a layer."""
        return ()

    def first_state(
        self, partition: torch.Tensor, fused: bool, of_layer_matrices: bool = False
    ) -> dict[str, torch.Tensor]:
        """The state that PyTorch's optimizer would give a partition at its first step."""
        moments = self.moments_of(of_layer_matrices)
        return {name: torch.zeros_like(partition, dtype=torch.float32) for name in moments}

    def set_step(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Tell the state of a partition how many steps were taken, where PyTorch's counts them."""
        if "step" in state:
            state["step"].fill_(step)

    @abstractmethod
    def deepspeed_params(self) -> dict[str, tuple[Any, str]]:
        """The `optimizer.params` of a DeepSpeed file that flags own: the value, and the flag."""
