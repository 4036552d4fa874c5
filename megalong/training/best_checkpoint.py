"""The checkpoint with the lowest validation loss: `best` in the run folder links to it, and it
stays when older ones are removed. Each stage of a run has its own: the one before it may have
been evaluated on other sequences, or on other text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megalong.checkpoint.folder import best, checkpoint_folder, iteration_of, link_best
from megalong.checkpoint.saving import Saver
from megalong.training.evaluation import Evaluation
from megalong.training.metrics import read_metrics
from megalong.utils.errors import system_errors_of


class BestCheckpoint:
    """What is best so far in a run folder, by the link and the run's metrics; every rank has one.

    say: called on rank 0 when there is a better one. split: the held-out set that decides. since:
    the iteration with which the stage begins, up to which nothing counts; stage: its name, if any.
    """

    def __init__(
        self,
        run: Path,
        saver: Saver,
        say: Callable[[str], None],
        split: str = "validation",
        since: int = 0,
        stage: str | None = None,
    ):
        self._run, self._saver, self._say, self._split = run, saver, say, split
        self._best = "the best so far" if stage is None else f"the best of stage {stage} so far"
        found = [_earlier(run, split, since) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        self._loss_and_tokens = found[0]

    def evaluated(self, iteration: int, split: str, result: Evaluation) -> None:
        """There is a checkpoint of this iteration, and this is its loss on a held-out set. Called
        by every rank. What was evaluated on another number of tokens cannot be compared, and counts
        no more; what is not finite never does."""
        if split != self._split or not math.isfinite(result.loss):
            return
        words = self._best
        if self._loss_and_tokens is not None:
            loss, tokens = self._loss_and_tokens
            if result.tokens == tokens and result.loss >= loss:
                return
            if result.tokens != tokens:
                words += f" on {result.tokens:,} tokens; those before were evaluated on {tokens:,}"
        self._loss_and_tokens = result.loss, result.tokens
        self._saver.wait()  # until it is on the disk
        if dist.get_rank() == 0:
            checkpoint = checkpoint_folder(self._run, iteration)
            with system_errors_of("--save", self._run):
                link_best(checkpoint)
            self._say(f"{checkpoint} is {words}")


def _earlier(run: Path, split: str, since: int) -> tuple[float, int] | None:
    """Validation loss and tokens of the best checkpoint, which an earlier start has found."""
    with system_errors_of("--save", run):
        checkpoint, metrics = best(run), run / "metrics.jsonl"
        if checkpoint is None or not checkpoint.exists() or not metrics.exists():
            return None
        if iteration_of(checkpoint) <= since:
            return None
        records = [
            record
            for record in read_metrics(metrics)
            if record.get("split") == split and record["iteration"] == iteration_of(checkpoint)
        ]
    return (records[-1]["loss"], records[-1]["tokens"]) if records else None
