"""How far a run has come: the part of a checkpoint that is not tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    consumed_tokens: where the run stands in the training stream, whatever the sequence length and
        batch size were on the way.
    losses: those of the iterations since the last one that was logged.
    adam_step: updates that Adam has made; smaller than `iteration` where fp16 steps were skipped.
    loss_scaler: state of the fp16 dynamic loss scaler.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    adam_step: int = 0
    loss_scaler: dict[str, Any] | None = None
