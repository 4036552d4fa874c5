"""Which layouts a search runs, and which of them it finds: runs and estimates are made up."""

from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from megalong.config.arguments import config_from_values
from megalong.config.memory import USABLE
from megalong.dry_run import search as searching
from megalong.dry_run.cluster import load_cluster
from megalong.dry_run.layouts import Division
from megalong.dry_run.search import PlannedLayout, search
from megalong.utils.errors import UserError
from tests.dry_run.test_plan_text import VALUES

OFF = {"memory_path": "off"}
ON = {"memory_path": "on", "offload_activations": False}
FULL = {"memory_path": "on", "offload_activations": False, "recompute_granularity": "full"}
RANKS = 8
CLUSTER = load_cluster("h100")


def division(sequence=1, stages=(1,), memory=(OFF, ON, FULL)):
    settings = {"sequence_parallel_size": sequence}
    rungs = [
        config_from_values({**VALUES, **settings, "zero_stage": stage, **of}).resolve(RANKS)
        for stage in stages
        for of in memory
    ]
    return Division(settings, tuple(rungs))


def kind(config):
    """The rung, as the tests name it."""
    full = config.parallel.recompute_granularity == "full"
    return "full" if full else config.memory.memory_path


class Here:
    """A pool of no processes."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **_):
        pass


def find(
    divisions,
    *,
    fits,
    seconds,
    wanted=1,
    needs=lambda config: 1.0,
    activations=lambda config: 0.0,
):
    """What a search finds, and what it runs, in order: (sequence ranks, ZeRO stage, rung).

    fits, seconds, activations: of a configuration, when it is run; seconds what is estimated too.
    needs: what is estimated of its memory, in units of what there is.
    """
    runs = []

    def planned(config, *_):
        runs.append(
            (config.parallel.sequence_parallel_size, config.parallel.zero_stage, kind(config))
        )
        verdict = fits(config)
        if isinstance(verdict, Exception):
            raise verdict
        cost = SimpleNamespace(total=seconds(config)) if verdict else None
        memory = Counter(weights=1, activations=usable * activations(config))
        return PlannedLayout(config, memory, 0, {}, {}, 1, cost)

    usable = USABLE * CLUSTER.device.memory
    with (
        mock.patch("megalong.dry_run.search.ProcessPoolExecutor", Here),
        mock.patch.object(searching, "planned_layout", planned),
        mock.patch("megalong.dry_run.cost.rough_seconds", lambda config, *_: seconds(config)),
        mock.patch(
            "megalong.model.memory_path.needs",
            lambda config, *_, **__: SimpleNamespace(device=usable * needs(config)),
        ),
    ):
        return search(divisions, 256, CLUSTER, RANKS, wanted=wanted), runs


def by_sequence(config):
    """The more ranks share a sequence, the slower."""
    return float(config.parallel.sequence_parallel_size)


def test_the_fastest_are_run_and_the_others_are_told():
    divisions = [division(size) for size in (8, 4, 2, 1)] * 2
    found, runs = find(divisions, fits=lambda _: True, seconds=by_sequence, wanted=2)
    assert runs == [(1, 1, "off")] * 2
    assert [layout.cost.total for layout in found.fitting] == [1, 1]
    assert sorted(each.estimate for each in found.slower) == [2, 2, 4, 4, 8, 8]


def test_a_layout_within_the_doubt_is_run():
    divisions = [division(size, memory=(OFF,)) for size in (1, 1, 1, 1, 2, 4)]

    def seconds(config):
        return {1: 1.0, 2: 0.99 * searching.DOUBT, 4: 1.01 * searching.DOUBT}[
            config.parallel.sequence_parallel_size
        ]

    _, runs = find(divisions, fits=lambda _: True, seconds=seconds)
    assert runs[4:] == [(2, 1, "off")]


def test_what_does_not_fit_is_followed_by_what_needs_less():
    found, runs = find(
        [division()], fits=lambda config: kind(config) == "full", seconds=by_sequence
    )
    assert [rung for *_, rung in runs] == ["off", "on", "full"]
    assert [kind(layout.config) for layout in found.planned] == ["full", "off", "on"]
    assert [layout.fits for layout in found.planned] == [True, False, False]


def test_what_needs_far_too_much_is_not_run():
    found, runs = find(
        [division()],
        fits=lambda _: True,
        seconds=by_sequence,
        wanted=9,
        needs=lambda config: 2.0 if kind(config) == "off" else 1.0,
    )
    assert [rung for *_, rung in runs] == ["on"]
    [not_run] = found.not_run
    assert kind(not_run.config) == "off"
    assert not_run.estimate == pytest.approx(2 * USABLE * CLUSTER.device.memory)


def test_a_higher_zero_stage_is_run_where_it_computes_less():
    settings = {"seconds": by_sequence, "wanted": 9}
    divided = division(stages=(1, 2, 3))
    _, runs = find([divided], fits=lambda _: True, **settings)
    assert runs == [(1, 1, "off")]
    _, runs = find(
        [divided],
        fits=lambda config: config.parallel.zero_stage == 3 or kind(config) == "full",
        **settings,
    )
    assert runs == [(1, 1, "off"), (1, 2, "off"), (1, 3, "off")]


def test_a_higher_zero_stage_is_not_run_where_activations_alone_do_not_fit():
    found, runs = find(
        [division(stages=(1, 2, 3))],
        fits=lambda config: kind(config) == "full" and config.parallel.zero_stage == 3,
        seconds=by_sequence,
        activations=lambda config: 1.5 if kind(config) == "off" else 0.9,
    )
    tried = [(1, zero, rung) for rung in ("on", "full") for zero in (1, 2, 3)]
    assert runs == [(1, 1, "off"), *tried]
    assert {(each.config.parallel.zero_stage, kind(each.config)) for each in found.not_run} == {
        (2, "off"),
        (3, "off"),
    }


@pytest.mark.parametrize("seed", range(8))
def test_the_best_are_those_of_a_search_that_runs_all(seed):
    """Where what computes more, or has a higher ZeRO stage, takes longer in the same division."""
    draw = np.random.default_rng(seed)
    divisions = [division(size, stages=(1, 2, 3)) for size in (1, 2, 4, 8)]
    times, needs, fitting, activations = {}, {}, {}, {}
    for each in divisions:
        computes = ["off", "on", "full"]  # from the one that does least
        order = sorted(
            each.rungs, key=lambda rung: (computes.index(kind(rung)), rung.parallel.zero_stage)
        )
        seconds = np.sort(draw.uniform(1, 4, len(order)))
        for rung, time in zip(order, seconds, strict=True):
            times[rung] = float(time)
            needs[rung] = draw.uniform(0.5, 2.5)
            needed = needs[rung] / draw.uniform(1, 1.7)
            fitting[rung] = needed <= 1
        for rung in order:  # what ZeRO does not divide is as much with every stage
            least = min(needs[r] for r in order if kind(r) == kind(rung)) / 1.7
            activations[rung] = least
    found, runs = find(
        divisions,
        fits=fitting.get,
        seconds=times.get,
        wanted=3,
        needs=needs.get,
        activations=activations.get,
    )
    assert not any(fitting[each.config] for each in found.not_run)
    best = [
        min(times[rung] for rung in each.rungs if fitting[rung])
        for each in divisions
        if any(fitting[rung] for rung in each.rungs)
    ]
    of_divisions = [layout.cost.total for layout in found.fitting]
    assert of_divisions[:3] == sorted(best)[:3]
    assert len(runs) <= sum(len(each.rungs) for each in divisions)


def test_a_layout_that_cannot_be_run_is_told_and_the_others_are_found():
    def fits(config):
        if config.parallel.sequence_parallel_size == 1:
            return UserError("--this cannot be")
        return TypeError("none of it") if config.parallel.sequence_parallel_size == 2 else True

    divisions = [division(size, memory=(OFF,)) for size in (1, 2, 4)]
    found, _ = find(divisions, fits=fits, seconds=by_sequence, wanted=9)
    assert [layout.cost.total for layout in found.fitting] == [4]
    refused = found.refused
    assert refused["--this cannot be"] == 1
    assert sum("a defect of megalong (TypeError: none of it)" in text for text in refused) == 1
