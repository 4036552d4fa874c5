"""Stochastic gradient descent with momentum: one moment, no count of steps.

As in PyTorch and Megatron, weight decay is added to the gradient, and so goes through the momentum.
"""

from __future__ import annotations

import torch

from megalong.model.optimizers.optimizer import Optimizer


class SGDMomentum(Optimizer):
    """`--optimizer sgd`: PyTorch's SGD with `--lr` and `--sgd-momentum`."""

    moments = ("momentum_buffer",)
    deepspeed_types = ("SGD",)
    flags = ("sgd_",)

    def build(self, groups, fused):
        """torch.optim.SGD; each group has its own weight decay."""
        training = self.training
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.sgd_momentum, fused=fused)

    def deepspeed_params(self):
        """As DeepSpeed names SGD's: lr, momentum, weight_decay."""
        training = self.training
        return {
            "lr": (training.lr, "--lr"),
            "momentum": (training.sgd_momentum, "--sgd-momentum"),
            "weight_decay": (training.weight_decay, "--weight-decay"),
        }
