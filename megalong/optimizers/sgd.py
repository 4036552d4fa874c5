"""Stochastic gradient descent with momentum: one moment, no count of steps.

As in PyTorch and Megatron, weight decay is added to the gradient, and so goes through the momentum.
"""

from __future__ import annotations

import torch

from megalong.optimizers.optimizer import Optimizer


class Component(Optimizer):
    moments = ("momentum_buffer",)
    deepspeed_types = ("SGD",)

    def build(self, groups, fused):
        training = self.training
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.sgd_momentum, fused=fused)

    def deepspeed_params(self):
        training = self.training
        return {
            "lr": (training.lr, "--lr"),
            "momentum": (training.sgd_momentum, "--sgd-momentum"),
            "weight_decay": (training.weight_decay, "--weight-decay"),
        }
