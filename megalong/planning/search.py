"""The best layouts of a launch: all are estimated, the most promising are run.

Of each division of `megalong.planning.layouts` and each ZeRO stage the rungs are a ladder: the
upper ones need less memory and compute more. A ladder is entered where the closed estimate of
`megalong.model.memory_path` says that it fits. A rung that was run and does not fit is followed by
the one above it; one that fits by the one below, which is faster, until the border is found. What
needs far too much by that estimate is never run.

Which ladder comes next is what `megalong.planning.estimate` says of the time of a step. The search
is over when as many layouts fit as are wanted, and those still to come are slower by more than the
estimate may be wrong. Whether a layout fits is seen on its fullest rank, how long it takes on the
slowest of each pipeline stage.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
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
    from megalong.planning.estimate import Shares

# By the estimate of its memory, in units of what there is: where a ladder is entered, and what is
# not run. Tests hold the estimate to be within a fifth of dry runs of long sequences.
LIKELY, HOPELESS = 1.1, 1.5
# How much slower than what is known a layout may be estimated and still be run. For twelve layouts
# of four layers of the 1.3B model, on 8 ranks, the estimate was 0.92 to 1.004 of a dry run's time:
# what it says is slower, is.
DOUBT = 1.03
# Runs that are decided upon together, whatever the processes: the result does not hang on those.
_TOGETHER = 4


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that was run.

    config: resolved. memory, host: bytes of the fullest rank, by kind, and of its host's memory.
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

    @property
    def seconds(self) -> float:
        """Of a step, for each of its sequences."""
        return self.cost.total / self.config.training.global_batch_size


@dataclass(frozen=True)
class NotRun:
    """A layout that the estimate is sure about: bytes of the device that it says."""

    config: Config
    estimate: float


@dataclass(frozen=True)
class Slower:
    """A layout that was not run since others are faster: seconds of a step, as estimated."""

    config: Config
    estimate: float


@dataclass
class Search:
    """planned: layouts that were run, those that fit first, the fastest first. not_run: those that
    need far too much. slower: those that were not run since others are faster, of each division and
    ZeRO stage the one that would have come next. refused: messages about layouts that cannot be, by
    how many there were."""

    planned: list[PlannedLayout] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    slower: list[Slower] = field(default_factory=list)
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
    wanted: int = 5,
    processes: int | None = None,
    progress: Callable[[int, int], Any] = lambda done, known: None,
) -> Search:
    """Find the fastest layouts that fit.

    wanted: how many; so many are run at least, where there are as many. processes: that run them;
    default, as many as this one may use cores. progress: called with what has been done, estimates
    and runs, and what is known to be done.
    Raises UserError where the cluster cannot be that of such a launch.
    """
    cluster.check_gpus(ranks)
    count = processes or len(os.sched_getaffinity(0))
    start = (cluster.device.on_gpu,)
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_start, initargs=start)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Megatron-core, about what is not installed
            return _Searching(pool, vocab_size, cluster, ranks, progress).run(divisions, wanted)
    finally:
        pool.shutdown(cancel_futures=True)


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


class _Ladder:
    """The rungs of a division with one ZeRO stage, from the one that computes least on, and what is
    known of them: results by number, and the one that comes next.

    fitting: of all ladders of the division, the FLOPs of the rung that fits, by ZeRO stage.
    following: the ladder of the next ZeRO stage, which comes when this one is over.
    """

    following: _Ladder | None = None

    def __init__(
        self, rungs: list[Config], needs: list[float], flops: list[int], fitting: dict[int, int]
    ):
        """needs: in units of what there is."""
        self.rungs, self.flops, self.fitting = rungs, flops, fitting
        self.hopeless = sum(need > HOPELESS for need in needs)  # the first ones
        likely = [i for i, need in enumerate(needs) if need <= LIKELY]
        self.number = min(likely, default=len(rungs) - 1)
        self.fits: dict[int, bool] = {}
        self.seconds = 0.0

    @property
    def config(self) -> Config:
        """The rung that comes next."""
        return self.rungs[self.number]

    @property
    def is_vain(self) -> bool:
        """Whether a lower ZeRO stage, which sends less, fits and does not compute more."""
        stage, flops = self.config.parallel.zero_stage, self.flops[self.number]
        return any(lower < stage and n <= flops for lower, n in self.fitting.items())

    def is_over(self, fits: bool) -> bool:
        """Note how the run of the rung ended; whether the ladder has no other that could be better,
        else `config` is it."""
        self.fits[self.number] = fits
        if fits:
            self.fitting[self.config.parallel.zero_stage] = self.flops[self.number]
        self.number += -1 if fits else 1
        return not self.hopeless <= self.number < len(self.rungs) or self.number in self.fits


class _Searching:
    """A search that goes on."""

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        vocab_size: int,
        cluster: Cluster,
        ranks: int,
        progress: Callable[[int, int], Any],
    ):
        self.pool, self.vocab_size, self.cluster, self.ranks = pool, vocab_size, cluster, ranks
        self.progress = progress
        self.done = self.known = 0
        self.result = Search()
        self.shares: dict[Config, Shares | None] = {}
        self.numbers = itertools.count()  # of what was put into the queue

    def run(self, divisions: Iterable[Division], wanted: int) -> Search:
        """See `search`."""
        queue: list[tuple[float, int, _Ladder]] = []
        self.put(queue, [each for each in map(self.ladder, divisions) if each is not None])
        while chosen := self.most_promising(queue, wanted):
            jobs = [self.submit(_planned, ladder.config) for ladder in chosen]
            outcomes = list(map(self.wait, jobs))
            following = map(self.following, chosen, outcomes)
            self.put(queue, [ladder for ladder in following if ladder is not None])
        self.result.slower += [Slower(ladder.config, ladder.seconds) for _, _, ladder in queue]
        self.result.planned.sort(
            key=lambda each: (not each.fits, each.seconds, str(searched_settings(each.config)))
        )
        return self.result

    def ladder(self, division: Division) -> _Ladder | None:
        """The first one of a division, of those in which not all is hopeless."""
        from megalong.model.flops import executed_flops
        from megalong.model.memory_path import needs

        usable = USABLE * self.cluster.device.memory
        stages: dict[int, list[tuple[int, Config]]] = {}
        for rung in division.rungs:
            flops = sum(executed_flops(rung, self.vocab_size).values())
            stages.setdefault(rung.parallel.zero_stage, []).append((flops, rung))
        fitting: dict[int, int] = {}
        ladder = None
        for stage in sorted(stages, reverse=True):
            stages[stage].sort(key=lambda pair: pair[0])
            flops, rungs = map(list, zip(*stages[stage], strict=True))
            parallel = rungs[0].parallel
            model_ranks = parallel.ranks_per_replica // parallel.sequence_parallel_size
            replicas = self.ranks // model_ranks
            needed = [needs(rung, self.vocab_size, replicas).device for rung in rungs]
            lower = _Ladder(rungs, [each / usable for each in needed], flops, fitting)
            hopeless = lower.hopeless
            self.result.not_run += map(NotRun, rungs[:hopeless], needed[:hopeless])
            if hopeless < len(rungs):
                lower.following = ladder
                ladder = lower
        return ladder

    def put(self, queue: list[tuple[float, int, _Ladder]], ladders: list[_Ladder]) -> None:
        """Into the queue, by the time that a sequence takes in their next rungs."""
        from megalong.model.parameters import count_parameters
        from megalong.planning.estimate import alike, estimated_seconds

        needed = dict.fromkeys(alike(ladder.config) for ladder in ladders)
        jobs = {key: self.submit(_shares, key) for key in needed if key not in self.shares}
        self.shares |= {key: self.wait(job) for key, job in jobs.items()}
        for ladder in ladders:
            config, of = ladder.config, self.shares[alike(ladder.config)]
            if of is not None:
                count = count_parameters(config.model, self.vocab_size)
                ladder.seconds = estimated_seconds(
                    config, of, count.used, self.cluster, self.vocab_size, self.ranks
                )
            seconds = ladder.seconds / config.training.global_batch_size
            heapq.heappush(queue, (seconds, next(self.numbers), ladder))

    def most_promising(self, queue: list[tuple[float, int, _Ladder]], wanted: int) -> list[_Ladder]:
        """Taken from the queue: some that may be among the wanted ones; none when all is known."""
        seconds = sorted(layout.seconds for layout in self.result.fitting)
        limit = DOUBT * seconds[wanted - 1] if len(seconds) >= wanted else math.inf
        chosen: list[_Ladder] = []
        while queue and len(chosen) < _TOGETHER and queue[0][0] <= limit:
            chosen.append(heapq.heappop(queue)[2])
        return chosen

    def following(self, ladder: _Ladder, outcome: PlannedLayout | str) -> _Ladder | None:
        """Note how a run ended, with a layout or a message; what comes next of the division."""
        fits = False
        if isinstance(outcome, str):
            self.result.refused[outcome] += 1
        else:
            self.result.planned.append(outcome)
            fits = outcome.fits
        if not ladder.is_over(fits):
            return ladder
        following = ladder.following
        while following is not None and following.is_vain:
            following = following.following
        return following

    def submit(self, function: Callable[..., Any], config: Config) -> Future:
        self.known += 1
        return self.pool.submit(function, config, self.vocab_size, self.cluster, self.ranks)

    def wait(self, job: Future) -> Any:
        result = job.result()
        self.done += 1
        self.progress(self.done, self.known)
        return result


def _shares(config: Config, vocab_size: int, cluster: Cluster, ranks: int) -> Shares | None:
    """In a process of the pool; None where it cannot be run: why, a run of the layout will say."""
    from megalong.planning.estimate import shares

    try:
        return shares(config, vocab_size)
    except Exception:
        return None


def _planned(config: Config, vocab_size: int, cluster: Cluster, ranks: int) -> PlannedLayout | str:
    """In a process of the pool; a message where the layout cannot be run."""
    try:
        return planned_layout(config, vocab_size, cluster, ranks)
    except UserError as error:
        return str(error)
    except Exception as error:  # of one layout: the others may be fine
        return f"cannot be run, a defect of megalong ({type(error).__name__}: {error})"


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
