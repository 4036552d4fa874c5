"""What the rest of megalong knows of an optimizer: what it keeps, and how it is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from megalong.config.training import TrainingConfig


class Optimizer(ABC):
    """One of PyTorch's optimizers, with the settings of a run.

    ZeRO steps it on flat partitions, which are cut anywhere in a parameter. So whatever it keeps of
    a parameter is elementwise: float32 tensors of the parameter's shape, zero before the first
    step. A factored state, such as Adafactor's sums over rows and columns, does not fit.

    moments: the names of these tensors, in PyTorch's state and in a checkpoint.
    deepspeed_types: the names by which a DeepSpeed file may ask for it, its own first.
    """

    moments: ClassVar[tuple[str, ...]]
    deepspeed_types: ClassVar[tuple[str, ...]]

    def __init__(self, training: TrainingConfig):
        self.training = training

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        """PyTorch's optimizer for these parameter groups, each with its `weight_decay`.

        fused: with one kernel for many tensors, on a GPU, where PyTorch has such a one.
        """

    def first_state(self, partition: torch.Tensor, fused: bool) -> dict[str, torch.Tensor]:
        """The state that PyTorch's optimizer would give a partition at its first step."""
        return {name: torch.zeros_like(partition, dtype=torch.float32) for name in self.moments}

    def set_step(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Tell the state of a partition how many steps were taken, where PyTorch's counts them."""
        if "step" in state:
            state["step"].fill_(step)

    @abstractmethod
    def deepspeed_params(self) -> dict[str, tuple[Any, str]]:
        """The `optimizer.params` of a DeepSpeed file that flags own: the value, and the flag."""
