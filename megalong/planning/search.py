"""The best layouts of a launch, found by planning those that there may be.

Each division of `megalong.planning.layouts` is planned from its fastest rung on, until one fits:
the rungs after it compute more, or send more, and are left out.
Whether a rung fits is seen on its fullest rank, how long it takes on the busiest of each pipeline
stage. What the closed estimate of `megalong.model.memory_path` says needs far more than there is,
is not run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from megalong.config import Config
from megalong.errors import UserError
from megalong.planning.cluster import Cluster
from megalong.planning.layouts import Division

if TYPE_CHECKING:
    from megalong.planning.cost import StepCost
    from megalong.planning.dry_run import DryRun

# Of the device's memory, and of the host's: the rest is for CUDA's context, NCCL's buffers and the
# allocator's fragments. `--memory-path auto` leaves as much.
USABLE = 0.9
# A rung that needs so much more than there is, by the estimate, is not run. It is within a fifth of
# the dry runs that tests compare it with.
HOPELESS = 1.5


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that was run.

    config: resolved. memory, host: bytes of the fullest rank, by kind, and pinned on its host.
    traffic: of the busiest rank in a step, by axis and collective.
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
    groups = _alike(divisions)
    result = Search()
    count = min(len(groups), processes or len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=_start) as pool:
        jobs = {
            pool.submit(_plan_all, group, vocab_size, cluster, ranks): len(group)
            for group in groups
        }
        for job in as_completed(jobs):
            for planned, not_run, refused in job.result():
                result.planned += planned
                result.not_run += not_run
                result.refused += refused
                done()
    result.planned.sort(
        key=lambda layout: (
            not layout.fits,
            layout.cost.total / layout.config.training.global_batch_size,
        )
    )
    return result


def _alike(divisions: Iterable[Division]) -> list[list[Division]]:
    """Divisions whose ranks have layers of the same shapes, which share dry runs."""
    groups: dict[tuple, list[Division]] = {}
    for division in divisions:
        shape = [value for name, value in division.settings.items() if "pipeline" not in name]
        groups.setdefault(tuple(shape), []).append(division)
    return sorted(groups.values(), key=len, reverse=True)


def _start() -> None:
    """A process that plans: with a fake device, on one core."""
    from megalong.planning import fake_device

    fake_device.load()
    import torch

    torch.set_num_threads(1)
    fake_device.pretend()


_Found = tuple[list[PlannedLayout], list[NotRun], Counter[str]]


def _plan_all(
    divisions: list[Division], vocab_size: int, cluster: Cluster, ranks: int
) -> list[_Found]:
    cache: dict = {}
    return [_plan(division, vocab_size, cluster, ranks, cache) for division in divisions]


def _plan(division: Division, vocab_size: int, cluster: Cluster, ranks: int, cache: dict) -> _Found:
    from megalong.model.memory_path import needs

    planned, not_run, refused = [], [], Counter()
    for config in division.rungs:
        replicas = ranks // (
            config.parallel.tensor_model_parallel_size
            * config.parallel.pipeline_model_parallel_size
        )
        estimate = needs(config, vocab_size, replicas).device
        if estimate > HOPELESS * USABLE * cluster.device.memory:
            not_run.append(NotRun(config, estimate))
            continue
        try:
            layout = planned_layout(config, vocab_size, cluster, ranks, cache)
        except UserError as error:
            refused[str(error)] += 1
            continue
        planned.append(layout)
        if layout.fits:
            break
    return planned, not_run, refused


def planned_layout(
    config: Config, vocab_size: int, cluster: Cluster, ranks: int, cache: dict
) -> PlannedLayout:
    """Run the ranks of a layout that stand for the others, in a process with a fake device.

    config: resolved. cache: dry runs of this process.
    """
    from megalong.planning.cost import step_cost
    from megalong.planning.extension import planned_step
    from megalong.planning.ranks import ranks_to_plan

    stages = config.parallel.pipeline_model_parallel_size
    steps = {
        place: planned_step(config, vocab_size, rank=place.rank, ranks=ranks, cache=cache)
        for place in ranks_to_plan(config, ranks)
    }
    fullest = max(steps.values(), key=lambda step: step.memory.total())
    host = max(step.host for step in steps.values())
    on_node = host * min(ranks, cluster.gpus_per_node)

    def flops(step: DryRun) -> int:
        return sum(step.work.flops().values())

    works = []
    for stage in sorted({place.stage for place in steps}):
        of_stage = {place: step for place, step in steps.items() if place.stage == stage}
        alike = sum(place.count for place in of_stage) // (ranks // stages)
        works += [max(of_stage.values(), key=flops).work] * alike
    slowest = max(steps.values(), key=flops)
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
