"""The learning rate as a pure function of the iteration: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megalong.config import TrainingConfig


def learning_rate(iteration: int, training: TrainingConfig) -> float:
    """The learning rate of optimizer step `iteration`, counted from one.

    Linear warm-up to `lr`, which step `lr_warmup_iters` has; then a decay from `lr`, which the
    first step after the warm-up has, down to `min_lr`, which the first step after `lr_decay_iters`
    would have. After the warm-up this is Megatron's schedule, whose warm-up begins with a step at
    zero, and is one behind. All that counts from the step after `lr_begin_iters`.
    """
    iteration = max(iteration - training.lr_begin_iters, 1)
    warmup, decay_end = training.lr_warmup_iters, training.lr_decay_iters
    assert decay_end is not None
    if iteration <= warmup:
        return training.lr * iteration / warmup
    done = iteration - 1
    if training.lr_decay_style == "constant":
        return training.lr
    if training.lr_decay_style == "inverse-square-root" and done <= decay_end:
        return max(training.min_lr, training.lr * math.sqrt(max(warmup, 1) / max(done, 1)))
    if done >= decay_end:
        return training.min_lr
    if training.lr_decay_style == "WSD":
        share = _stable_share(done, training)
    else:
        share = _share((decay_end - done) / (decay_end - warmup), training)
    return training.min_lr + (training.lr - training.min_lr) * share


def _share(remaining: float, training: TrainingConfig) -> float:
    """What is left of the way from `lr` to `min_lr`; remaining: of the iterations between, 1 to
    0."""
    if training.lr_decay_style == "cosine":
        return (1 + math.cos(math.pi * (1 - remaining))) / 2
    return remaining if training.lr_decay_style == "linear" else remaining**training.lr_decay_power


def _stable_share(done: int, training: TrainingConfig) -> float:
    """The same for WSD, warmup-stable-decay (MiniCPM, arXiv 2404.06395)."""
    assert training.lr_decay_iters is not None and training.lr_wsd_decay_iters is not None
    remaining = min((training.lr_decay_iters - done) / training.lr_wsd_decay_iters, 1.0)
    return {
        "linear": remaining,
        "cosine": (1 + math.cos(math.pi * (1 - remaining))) / 2,
        "exponential": 2 * 0.5 ** (1 - remaining) - 1,
        "minus_sqrt": 1 - math.sqrt(1 - remaining),
    }[training.lr_wsd_decay_style]
