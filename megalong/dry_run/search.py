"""The best layouts of a launch: all are estimated, the most promising are run.

The rungs of a division of `megalong.dry_run.layouts` are tried from the one that computes least
on, of those that compute the same from the lowest ZeRO stage on, which sends least, until one fits.
What needs far too much by the closed estimate of `megalong.model.memory_path` is not run, nor what
another ZeRO stage was found to have no room for the activations of.

Which division comes next is what `megalong.dry_run.cost.rough_seconds` says of its next rung. The
search is over when as many layouts fit as are wanted, and those still to come are slower by more
than the estimate may be wrong. Whether a layout fits is seen on its fullest rank, how long it takes
on the slowest of each pipeline stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import math
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from typing import TYPE_CHECKING, Any

from megalong.config import Config
from megalong.config.memory import USABLE
from megalong.dry_run.cluster import Cluster
from megalong.dry_run.layouts import Division, replicas_of, searched_settings
from megalong.utils.errors import UserError


@contextlib.contextmanager
def planning_processes(
    on_gpu: bool, processes: int | None = None
) -> Iterator[Callable[..., Future]]:
    """Inside, a function that has one of these processes call a function with some arguments.

    processes: how many; default, as many as this one may use cores. An exception, Ctrl-C too, ends
    them in the midst of what they do.
    """
    count = processes or len(os.sched_getaffinity(0))
    before = active_children()
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_start, initargs=(on_gpu,))

    def submit(function: Callable, *arguments) -> Future:
        # This may start a process, which a terminal would send Ctrl-C to as well: not its affair.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        yield submit
    except BaseException:
        for process in active_children():
            if process not in before:
                process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(on_gpu: bool) -> None:
    """What such a process does first."""
    if on_gpu:
        from megalong.dry_run import fake_device

        fake_device.load()
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)
    if on_gpu:
        fake_device.pretend()
    from megalong.utils.command_line import filter_library_logs

    filter_library_logs()
    warnings.simplefilter("ignore")  # of libraries, about tensors that have no data


if TYPE_CHECKING:
    from megalong.dry_run.cost import StepCost
    from megalong.dry_run.step import DryRun

# By the estimate of its memory, in units of what there is, what is not run. Tests hold the estimate
# to be at most 1.7 times the peak of dry runs.
HOPELESS = 1.75
# How much slower than the slowest of the wanted a layout may be estimated, and still be
# run: so far may the estimates of two layouts be off from each other.
DOUBT = 1.3
# Runs that are decided upon together at most, whatever the processes: the result does not hang on
# those.
_TOGETHER = 4


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that was run.

    config: resolved. memory, host: bytes of the fullest rank, by kind, and of its host's memory;
        where that does not fit, of the first rank that was found not to.
    traffic, flops, kernels: of the slowest rank in a step, as far as ranks were run.
    cost: None where it does not fit.
    """

    config: Config
    memory: Mapping[str, int]
    host: int
    traffic: Mapping[str, Mapping[str, Mapping[str, int]]]
    flops: Mapping[tuple[str, str], int]
    kernels: int
    cost: StepCost | None

    @property
    def fits(self) -> bool:
        """Whether memory and host are within what can be used of the cluster's."""
        return self.cost is not None

    @property
    def seconds(self) -> float:
        """Of a step, for each of its sequences; infinite where it does not fit."""
        if self.cost is None:
            return math.inf
        return self.cost.total / self.config.training.global_batch_size


@dataclass(frozen=True)
class NotRun:
    """A layout that is known not to fit. estimate: bytes of the device that it needs about, or of
    its activations alone."""

    config: Config
    estimate: float
    activations: bool = False


@dataclass(frozen=True)
class Slower:
    """The next layout of a division of which none was run any more, since others are faster:
    seconds of a step, as estimated."""

    config: Config
    estimate: float


