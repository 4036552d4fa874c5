"""AdamW (Loshchilov and Hutter, arXiv:1711.05101): two moments, and a count of steps to correct
them by."""

from __future__ import annotations

import torch

from megalong.optimizers.optimizer import Optimizer


class Component(Optimizer):
    moments = ("exp_avg", "exp_avg_sq")
    deepspeed_types = ("AdamW", "Adam")

    def build(self, groups, fused):
        training = self.training
        return torch.optim.AdamW(
            groups,
            lr=training.lr,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=fused,
        )

    def first_state(self, partition, fused):
        # The fused AdamW wants its step counter on the device, the other on the CPU.
        device = partition.device if fused else "cpu"
        step = torch.zeros((), dtype=torch.float32, device=device)
        return {"step": step, **super().first_state(partition, fused)}

    def deepspeed_params(self):
        training = self.training
        betas = [training.adam_beta1, training.adam_beta2]
        return {
            "lr": (training.lr, "--lr"),
            "betas": (betas, "--adam-beta1 --adam-beta2"),
            "eps": (training.adam_eps, "--adam-eps"),
            "weight_decay": (training.weight_decay, "--weight-decay"),
            "adam_w_mode": (True, "AdamW, megalong's optimizer,"),
        }
