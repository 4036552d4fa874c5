"""Seconds of a collective, from its algorithm and the slowest link that it uses.

Ranks fill nodes one after the other: rank r is on node r // gpus_per_node, as torchrun and SLURM
place them. All ranks do the same at the same time, so the groups that have members on a node share
its adapters, each as much as it has members there. A link is paid for by `latency` at every step
and for bytes at its rate; S bytes are those of the larger of the call's buffers. `Placement` has n,
the `ranks` of the group, its `nodes`, and how many of it are on the node with `most` and on the
one with `fewest`.

| collective                 | algorithm                     | steps    | bytes through a rank |
|----------------------------|-------------------------------|----------|----------------------|
| all_gather, reduce_scatter | ring                          | n - 1    | S (n - 1) / n        |
| all_reduce                 | ring, or tree if that is less | 2(n - 1) | 2 S (n - 1) / n      |
|                            | tree (a chain in a node)      | 2(most - 1 + log2 of nodes) | 2 S |
| broadcast, reduce          | ring, in chunks               | n - 1    | S                    |
| all_to_all                 | pairs, on the `fewest` node   | n - 1    | S (n - 1) / n        |
| send, receive              |                               | 1        | S                    |

The rings go through a node before they go on to the next: of their steps, nodes - 1 in n - 1 are
between nodes. These are NCCL's own estimates (nccl, src/graph/tuning.cc), but for its corrections
by size and protocol; gloo, too, has rings. A ring of several nodes, and a tree, is as fast as the
slower of a rank inside its node and of what `fewest` ranks have of their node's adapters. On that
node a rank of an all_to_all has most to send to other nodes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from megalong.dry_run.cluster import Cluster, Link
from megalong.dry_run.work import Collective


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a group are. ranks: how many; nodes: on how many; fewest, most: on one."""

    ranks: int
    nodes: int
    fewest: int
    most: int

    @classmethod
    def of(cls, ranks: tuple[int, ...], gpus_per_node: int) -> Placement:
        """Of global ranks."""
        on_node = Counter(rank // gpus_per_node for rank in ranks).values()
        return cls(len(ranks), len(on_node), min(on_node), max(on_node))


def collective_seconds(collective: Collective, cluster: Cluster) -> float:
    """Of one call, in which nobody waits for somebody else to come; 0 for a group of one."""
    place = Placement.of(collective.ranks, cluster.gpus_per_node)
    if place.ranks == 1:
        return 0.0
    return cluster.collective_seconds + _FORMULAS[collective.name](
        place, collective.name, collective.bytes, cluster
    )


def _all_gather(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    share = (place.ranks - 1) / place.ranks
    return _ring_latency(place, cluster) + share * size / _ring_rate(place, name, size, cluster)


def _all_reduce(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    ring = 2 * _all_gather(place, name, size, cluster)
    across = math.ceil(math.log2(place.nodes)) * _between(place, cluster).latency
    steps = (place.most - 1) * cluster.within_node.latency + across
    tree = 2 * (steps + size / _ring_rate(place, name, size, cluster))
    return min(ring, tree)


def _broadcast(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    return _ring_latency(place, cluster) + size / _ring_rate(place, name, size, cluster)


def _all_to_all(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    """What goes to other nodes and what stays in one go at the same time."""
    inside = place.fewest - 1 if place.nodes > 1 else place.ranks - 1
    outside, within, between = place.ranks - 1 - inside, cluster.within_node, None
    seconds = inside / place.ranks * size / within.rate(name, size)
    if outside:
        between = _between(place, cluster)
        share = between.adapters / cluster.gpus_per_node
        crossing = outside / place.ranks * size / (share * between.rate(name, size))
        seconds = max(seconds, crossing)
    return inside * within.latency + outside * (between.latency if between else 0) + seconds


def _send(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    link = _between(place, cluster)
    share = link.adapters / cluster.gpus_per_node if place.nodes > 1 else 1
    return link.latency + size / (share * link.rate(name, size))


_FORMULAS = {
    "all_gather": _all_gather,
    "reduce_scatter": _all_gather,
    "all_reduce": _all_reduce,
    "broadcast": _broadcast,
    "reduce": _broadcast,
    "all_to_all": _all_to_all,
    "send": _send,
    "receive": _send,
}


def _between(place: Placement, cluster: Cluster) -> Link:
    """The slowest link of the group."""
    if place.nodes == 1:
        return cluster.within_node
    assert cluster.between_nodes is not None, "check_gpus comes first"
    return cluster.between_nodes


def _ring_latency(place: Placement, cluster: Cluster) -> float:
    """Of the n - 1 steps from a rank to the one before it."""
    across = place.nodes - 1
    inside = (place.ranks - 1 - across) * cluster.within_node.latency
    return inside + (across * _between(place, cluster).latency if across else 0)


def _ring_rate(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    """Bytes/s that go through each rank."""
    within = cluster.within_node.rate(name, size)
    if place.nodes == 1:
        return within
    link = _between(place, cluster)
    across = place.fewest / cluster.gpus_per_node * link.adapters * link.rate(name, size)
    return min(within, across) if place.most > 1 else across
