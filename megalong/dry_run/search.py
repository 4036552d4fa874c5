"""The best layouts of a launch: all are estimated, the most promising are run.

The rungs of a division of `megalong.dry_run.layouts` are tried from the one that computes least
on, of those that compute the same from the lowest ZeRO stage on, which sends least, until one fits.
What needs far too much by the closed estimate of `megalong.model.memory_path` is not run, nor what
does not fit for the activations alone that `megalong.dry_run.estimate` expects, or that a run with
another ZeRO stage has held.

Which division comes next is what `megalong.dry_run.estimate` says of the time of its next rung,
than which those behind it are hardly faster. The search is over when as many layouts fit as are
wanted, and those still to come are slower by more than the estimate may be wrong. Whether a layout
fits is seen on its fullest rank, how long it takes on the slowest of each pipeline stage.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megalong.config import Config
from megalong.config.memory import USABLE
from megalong.dry_run.cluster import Cluster
from megalong.dry_run.layouts import Division, searched_settings
from megalong.dry_run.pool import planning_processes
from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from megalong.dry_run.cost import StepCost
    from megalong.dry_run.estimate import Shares
    from megalong.dry_run.step import DryRun

# By the estimate of its memory, in units of what there is, what is not run. Tests hold the estimate
# to be at most 1.7 times the peak of dry runs.
HOPELESS = 1.75
# How much slower than what is known a layout may be estimated and still be run, and how many more
# activations than there is room for it may be estimated to hold. For twelve layouts of four layers
# of the 1.3B model, on 8 ranks, the estimate was 0.92 to 1.004 of a dry run's time; tests hold time
# and activations to be at most so much of it for models that are all launches.
DOUBT = 1.1
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


class _Ladder:
    """The rungs of a division that may fit and were not tried, in the order in which they are.

    seconds: of a step of the next one, as estimated; 0 where nobody knows.
    """

    def __init__(self, rungs: Sequence[Config]):
        self.rungs, self.seconds = list(rungs), 0.0

    @property
    def config(self) -> Config:
        """The rung that comes next."""
        return self.rungs[0]

    def with_other_zero_stages(self) -> list[Config]:
        """Those that differ from the next one only in how much of the weights, gradients and
        optimizer a rank holds."""

        def rest(rung: Config) -> Config:
            parallel = dataclasses.replace(rung.parallel, zero_stage=1)
            return dataclasses.replace(rung, parallel=parallel)

        return [rung for rung in self.rungs[1:] if rest(rung) == rest(self.config)]


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
        self.in_process, self.vocab_size = submit, vocab_size
        self.cluster, self.ranks = cluster, ranks
        self.progress, self.done = progress, 0
        self.result = result
        self.shares: dict[Config, Shares | None] = {}
        self.numbers = itertools.count()  # of what was put into the queue

    def run(self, divisions: Iterable[Division], wanted: int) -> None:
        """See `search`."""
        queue: list[tuple[float, int, _Ladder]] = []
        ladders = map(self.ladder, divisions)
        self.put(queue, [ladder for ladder in ladders if ladder.rungs])
        while chosen := self.most_promising(queue, wanted):
            jobs = [self.submit(_planned, ladder.config) for ladder in chosen]
            pairs = zip(chosen, map(self.wait, jobs), strict=True)
            self.put(queue, [ladder for ladder, outcome in pairs if self.goes_on(ladder, outcome)])
        self.result.slower += [Slower(ladder.config, ladder.seconds) for _, _, ladder in queue]

    def ladder(self, division: Division) -> _Ladder:
        """Of the rungs of a division that are not hopeless."""
        from megalong.model.flops import executed_flops
        from megalong.model.memory_path import needs

        def order(rung: Config) -> tuple[int, int]:
            flops = sum(executed_flops(rung, self.vocab_size).values())
            return flops, rung.parallel.zero_stage

        rungs = []
        for rung in sorted(division.rungs, key=order):
            parallel = rung.parallel
            model_ranks = parallel.ranks_per_replica // parallel.sequence_parallel_size
            replicas, on_gpu = self.ranks // model_ranks, self.cluster.device.on_gpu
            needed = needs(rung, self.vocab_size, replicas, on_gpu=on_gpu).device
            if needed > HOPELESS * USABLE * self.cluster.device.memory:
                self.result.not_run.append(NotRun(rung, needed))
            else:
                rungs.append(rung)
        return _Ladder(rungs)

    def put(self, queue: list[tuple[float, int, _Ladder]], ladders: list[_Ladder]) -> None:
        """Into the queue, by the time that a sequence takes in the first of their rungs that may
        have room for its activations."""
        from megalong.dry_run.estimate import estimated_activations, one_stage

        while ladders:
            keys = [one_stage(ladder.config) for ladder in ladders]
            jobs = {
                key: self.submit(_shares, key)
                for key in dict.fromkeys(keys)
                if key is not None and key not in self.shares
            }
            self.shares |= {key: self.wait(job) for key, job in jobs.items()}
            shorter = []
            for ladder, key in zip(ladders, keys, strict=True):
                of = None if key is None else self.shares[key]
                held = 0.0
                if of is not None:
                    held = estimated_activations(ladder.config, of, self.ranks)
                if held > DOUBT * USABLE * self.cluster.device.memory:
                    self.without_room(ladder, held, first=True)
                    shorter.append(ladder)
                else:
                    ladder.seconds = self.seconds(ladder.config, of)
                    seconds = ladder.seconds / ladder.config.training.global_batch_size
                    heapq.heappush(queue, (seconds, next(self.numbers), ladder))
            ladders = [ladder for ladder in shorter if ladder.rungs]

    def seconds(self, config: Config, of: Shares | None) -> float:
        """Of a step, as estimated; 0 where nobody knows."""
        from megalong.dry_run.estimate import estimated_seconds
        from megalong.model.parameters import count_parameters

        if of is None:
            return 0.0
        count = count_parameters(config.model, self.vocab_size).used
        return estimated_seconds(config, of, count, self.cluster, self.vocab_size, self.ranks)

    def without_room(self, ladder: _Ladder, held: float, first: bool = False) -> None:
        """Note that activations of so many bytes are held with any ZeRO stage, and do not fit, and
        take those rungs away. first: the next one too, else it was run."""
        for rung in [ladder.config] * first + ladder.with_other_zero_stages():
            self.result.not_run.append(NotRun(rung, held, activations=True))
            ladder.rungs.remove(rung)

    def most_promising(self, queue: list[tuple[float, int, _Ladder]], wanted: int) -> list[_Ladder]:
        """Taken from the queue: some that may be among the wanted ones; none when all is known."""
        seconds = sorted(layout.seconds for layout in self.result.fitting)
        limit, most = math.inf, min(_TOGETHER, wanted - len(seconds))
        if most <= 0:
            limit, most = DOUBT * seconds[wanted - 1], _TOGETHER
        chosen: list[_Ladder] = []
        while queue and len(chosen) < most and queue[0][0] <= limit:
            chosen.append(heapq.heappop(queue)[2])
        return chosen

    def goes_on(self, ladder: _Ladder, outcome: PlannedLayout | str) -> bool:
        """Note how a run ended, with a layout or a message; whether the next rung is tried."""
        if isinstance(outcome, str):
            self.result.refused[outcome] += 1
        else:
            self.result.planned.append(outcome)
            if outcome.fits:
                return False
            held = outcome.memory.get("activations", 0)
            if held > USABLE * self.cluster.device.memory:
                self.without_room(ladder, held)
        del ladder.rungs[0]
        return bool(ladder.rungs)

    def submit(self, function: Callable[..., Any], config: Config) -> Future:
        return self.in_process(function, config, self.vocab_size, self.cluster, self.ranks)

    def wait(self, job: Future) -> Any:
        result = job.result()
        self.done += 1
        self.progress(self.done)
        return result


def _shares(config: Config, vocab_size: int, cluster: Cluster, ranks: int) -> Shares | None:
    """In a process of the pool; None where it cannot be run: then a run of the layout will tell."""
    from megalong.dry_run.estimate import shares

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
    """Run the ranks of a layout that stand for the others, in a process of
    `megalong.dry_run.pool`.

    config: resolved.
    """
    from megalong.dry_run.cost import Overlap, phase_cost, step_cost
    from megalong.dry_run.extension import planned_step
    from megalong.dry_run.ranks import ranks_to_plan

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
