"""A step of many micro batches, from one of few.

Run is a step of as many micro batches as fill the pipeline, and three more than that; it is the
training's own, with all layers of the stage and DeepSpeed's whole share, its buckets of gradients
and what ZeRO 3 fetches when. Computed are the further micro batches: each does what one in the
middle did (`DryRun.another`), and the peak of memory has come by then. The interleaved schedule
takes micro batches in groups, one for each stage: of it two steps are run, one of a group more than
the other. A test holds all to be equal to a step of all, which is run.
"""

from __future__ import annotations

import dataclasses

from megalong.config import Config
from megalong.planning.dry_run import DryRun, dry_run, first_steady_microbatch
from megalong.planning.memory import BLOCK

# Groups of micro batches of the interleaved schedule that are run: with these it is filled, and the
# peak of memory has come.
_GROUPS = 3


def planned_step(config: Config, vocab_size: int, *, rank: int = 0, ranks: int = 1) -> DryRun:
    """What `megalong.planning.dry_run.dry_run` says of a step of this rank, sooner.

    config: resolved for as many ranks. Raises what `dry_run` raises.
    """
    replicas = config.parallel.data_parallel_size(ranks)
    microbatches = config.num_microbatches(replicas)
    stages = config.parallel.pipeline_model_parallel_size
    stage = rank * stages // ranks

    def run(count: int) -> DryRun:
        short = _with_microbatches(config, count, replicas)
        return dry_run(short, vocab_size, rank=rank, ranks=ranks, quick=True)

    if config.parallel.num_layers_per_virtual_pipeline_stage is not None:
        few, size = min(microbatches, stages * _GROUPS), stages
        if microbatches <= few + size:
            return run(microbatches)
        step, longer = run(few), run(few + size)
        another = longer.work.plus(step.work, -1)
    else:
        few, size = min(microbatches, first_steady_microbatch(config, stage) + 2), 1
        step = run(few)
        if few == microbatches:
            return step
        another = step.another
        assert another is not None
    work = step.work.plus(another, (microbatches - few) // size)
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
