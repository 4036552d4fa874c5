"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon; Moonlight, arXiv 2502.16982) for
the matrices of the layers: their update is the momentum with all its singular values made about 1.
AdamW for embedding, output layer, norms and biases.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megalong.config import TrainingConfig
from megalong.model.optimizers.adam import AdamW
from megalong.model.optimizers.optimizer import Optimizer, WholeMatrices

# Of x -> a x + b x^3 + c x^5, which pulls singular values towards 1 (Jordan, as in PyTorch).
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7


class Muon(Optimizer):
    """`--optimizer muon`: `--lr` for all, the flags `--muon-...`, and for the rest `--adam-...`.

    Weight decay is decoupled, lr x weight decay, in both. With the defaults an update's root mean
    square is about that of AdamW's, 0.2 to 0.4 (Moonlight, section 2.2), so that one learning rate
    fits both; Megatron's own are --muon-extra-scale-factor 1 and no Nesterov momentum. Gate and up
    projection of a gated MLP are two matrices, unlike Megatron's. In bf16 runs the iteration is in
    bf16, as PyTorch's, else in float32.
    """

    moments = ("momentum_buffer", *AdamW.moments)
    deepspeed_types = ("Muon",)
    flags = ("muon_", "adam_")
    layer_matrices_apart = True

    def build(self, groups, fused):
        """A group with "layer_matrices" also needs, before the first step, "whole_matrices": a
        `WholeMatrices` of its one partition."""
        return _MuonAndAdamW(groups, self.training, fused)

    def moments_of(self, is_layer_matrix):
        """A momentum, or Adam's two moments."""
        return ("momentum_buffer",) if is_layer_matrix else AdamW.moments

    def matrix_products(self, rows, columns):
        """Those of `orthogonalized`."""
        small, large = sorted((rows, columns))
        once = 2 * small * small * large, 2 * small**3, 2 * small * small * large
        return once * self.training.muon_num_ns_steps

    def first_state(self, partition, fused, of_layer_matrices=False):
        """Of matrices a momentum of zero, else Adam's state."""
        if of_layer_matrices:
            return super().first_state(partition, fused, of_layer_matrices)
        return AdamW(self.training).first_state(partition, fused)

    def deepspeed_params(self):
        """As DeepSpeed names those of its Muon: lr, momentum, weight_decay, betas, eps."""
        training = self.training
        betas = [training.adam_beta1, training.adam_beta2]
        return {
            "lr": (training.lr, "--lr"),
            "momentum": (training.muon_momentum, "--muon-momentum"),
            "weight_decay": (training.weight_decay, "--weight-decay"),
            "betas": (betas, "--adam-beta1 --adam-beta2"),
            "eps": (training.adam_eps, "--adam-eps"),
        }


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
        """One step of all groups that there are now; DeepSpeed has one at a time."""
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
    """U V^T of matrix = U S V^T, about: singular values that were not next to nothing are between
    0.7 and 1.2; by a Newton-Schulz iteration of so many steps, in the dtype of the matrix."""
    a, b, c = _COEFFICIENTS
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    wide = wide / wide.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.size(0) > matrix.size(1) else wide


def update_scale(rows: int, columns: int, training: TrainingConfig) -> float:
    """What an orthogonalized matrix is multiplied by: `--muon-scale-mode`, as in Megatron, times
    `--muon-extra-scale-factor`."""
    squared = {
        "spectral": max(rows, columns),
        "shape_scaling": max(1, rows / columns),
        "unit_rms_norm": rows / columns,
    }[training.muon_scale_mode]
    return training.muon_extra_scale_factor * math.sqrt(squared)
