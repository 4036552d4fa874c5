"""The optimizers that `--optimizer` chooses from, a file each under that name.

Another one is such a file, with a subclass of `Optimizer` called `Component`, and its name and
settings as flags in `megalong/config/training.py`. Training, checkpoints and imports ask here.
"""

from __future__ import annotations

from importlib import import_module

from megalong.config.training import TrainingConfig
from megalong.optimizers.optimizer import Optimizer

__all__ = ["Optimizer", "optimizer_of"]


def optimizer_of(training: TrainingConfig) -> Optimizer:
    """The optimizer that these settings ask for."""
    return import_module(f"megalong.optimizers.{training.optimizer}").Component(training)
