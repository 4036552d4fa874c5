"""A training step of more and more ranks, each with as much of the sequence, by dry runs: of
`scaling.py weak`. To be run in a process that has been given a fake device."""

from __future__ import annotations

import time
from typing import Any

from memory_ladder import configuration
from shapes import SHAPES, VOCABULARY

from megalong.attention import DilatedPattern
from megalong.dry_run.cluster import load_cluster
from megalong.dry_run.search import planned_layout
from megalong.utils.errors import UserError

FIRST_SEGMENT, RATIO = 2048, 4
PATTERNS = {
    "three": "segments of 2,048, a shard, and the whole: as in LongNet's Figure 5",
    "ladder": "segments of 2,048, four times that, and so on up to the whole",
}


def shape(name: str, layers: int | None) -> dict[str, Any]:
    """One of shapes.py, with so many layers."""
    return SHAPES[name] | ({} if layers is None else {"num_layers": layers})


def pattern_of(kind: str, shard: int, ranks: int) -> DilatedPattern:
    """Segment length / dilation rate is the same in all branches."""
    if kind == "ladder":
        return DilatedPattern.geometric(shard * ranks, FIRST_SEGMENT, RATIO)
    lengths = sorted({FIRST_SEGMENT, shard, shard * ranks})
    return DilatedPattern(lengths, [length // FIRST_SEGMENT for length in lengths])


def planned(
    shape: dict[str, Any], kind: str, ranks: int, shard: int, cluster_name: str
) -> dict[str, Any]:
    """The step's time by what it is spent on, and of the rank that has most to do or to hold:
    collectives by axis, and bytes of memory."""
    pattern, cluster = pattern_of(kind, shard, ranks), load_cluster(cluster_name)
    start = time.process_time()
    config = configuration(
        shape
        | {
            "seq_length": shard * ranks,
            "sequence_parallel_size": ranks,
            "segment_lengths": pattern.segment_lengths,
            "dilation_rates": pattern.dilation_rates,
            "memory_path": "on",
        },
        ranks,
    )
    layout = planned_layout(config, VOCABULARY, cluster, ranks)
    cost = layout.cost
    if cost is None:
        raise UserError(f"{shard:,} tokens a rank do not fit on --cluster {cluster.name}")
    return {
        "pattern": kind,
        "ranks": ranks,
        "tokens": shard * ranks,
        "branches": pattern.branches,
        "layers": shape["num_layers"],
        "cluster": cluster.name,
        "seconds": cost.total,
        "compute": sum(cost.compute.values()) + cost.update,
        "communication": dict(cost.communication),
        "hidden": dict(cost.hidden),
        "offload": cost.offload,
        "launches": cost.launches,
        "mfu": cost.mfu,
        "bytes": {
            axis: sum(count["bytes"] for count in counts.values())
            for axis, counts in layout.traffic.items()
        },
        "memory": sum(layout.memory.values()),
        "host": layout.host,
        "cpu_seconds": round(time.process_time() - start, 1),
    }
