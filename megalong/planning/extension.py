"""A step of many micro batches, from one of few.

Run is a step of as many micro batches as fill the pipeline, and three more than that; it is the
training's own, with all layers of the stage and DeepSpeed's whole share, its buckets of gradients
and what ZeRO 3 fetches when. Computed are the further micro batches: each does what one in the
middle did (`DryRun.another`), and the peak of memory has come by then. A test holds it to be equal
to a step of all, which is run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megalong.config import Config
from megalong.planning.dry_run import DryRun, dry_run, first_steady_microbatch
from megalong.planning.memory import BLOCK

Cache = dict[Any, DryRun]


def planned_step(
    config: Config,
    vocab_size: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    cache: Cache | None = None,
) -> DryRun:
    """What `megalong.planning.dry_run.dry_run` says of a step of this rank, sooner.

    config: resolved for as many ranks. cache: of the caller, for other steps: dry runs by what they
    are of. Its entries may be pickled, so that processes can share them.
    Raises what `dry_run` raises.
    """
    replicas = config.parallel.data_parallel_size(ranks)
    microbatches = config.num_microbatches(replicas)
    stage = rank * config.parallel.pipeline_model_parallel_size // ranks
    few = _few(config, stage, microbatches)
    short = _with_microbatches(config, few, replicas)
    key = short, vocab_size, rank, ranks
    step = None if cache is None else cache.get(key)
    if step is None:
        step = dry_run(short, vocab_size, rank=rank, ranks=ranks, quick=True)
        if cache is not None:
            cache[key] = step
    if few == microbatches:
        return step
    assert step.another is not None
    work = step.work.plus(step.another, microbatches - few)
    memory = step.memory.copy()
    if stage == config.parallel.pipeline_model_parallel_size - 1:
        memory["activations"] += BLOCK * (microbatches - few)  # the losses to report
    return dataclasses.replace(step, work=work, memory=memory)


def _few(config: Config, stage: int, microbatches: int) -> int:
    """The micro batches that are run."""
    if config.parallel.num_layers_per_virtual_pipeline_stage is not None:
        return microbatches
    return min(microbatches, first_steady_microbatch(config, stage) + 2)


def _with_microbatches(config: Config, microbatches: int, replicas: int) -> Config:
    training = dataclasses.replace(
        config.training,
        global_batch_size=microbatches * replicas * config.training.micro_batch_size,
    )
    return dataclasses.replace(config, training=training)
