"""A step of many micro batches, from one of few.

Run is a step of as many micro batches as fill the pipeline, and a few more than that; it is the
training's own, with DeepSpeed's whole share, its buckets of gradients and what ZeRO 3 fetches when.
Computed are the further micro batches: each does what one in the middle did (`DryRun.another`), and
the peak of memory has come by then. A test holds it to be equal to a step of all, which is run.
"""

from __future__ import annotations

import dataclasses

from megalong.config import Config
from megalong.dry_run.memory import BLOCK
from megalong.dry_run.step import DryRun, dry_run, steady_microbatches


def planned_step(config: Config, vocab_size: int, *, rank: int = 0, ranks: int = 1) -> DryRun:
    """What `megalong.dry_run.step.dry_run` says of a step of this rank, sooner.

    config: resolved for as many ranks. Raises what `dry_run` raises.
    """
    replicas = config.parallel.data_parallel_size(ranks)
    microbatches = config.num_microbatches(replicas)
    stages = config.parallel.pipeline_model_parallel_size
    stage = rank * stages // ranks
    first, group = steady_microbatches(config, stage)
    few = first + group + 1
    if few >= microbatches:
        return dry_run(config, vocab_size, rank=rank, ranks=ranks, quick=True)
    short = _with_microbatches(config, few, replicas)
    step = dry_run(short, vocab_size, rank=rank, ranks=ranks, quick=True)
    assert step.another is not None
    work = step.work.plus(step.another, (microbatches - few) // group)
    memory = step.memory.copy()
    if stage == stages - 1:
        memory["activations"] += BLOCK * (microbatches - few)  # the losses to report
    return dataclasses.replace(step, work=work, memory=memory)


def _with_microbatches(config: Config, microbatches: int, replicas: int) -> Config:
    training = dataclasses.replace(
        config.training,
        global_batch_size=microbatches * replicas * config.training.micro_batch_size,
    )
    return dataclasses.replace(config, training=training)
