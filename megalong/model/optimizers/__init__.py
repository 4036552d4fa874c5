"""The optimizers that `--optimizer` chooses from, a file each.

Another one is such a file, with a subclass of `Optimizer`, a line in the table below, and in
`megalong/config/training.py` its name and, beginning with the name, its settings as flags.
Training, checkpoints and imports ask here.
"""

from __future__ import annotations

from types import MappingProxyType

from megalong.config.training import TrainingConfig
from megalong.model.optimizers.adam import AdamW
from megalong.model.optimizers.muon import Muon
from megalong.model.optimizers.optimizer import Optimizer
from megalong.model.optimizers.sgd import SGDMomentum

__all__ = ["OPTIMIZERS", "Optimizer", "optimizer_of"]

OPTIMIZERS = MappingProxyType({"adam": AdamW, "sgd": SGDMomentum, "muon": Muon})


def optimizer_of(training: TrainingConfig) -> Optimizer:
    """The optimizer that these settings ask for."""
    return OPTIMIZERS[training.optimizer](training)