@dataclass
class Search:
    """planned: layouts that were run, those that fit first, the fastest first. not_run: those that
    are known not to fit. slower: divisions that others are faster than. refused: messages about
    layouts that cannot be, by how many there were."""

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
    progress: Callable[[int], Any] = lambda done: None,
    into: Search | None = None,
) -> Search:
    """Find the fastest layouts that fit.

    wanted: how many; so many are run at least, where there are as many. processes: that run them;
    default, as many as this one may use cores. progress: called with how much has been done,
    estimates and runs; how much is to come shows on the way. into: what is filled and returned, so
    that whoever interrupts a search has what it had found.
    Raises UserError where the cluster cannot be that of such a launch.
    """
    cluster.check_gpus(ranks)
    result = Search() if into is None else into
    with (
        planning_processes(cluster.device.on_gpu, processes) as submit,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of Megatron-core, about what is not installed
        try:
            _Searching(submit, vocab_size, cluster, ranks, progress, result).run(divisions, wanted)
        finally:
            result.planned.sort(
                key=lambda each: (each.seconds, str(searched_settings(each.config)))
            )
    return result


class _Searching:
    """A search that goes on."""

    def __init__(
        self,
        submit: Callable[..., Future],
        vocab_size: int,
        cluster: Cluster,
        ranks: int,
        progress: Callable[[int], Any],
        result: Search,
    ):
        self.submit, self.vocab_size = submit, vocab_size
        self.cluster, self.ranks = cluster, ranks
        self.progress, self.done = progress, 0
        self.result = result
        self.estimates: dict[Config, float] = {}  # seconds of a sequence, of what fits
        self.numbers = itertools.count()  # of what was put into the queue

    def run(self, divisions: Iterable[Division], wanted: int) -> None:
        """See `search`."""
        queue: list[tuple[float, int, list[Config]]] = []
        for division in divisions:
            self.put(queue, self.ladder(division))
        while chosen := self.most_promising(queue, wanted):
            jobs = [
                self.submit(_planned, rungs[0], self.vocab_size, self.cluster, self.ranks)
                for _, rungs in chosen
            ]
            for (seconds, rungs), job in zip(chosen, jobs, strict=True):
                outcome = job.result()
                self.done += 1
                self.progress(self.done)
                self.put(queue, self.rest(rungs, seconds, outcome))
        self.result.slower += [
            Slower(rungs[0], seconds * rungs[0].training.global_batch_size)
            for seconds, _, rungs in queue
        ]

    def ladder(self, division: Division) -> list[Config]:
        """Return the rungs of a division that are not hopeless, in the order of trial."""
        from megalong.model.flops import executed_flops
        from megalong.model.memory_path import needs

        def order(rung: Config) -> tuple[int, int]:
            flops = sum(executed_flops(rung, self.vocab_size).values())
            return flops, rung.parallel.zero_stage

        rungs = []
        for rung in sorted(division.rungs, key=order):
            replicas = replicas_of(rung, self.ranks)
            on_gpu = self.cluster.device.on_gpu
            needed = needs(rung, self.vocab_size, replicas, on_gpu=on_gpu).device
            if needed > HOPELESS * USABLE * self.cluster.device.memory:
                self.result.not_run.append(NotRun(rung, needed))
            else:
                rungs.append(rung)
        return rungs

    def put(self, queue: list[tuple[float, int, list[Config]]], rungs: list[Config]) -> None:
        """Put a division into the queue, by the estimate of a sequence in its next rung."""
        from megalong.dry_run.cost import rough_seconds

        if rungs:
            seconds = rough_seconds(rungs[0], self.vocab_size, self.cluster, self.ranks)
            seconds /= rungs[0].training.global_batch_size
            heapq.heappush(queue, (seconds, next(self.numbers), rungs))

    def most_promising(
        self, queue: list[tuple[float, int, list[Config]]], wanted: int
    ) -> list[tuple[float, list[Config]]]:
        """Take from the queue some that may be among the wanted ones; none when all is known."""
        fitting = sorted(self.result.fitting, key=lambda layout: layout.seconds)
        limit, most = math.inf, min(_TOGETHER, wanted - len(fitting))
        if most <= 0:
            best = max(self.estimates[layout.config] for layout in fitting[:wanted])
            limit, most = DOUBT * best, _TOGETHER
        chosen = []
        while queue and len(chosen) < most and queue[0][0] <= limit:
            seconds, _, rungs = heapq.heappop(queue)
            chosen.append((seconds, rungs))
        return chosen

    def rest(
        self, rungs: list[Config], seconds: float, outcome: PlannedLayout | str
    ) -> list[Config]:
        """Note how a run ended, with a layout or a message; return the rungs still to be tried."""
        tried, *others = rungs
        if isinstance(outcome, str):
            self.result.refused[outcome] += 1
            return others
        self.result.planned.append(outcome)
        if outcome.fits:
            self.estimates[tried] = seconds
            return []
        held = outcome.memory.get("activations", 0)
        if held > USABLE * self.cluster.device.memory:  # with any ZeRO stage
            without = [rung for rung in others if _with_zero_1(rung) == _with_zero_1(tried)]
            self.result.not_run += [NotRun(rung, held, activations=True) for rung in without]
            others = [rung for rung in others if rung not in without]
        return others


def _with_zero_1(config: Config) -> Config:
    parallel = dataclasses.replace(config.parallel, zero_stage=1)
    return dataclasses.replace(config, parallel=parallel)


def _planned(config: Config, vocab_size: int, cluster: Cluster, ranks: int) -> PlannedLayout | str:
    """In a process of the pool; a message where the layout cannot be run."""
    try:
        return planned_layout(config, vocab_size, cluster, ranks)
    except UserError as error:
        return str(error)
    except Exception as error:  # of one layout: the others may be fine
        return f"cannot be run, a defect of megalong ({type(error).__name__}: {error})"


def planned_layout(config: Config, vocab_size: int, cluster: Cluster, ranks: int) -> PlannedLayout:
    """Run the ranks of a layout that stand for the others, in a process of
    `megalong.dry_run.search`.

    config: resolved.
    """
    from megalong.dry_run.cost import Overlap, phase_cost, step_cost
    from megalong.dry_run.layouts import ranks_to_plan
    from megalong.dry_run.step import planned_step

    cluster = cluster.used_by(ranks)

    def fits(step: DryRun) -> bool:
        device, host = step.memory.total(), step.host * cluster.gpus_per_node
        return device <= USABLE * cluster.device.memory and host <= USABLE * cluster.host_memory

    steps = {}
    for place in ranks_to_plan(config, ranks):
        steps[place] = planned_step(config, vocab_size, rank=place.rank, ranks=ranks)
        if not fits(steps[place]):
            break
    *_, last = steps.values()
    fullest = max(steps.values(), key=lambda step: step.memory.total()) if fits(last) else last
    overlap = Overlap.of(config, ranks)

    def seconds(step: DryRun) -> float:
        return phase_cost(step.work, ("forward", "backward"), cluster, overlap).total

    cost = None
    if fits(last):
        stages = config.parallel.pipeline_model_parallel_size
        works = []
        for stage in sorted({place.stage for place in steps}):
            of_stage = {place: step for place, step in steps.items() if place.stage == stage}
            count = sum(place.count for place in of_stage) // (ranks // stages)
            works += [max(of_stage.values(), key=seconds).work] * count
        cost = step_cost(works, cluster, config, vocab_size, ranks)
    slowest = max(steps.values(), key=seconds)
    return PlannedLayout(
        config=config,
        memory=fullest.memory,
        host=max(step.host for step in steps.values()),
        traffic=slowest.traffic,
        flops=slowest.work.flops(),
        kernels=sum(slowest.work.kernels().values()),
        cost=cost,
    )
