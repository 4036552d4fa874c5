"""The optimizers that `--optimizer` chooses from.

Another one is a subclass of `Optimizer`, a line in `OPTIMIZERS`, and in megalong/config/training.py
its name and, beginning with the name, its settings as flags.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch

from megalong.config.training import TrainingConfig

# Of x -> a x + b x^3 + c x^5, which pulls singular values towards 1 (Jordan, as in PyTorch).
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7


class WholeMatrices(Protocol):
    """Whole matrices for an optimizer, out of which its partitions are cut."""

    def updates(
        self,
        direction: Callable[[int, int], torch.Tensor],
        update_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield, of each matrix, where this rank's piece of it begins in the partition, and the
        update of this piece, flat. Called by all ranks that share the matrices.

        direction: the elements [start, stop) of the partition of what the matrices are made of, a
        new tensor. update_of: from one whole matrix, of these, to its update.
        """
        ...


class Optimizer(ABC):
    """One of PyTorch's optimizers, with the settings of a run.

    ZeRO steps it on flat partitions, which are cut anywhere in a parameter. So whatever it keeps of
    a parameter is elementwise: float32 tensors of the parameter's shape, zero before the first
    step.

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
        """Return PyTorch's optimizer for these parameter groups, each with its `weight_decay`.

        fused: with one kernel for many tensors, on a GPU, where PyTorch has such a one.
        """

    def moments_of(self, is_layer_matrix: bool) -> tuple[str, ...]:
        """Return those of its `moments` that it keeps of such a parameter."""
        return self.moments

    def matrix_products(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the FLOPs of each product in the update of a whole matrix of a layer."""
        return ()

    def first_state(
        self, partition: torch.Tensor, fused: bool, of_layer_matrices: bool = False
    ) -> dict[str, torch.Tensor]:
        """Return the state that PyTorch's optimizer would give a partition at its first step."""
        moments = self.moments_of(of_layer_matrices)
        return {name: torch.zeros_like(partition, dtype=torch.float32) for name in moments}

    def set_step(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Tell the state of a partition how many steps were taken, where PyTorch's counts them."""
        if "step" in state:
            state["step"].fill_(step)

    def deepspeed_params(self) -> dict[str, tuple[Any, str]]:
        """Return the `optimizer.params` of a DeepSpeed file that flags own: value and flag."""
        training = self.training
        return {
            "lr": (training.lr, "--lr"),
            "weight_decay": (training.weight_decay, "--weight-decay"),
        }


class SGDMomentum(Optimizer):
    """`--optimizer sgd`: PyTorch's SGD with `--lr` and `--sgd-momentum`.

    As in PyTorch and Megatron, weight decay is added to the gradient, and so goes through the
    momentum.
    """

    moments = ("momentum_buffer",)
    deepspeed_types = ("SGD",)
    flags = ("sgd_",)

    def build(self, groups, fused):
        training = self.training
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.sgd_momentum, fused=fused)

    def deepspeed_params(self):
        momentum = (self.training.sgd_momentum, "--sgd-momentum")
        return {**super().deepspeed_params(), "momentum": momentum}


class AdamW(Optimizer):
    """`--optimizer adam`: PyTorch's AdamW (arXiv 1711.05101), with `--lr` and `--adam-...`."""

    moments = ("exp_avg", "exp_avg_sq")
    deepspeed_types = ("AdamW", "Adam")
    flags = ("adam_",)

    def build(self, groups, fused):
        training = self.training
        betas = (training.adam_beta1, training.adam_beta2)
        return torch.optim.AdamW(
            groups, lr=training.lr, betas=betas, eps=training.adam_eps, fused=fused
        )

    def first_state(self, partition, fused, of_layer_matrices=False):
        # The fused AdamW wants its step counter on the device, the other on the CPU.
        device = partition.device if fused else "cpu"
        step = torch.zeros((), dtype=torch.float32, device=device)
        return {"step": step, **super().first_state(partition, fused)}

    def deepspeed_params(self):
        training = self.training
        betas = [training.adam_beta1, training.adam_beta2]
        return {
            **super().deepspeed_params(),
            "betas": (betas, "--adam-beta1 --adam-beta2"),
            "eps": (training.adam_eps, "--adam-eps"),
            "adam_w_mode": (True, "AdamW, megalong's optimizer,"),
        }


