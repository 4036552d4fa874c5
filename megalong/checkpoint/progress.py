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
    losses_by_source: since then too, for each source of the training blend the sum of the losses of
        its predictions, and how many these were.
    blend: where each source stands, and what the blend was so far (`megalong.data.blend.History`);
        None: in the checkpoint of a run that knew one source only.
    updates: steps of the optimizer; fewer than `iteration` where some were skipped.
    skipped_spikes: those that were skipped for their loss.
    recent_losses: what the next losses are measured by then (`megalong.training.loss_spikes`).
    loss_scaler: state of the fp16 dynamic loss scaler.
    stages: those of a run of several that have begun (`megalong.training.stages`): of each the
        name, the iteration after which it began ("begin"), and what of its settings its result
        hangs on ("settings"); of the last one, in which the run is, those of this checkpoint.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    losses_by_source: dict[str, tuple[float, float]] = field(default_factory=dict)
    blend: dict[str, Any] | None = None
    updates: int = 0
    skipped_spikes: int = 0
    recent_losses: list[float] = field(default_factory=list)
    loss_scaler: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def from_values(values: dict[str, Any]) -> Progress:
        """That of a checkpoint's JSON file. Earlier ones, which had no optimizer but Adam, call the
        updates `adam_step`."""
        if "adam_step" in values:
            values = dict(values)
            values["updates"] = values.pop("adam_step")
        return Progress(**values)
