"""The best layouts of a launch, found by planning those that there may be.

Of each division of `megalong.planning.layouts` the rungs are planned from the one that computes
least on, until one fits; of a higher ZeRO stage, which sends more, only those that compute less
than the one that fits without it. Whether a rung fits is seen on its fullest rank, how long it
takes on the slowest of each pipeline stage. What the closed estimate of
`megalong.model.memory_path` says needs far more than there is, is not run.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from megalong.config import Config
from megalong.config.memory import USABLE
from megalong.errors import UserError
from megalong.planning.cluster import Cluster
from megalong.planning.layouts import Division, searched_settings

if TYPE_CHECKING:
    from megalong.planning.cost import StepCost
    from megalong.planning.dry_run import DryRun

# A rung that needs so much more than there is, by the estimate, is not run. It is within a fifth of
# the dry runs that tests compare it with.
HOPELESS = 1.5


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that was run.

    config: resolved. memory, host: bytes of the fullest rank, by kind, and pinned on its host.
    traffic, flops, kernels: of the slowest rank in a step.
    fits: whether memory and host are within what can be used of the cluster's.
    """

    config: Config
    memory: Mapping[str, int]
    host: int
    traffic: Mapping[str, Mapping[str, Mapping[str, int]]]
    flops: Mapping[tuple[str, str], int]
    kernels: int
    cost: StepCost
    fits: bool


@dataclass(frozen=True)
class NotRun:
    """A layout that the estimate is sure about: bytes of the device that it says."""

    config: Config
    estimate: float


@dataclass
class Search:
    """planned: layouts that were run, those that fit first, the fastest first. not_run: those that
    need far too much. refused: messages about layouts that cannot be, by how many there were."""

    planned: list[PlannedLayout] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def fitting(self) -> list[PlannedLayout]:
        return [layout for layout in self.planned if layout.fits]


def search(
    divisions: Iterable[Division],
    vocab_size: int,
    cluster: Cluster,
    ranks: int,
    *,
    processes: int | None = None,
    done: Callable[[], Any] = lambda: None,
) -> Search:
    """Plan all divisions, in processes of their own.

    processes: default, as many as this one may use cores. done: called after each division.
    Raises UserError where the cluster cannot be that of such a launch.
    """
    cluster.check_gpus(ranks)
    divisions, result = list(divisions), Search()
    count = min(len(divisions), processes or len(os.sched_getaffinity(0)))
    start = (cluster.device.on_gpu,)
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_start, initargs=start)
    try:
        jobs = [pool.submit(_plan, each, vocab_size, cluster, ranks) for each in divisions]
        for job in as_completed(jobs):
            planned, not_run, refused = job.result()
            result.planned += planned
            result.not_run += not_run
            result.refused += refused
            done()
    finally:
        pool.shutdown(cancel_futures=True)
    result.planned.sort(key=_rank)
    return result


def _rank(layout: PlannedLayout) -> tuple[Any, ...]:
    """Those that fit first, by the time of a sequence, and by their settings where that is the
    same."""
    seconds = layout.cost.total / layout.config.training.global_batch_size
    return not layout.fits, seconds, str(searched_settings(layout.config))


def _start(on_gpu: bool) -> None:
    """A process that plans, on one core: with a fake GPU, or for launches on the CPU."""
    if on_gpu:
        from megalong.planning import fake_device

        fake_device.load()
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)
    if on_gpu:
        fake_device.pretend()
    from megalong.log_filters import filter_library_logs

    filter_library_logs()
    warnings.simplefilter("ignore")  # of libraries, about tensors that have no data


_Found = tuple[list[PlannedLayout], list[NotRun], Counter[str]]


def _plan(division: Division, vocab_size: int, cluster: Cluster, ranks: int) -> _Found:
    from megalong.model.flops import executed_flops
    from megalong.model.memory_path import needs

    planned, not_run, refused = [], [], Counter()
    rungs = sorted(division.rungs, key=lambda rung: sum(executed_flops(rung, vocab_size).values()))
    fitting = math.inf  # FLOPs of the rung that fits with a lower ZeRO stage
    for stage in sorted({rung.parallel.zero_stage for rung in rungs}):
        for config in rungs:
            flops = sum(executed_flops(config, vocab_size).values())
            if config.parallel.zero_stage != stage or flops >= fitting:
                continue
            model_ranks = config.parallel.ranks_per_replica // (
                config.parallel.sequence_parallel_size
            )
            estimate = needs(config, vocab_size, ranks // model_ranks).device
            if estimate > HOPELESS * USABLE * cluster.device.memory:
                not_run.append(NotRun(config, estimate))
                continue
            try:
                layout = planned_layout(config, vocab_size, cluster, ranks)
            except UserError as error:
                refused[str(error)] += 1
                continue
            planned.append(layout)
            if layout.fits:
                fitting = flops
                break
    return planned, not_run, refused


def planned_layout(config: Config, vocab_size: int, cluster: Cluster, ranks: int) -> PlannedLayout:
    """Run the ranks of a layout that stand for the others, in a process that `_start` began.

    config: resolved.
    """
    from megalong.planning.cost import Overlap, phase_cost, step_cost
    from megalong.planning.extension import planned_step
    from megalong.planning.ranks import ranks_to_plan

    stages = config.parallel.pipeline_model_parallel_size
    steps = {
        place: planned_step(config, vocab_size, rank=place.rank, ranks=ranks)
        for place in ranks_to_plan(config, ranks)
    }
    fullest = max(steps.values(), key=lambda step: step.memory.total())
    host = max(step.host for step in steps.values())
    on_node = host * min(ranks, cluster.gpus_per_node)

    overlap = Overlap.of(config, ranks)

    def seconds(step: DryRun) -> float:
        return phase_cost(step.work, ("forward", "backward"), cluster, overlap).total

    works = []
    for stage in sorted({place.stage for place in steps}):
        of_stage = {place: step for place, step in steps.items() if place.stage == stage}
        alike = sum(place.count for place in of_stage) // (ranks // stages)
        works += [max(of_stage.values(), key=seconds).work] * alike
    slowest = max(steps.values(), key=seconds)
    return PlannedLayout(
        config=config,
        memory=fullest.memory,
        host=host,
        traffic=slowest.traffic,
        flops=slowest.work.flops(),
        kernels=sum(slowest.work.kernels().values()),
        cost=step_cost(works, cluster, config, vocab_size, ranks),
        fits=fullest.memory.total() <= USABLE * cluster.device.memory
        and on_node <= USABLE * cluster.host_memory,
    )
