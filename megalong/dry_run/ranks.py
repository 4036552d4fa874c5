"""Which ranks of a launch to plan: those that differ in what they do, so that the slowest and the
fullest are among them."""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config import Config


@dataclass(frozen=True)
class PlannedRank:
    """A rank, its pipeline stage and place in a sequence, and how many ranks, this one with them,
    do as it does or, along the sequence, a little less."""

    rank: int
    stage: int
    shard: int
    count: int


def ranks_to_plan(config: Config, ranks: int) -> list[PlannedRank]:
    """The ranks of a launch of `ranks` that stand for all.

    Stages: the first, the last, and of those between the first of each sequence of attentions: it
    has the most micro batches under way. Shards of a sequence: the first, which attends to nothing
    before it, and the one that stands furthest in all segments, which attends to most. Tensor and
    data ranks do alike, but for where ZeRO cuts its partitions.

    config: resolved for as many ranks.
    """
    parallel = config.parallel
    tensor, shards = parallel.tensor_model_parallel_size, parallel.sequence_parallel_size
    stages = parallel.pipeline_model_parallel_size
    alike = ranks // (shards * stages)  # tensor and data ranks of a stage and a shard
    return [
        PlannedRank(
            tensor * shard + ranks // stages * stage, stage, shard, alike * stage_count * count
        )
        for stage, stage_count in _stages(config).items()
        for shard, count in _shards(config).items()
    ]


def layers_of_stage(config: Config, stage: int) -> list[int]:
    """Numbers of the layers of a pipeline stage, from 0, chunk after chunk."""
    model, parallel = config.model, config.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.chunks_per_stage(model)
    count = model.num_layers // (stages * chunks)
    starts = ((chunk * stages + stage) * count for chunk in range(chunks))
    return [layer for start in starts for layer in range(start, start + count)]


def _stages(config: Config) -> dict[int, int]:
    """Stage -> how many are like it."""
    stages = config.parallel.pipeline_model_parallel_size
    found: dict[object, list[int]] = {}
    for stage in range(stages):
        kinds = tuple(config.attention.kind(layer) for layer in layers_of_stage(config, stage))
        found.setdefault((stage == 0, stage == stages - 1, kinds), []).append(stage)
    return {alike[0]: len(alike) for alike in found.values()}


def _shards(config: Config) -> dict[int, int]:
    """Place in the sequence -> how many are like it."""
    size = config.parallel.sequence_parallel_size
    shard = config.model.seq_length // size
    if size == 1:
        return {0: 1}
    groups = {
        number
        for name, kind in config.attention.kinds.items()
        for number in kind.passes_class().subgroup_sizes(
            config.attention.patterns[name], shard, size
        )
    }
    first = [place for place in range(size) if not any(place % number for number in groups)]
    furthest = max(range(size), key=lambda place: (sum(place % n for n in groups), place))
    if furthest in first:  # nothing is exchanged
        return {0: size}
    return {0: len(first), furthest: size - len(first)}
