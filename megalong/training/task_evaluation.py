"""The tasks of `megalong.evals` in the training: by teacher forcing, in one forward pass, so that
it goes in every layout."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from megalong.data.prefetch import made_ahead
from megalong.evals.scores import AnswerSums, TaskScore
from megalong.evals.trials import Trials, num_task_batches, task_batches
from megalong.parallel.mesh import Mesh
from megalong.training.engine import TrainingEngine


def evaluate_task(
    engine: TrainingEngine,
    trials: Trials,
    mesh: Mesh,
    on_batch: Callable[[], None] = lambda: None,
    first_apart: bool = False,
) -> TaskScore:
    """The score of the model on these samples, on every rank. Called by all ranks alike.

    on_batch: called after each micro batch, to show progress. first_apart: see `task_batches`.
    """
    sums = AnswerSums(trials, mesh.device)
    batches = task_batches(
        trials,
        sums,
        micro_batch_size=engine.micro_batch_size,
        data_parallel_rank=mesh.data_parallel_rank,
        data_parallel_size=mesh.data_parallel_size,
        sequence_range=mesh.sequence_range(engine.seq_length),
        first_apart=first_apart,
    )
    with made_ahead(batches, mesh.device) as ahead:
        # As many at a time as fill the pipeline.
        while some := list(islice(ahead, mesh.pipeline_parallel_size)):
            # Stages before the last have no scores.
            for batch, (losses, right, _) in zip(some, engine.token_scores(some), strict=False):
                rows = batch["answer"].to(mesh.device, non_blocking=True)
                sums.add(rows, right, losses)
            for _ in some:
                on_batch()
    mesh.sum_of_losses(sums.sums)
    return sums.score()


def batches_of(engine: TrainingEngine, trials: Trials, mesh: Mesh) -> int:
    """How often `evaluate_task` calls `on_batch`."""
    return num_task_batches(trials, engine.micro_batch_size, mesh.data_parallel_size)
