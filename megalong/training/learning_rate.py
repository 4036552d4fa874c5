"""The learning rate as a pure function of the iteration: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megalong.config import TrainingConfig


def learning_rate(iteration: int, training: TrainingConfig) -> float:
    """The learning rate of optimizer step `iteration`, counted from one.

    Linear warm-up over `lr_warmup_iters`, then polynomial (LongNet, table 3), cosine or no decay
    down to `min_lr` at `lr_decay_iters`, and `min_lr` after that.
    """
    warmup, decay_end = training.lr_warmup_iters, training.lr_decay_iters
    assert decay_end is not None
    if iteration <= warmup:
        return training.lr * iteration / warmup
    if training.lr_decay_style == "constant":
        return training.lr
    if iteration >= decay_end:
        return training.min_lr
    remaining = (decay_end - iteration) / (decay_end - warmup)
    if training.lr_decay_style == "cosine":
        share = (1 + math.cos(math.pi * (1 - remaining))) / 2
    else:
        share = remaining**training.lr_decay_power
    return training.min_lr + (training.lr - training.min_lr) * share
