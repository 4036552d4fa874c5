"""AdamW (Loshchilov and Hutter, arXiv:1711.05101): two moments, and a count of steps to correct
them by."""

from __future__ import annotations

import torch

from megalong.model.optimizers.optimizer import Optimizer


class AdamW(Optimizer):
    """`--optimizer adam`: PyTorch's AdamW, with `--lr` and the flags `--adam-...`."""

    moments = ("exp_avg", "exp_avg_sq")
    deepspeed_types = ("AdamW", "Adam")
    flags = ("adam_",)

    def build(self, groups, fused):
        """torch.optim.AdamW; each group has its own weight decay."""
        training = self.training
        return torch.optim.AdamW(
            groups,
            lr=training.lr,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=fused,
        )

    def first_state(self, partition, fused, of_layer_matrices=False):
        """Both moments and the count of steps, all zero."""
        # The fused AdamW wants its step counter on the device, the other on the CPU.
        device = partition.device if fused else "cpu"
        step = torch.zeros((), dtype=torch.float32, device=device)
        return {"step": step, **super().first_state(partition, fused)}

    def deepspeed_params(self):
        """As DeepSpeed names AdamW's: lr, betas, eps, weight_decay, adam_w_mode."""
        training = self.training
        betas = [training.adam_beta1, training.adam_beta2]
        return {
            "lr": (training.lr, "--lr"),
            "betas": (betas, "--adam-beta1 --adam-beta2"),
            "eps": (training.adam_eps, "--adam-eps"),
            "weight_decay": (training.weight_decay, "--weight-decay"),
            "adam_w_mode": (True, "AdamW, megalong's optimizer,"),
        }