class Muon(Optimizer):
    """`--optimizer muon`: `--lr` for all, `--muon-...` for the matrices of the layers, `--adam-...`
    for AdamW, which updates embedding, output layer, norms and biases.

    Keller Jordan, https://kellerjordan.github.io/posts/muon; Moonlight, arXiv 2502.16982.

    The update of a layer's matrix is the momentum with all its singular values made about 1. Weight
    decay is decoupled in both. With the defaults an update's root mean square is about that of
    AdamW's (Moonlight, section 2.2), so that one learning rate fits both. Gate and up projection of
    a gated MLP are two matrices, unlike Megatron's. The iteration is in bf16 in bf16 runs, as
    PyTorch's, else in float32.
    """

    moments = ("momentum_buffer", *AdamW.moments)
    deepspeed_types = ("Muon",)
    flags = ("muon_", "adam_")
    layer_matrices_apart = True

    def build(self, groups, fused):
        """As of `Optimizer`; a group with "layer_matrices" also needs, before the first step,
        "whole_matrices": a `WholeMatrices` of its one partition."""
        return _MuonAndAdamW(groups, self.training, fused)

    def moments_of(self, is_layer_matrix):
        return ("momentum_buffer",) if is_layer_matrix else AdamW.moments

    def matrix_products(self, rows, columns):
        small, large = sorted((rows, columns))
        once = 2 * small * small * large, 2 * small**3, 2 * small * small * large
        return once * self.training.muon_num_ns_steps

    def first_state(self, partition, fused, of_layer_matrices=False):
        if of_layer_matrices:
            return super().first_state(partition, fused, of_layer_matrices)
        return AdamW(self.training).first_state(partition, fused)

    def deepspeed_params(self):
        adam = AdamW(self.training).deepspeed_params()
        del adam["adam_w_mode"]
        return {**adam, "momentum": (self.training.muon_momentum, "--muon-momentum")}


class _MuonAndAdamW(torch.optim.AdamW):
    """PyTorch's AdamW, but for the groups of matrices.

    PyTorch's own Muon wants whole matrices as parameters, and computes in bfloat16 alone.
    """

    def __init__(self, groups: list[dict[str, Any]], training: TrainingConfig, fused: bool):
        betas = training.adam_beta1, training.adam_beta2
        super().__init__(groups, lr=training.lr, betas=betas, eps=training.adam_eps, fused=fused)
        self.training = training

    @torch.no_grad()
    def step(self, closure=None):
        """Step all groups that there are now; DeepSpeed has one at a time."""
        groups = self.param_groups
        for group in groups:
            if group.get("layer_matrices"):
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group.get("layer_matrices")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _step_matrices(self, group: dict[str, Any]) -> None:
        training, lr = self.training, group["lr"]
        [partition] = group["params"]
        whole: WholeMatrices = group["whole_matrices"]
        gradient, momentum = partition.grad, self.state[partition]["momentum_buffer"]
        momentum.lerp_(gradient, 1 - training.muon_momentum)
        partition.mul_(1 - lr * group["weight_decay"])
        # Rounded before they are sent: the iteration would do it first of all.
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32

        def direction(start: int, stop: int) -> torch.Tensor:
            part = momentum[start:stop]
            if training.muon_nesterov:
                part = gradient[start:stop].lerp(part, training.muon_momentum)
            return part.to(dtype, copy=True)

        def update_of(matrix: torch.Tensor) -> torch.Tensor:
            scale = update_scale(*matrix.shape, training)
            return orthogonalized(matrix, training.muon_num_ns_steps).float().mul_(scale)

        for start, update in whole.updates(direction, update_of):
            partition[start : start + len(update)].add_(update, alpha=-lr)


def orthogonalized(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Return about U V^T of matrix = U S V^T: singular values that were not next to nothing are
    between 0.7 and 1.2; by a Newton-Schulz iteration of so many steps, in the matrix's dtype."""
    a, b, c = _COEFFICIENTS
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    wide = wide / wide.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.size(0) > matrix.size(1) else wide


def update_scale(rows: int, columns: int, training: TrainingConfig) -> float:
    """Return the factor of an orthogonalized matrix: `--muon-scale-mode`, as in Megatron, times
    `--muon-extra-scale-factor`."""
    squared = {
        "spectral": max(rows, columns),
        "shape_scaling": max(1, rows / columns),
        "unit_rms_norm": rows / columns,
    }[training.muon_scale_mode]
    return training.muon_extra_scale_factor * math.sqrt(squared)


OPTIMIZERS = MappingProxyType({"adam": AdamW, "sgd": SGDMomentum, "muon": Muon})


def optimizer_of(training: TrainingConfig) -> Optimizer:
    """Return the optimizer that these settings ask for."""
    return OPTIMIZERS[training.optimizer](training)
