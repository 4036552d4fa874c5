"""Seconds of collectives, by hand: 4 GPUs a node, 100 bytes/s inside, 2 adapters of 20 between."""

import pytest

from megalong.dry_run.cluster import COLLECTIVES, Cluster, Curve, Device, Link
from megalong.dry_run.cost import Placement, collective_seconds
from megalong.dry_run.work import Collective


def link(bandwidth, latency, adapters=1, **shares):
    curves = {name: Curve(((1.0, shares.get(name, 1.0)),)) for name in COLLECTIVES}
    return Link("a link", bandwidth, latency, curves, adapters)


def cluster(within=None, between=None, call=0.0):
    device = Device("d", 1e9, {}, 1.0, {}, {}, {}, Curve(((1.0, 1.0),)), 0.0, 0.0, 0.0)
    within = within or link(100.0, 0.001)
    return Cluster("c", device, 4, within, between or link(20.0, 0.01, 2), call, 1e9, 1.0, 0.0)


def seconds(name, size, ranks, **given):
    return collective_seconds(
        Collective("data", "backward", name, size, tuple(ranks)), cluster(**given)
    )


def test_placement():
    assert Placement.of((0, 1, 2, 3), 4) == Placement(4, 1, 4, 4)
    assert Placement.of((2, 3, 4, 5, 6, 7), 4) == Placement(6, 2, 2, 4)
    assert Placement.of((1, 5, 9), 4) == Placement(3, 3, 1, 1)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_group_of_one_takes_no_time(name):
    assert seconds(name, 1000, [3], call=1.0) == 0


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        # Inside a node: steps of 1 ms, 100 bytes/s, 1,000 bytes.
        ("all_gather", range(4), 3 * 0.001 + 7.5),
        ("reduce_scatter", range(4), 3 * 0.001 + 7.5),
        ("all_reduce", range(2), 2 * (0.001 + 5)),
        ("all_to_all", range(4), 3 * 0.001 + 7.5),
        ("broadcast", range(4), 3 * 0.001 + 10),
        ("reduce", range(4), 3 * 0.001 + 10),
        ("send", range(2), 0.001 + 10),
        ("receive", range(2), 0.001 + 10),
        # Two whole nodes: 6 steps inside and 1 between, and the adapters' 40 bytes/s for the ring.
        ("all_gather", range(8), 6 * 0.001 + 0.01 + 875 / 40),
        ("all_reduce", range(8), 2 * (6 * 0.001 + 0.01 + 875 / 40)),
        # 4 of the 7 others are outside; a quarter of the adapters for each GPU, 10 bytes/s.
        ("all_to_all", range(8), 3 * 0.001 + 4 * 0.01 + 500 / 10),
        # One of each node, three nodes: a quarter of the adapters, since the others do the same.
        ("all_gather", (1, 5, 9), 2 * 0.01 + 2000 / 3 / 10),
        ("send", (1, 5, 9), 0.01 + 1000 / 10),
        # Two of one node and four of the other: half of the adapters.
        ("reduce_scatter", range(2, 8), 4 * 0.001 + 0.01 + 1000 * 5 / 6 / 20),
    ],
)
def test_by_hand(name, ranks, expected):
    assert seconds(name, 1000, ranks) == pytest.approx(expected)
    assert seconds(name, 1000, ranks, call=0.25) == pytest.approx(expected + 0.25)


def test_many_ranks_reduce_small_buffers_along_a_tree():
    ranks = range(1024)  # 256 nodes: 3 steps inside and 8 between, up and down
    expected = 2 * (3 * 0.001 + 8 * 0.01 + 8 / 40)
    assert seconds("all_reduce", 8, ranks) == pytest.approx(expected)


def test_a_ring_is_not_faster_than_its_ranks_inside_a_node():
    fast = link(1000.0, 0.0, 4)
    assert seconds("all_gather", 1000, range(8), between=fast) == pytest.approx(6 * 0.001 + 8.75)


def test_shares_by_collective():
    within = link(100.0, 0.0, all_reduce=0.5)
    assert seconds("all_reduce", 1000, range(2), within=within) == pytest.approx(20)
    assert seconds("all_gather", 1000, range(2), within=within) == pytest.approx(5)
