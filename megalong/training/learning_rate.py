"""The learning rate as a pure function of the iteration: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megalong.config import TrainingConfig


def learning_rate(iteration: int, training: TrainingConfig) -> float:
    """The learning rate of optimizer step `iteration`, counted from one.

    Linear warm-up to `lr`, which step `lr_warmup_iters` has; then polynomial (LongNet, table 3),
    cosine or no decay from `lr`, which the first step after the warm-up has, down to `min_lr`,
    which the first step after `lr_decay_iters` would have. So no step of a run is wasted on a rate
    of zero. After the warm-up this is Megatron's schedule, where the rate of a step is that of the
    steps done before it; its warm-up begins with a step at zero, and is one behind.
    """
    warmup, decay_end = training.lr_warmup_iters, training.lr_decay_iters
    assert decay_end is not None
    if iteration <= warmup:
        return training.lr * iteration / warmup
    if training.lr_decay_style == "constant":
        return training.lr
    if iteration > decay_end:
        return training.min_lr
    remaining = (decay_end + 1 - iteration) / (decay_end - warmup)
    if training.lr_decay_style == "cosine":
        share = (1 + math.cos(math.pi * (1 - remaining))) / 2
    else:
        share = remaining**training.lr_decay_power
    return training.min_lr + (training.lr - training.min_lr) * share
