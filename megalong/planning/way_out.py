"""What would make a model fit that fits nowhere: more devices, or a shorter sequence.

By the estimate of `--memory-path auto`, not by dry runs: it says where to look next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalong.config import Config
from megalong.config.memory import USABLE
from megalong.errors import UserError
from megalong.planning.cluster import Cluster
from megalong.planning.layouts import possible_layouts
from megalong.wording import counted

_DOUBLINGS = 10


def ways_out(
    values: Mapping[str, Any], vocab_size: int, cluster: Cluster, ranks: int
) -> list[tuple[str, Config, int]]:
    """The least that would be enough: "512 GPUs", or "--seq-length 65536", each with the layout
    that needs least memory and its ranks. Empty where neither helps.

    values: settings as given, of which those of the layout stay.
    """
    found = []
    for more in (ranks * 2**i for i in range(1, _DOUBLINGS + 1)):
        least = _smallest(values, vocab_size, cluster, more)
        if least is not None:
            found.append((counted(more, "GPU"), least, more))
            break
    for length in _shorter(values):
        least = _smallest({**values, "seq_length": length}, vocab_size, cluster, ranks)
        if least is not None:
            found.append((f"--seq-length {length}", least, ranks))
            break
    return found


def _shorter(values: Mapping[str, Any]) -> Iterator[int]:
    """Halves of the given sequence, if the pattern does not have to reach further."""
    length = values.get("seq_length", 0)
    for _ in range(_DOUBLINGS):
        if length % 2 or length <= 1024:
            return
        length //= 2
        yield length


def _smallest(
    values: Mapping[str, Any], vocab_size: int, cluster: Cluster, ranks: int
) -> Config | None:
    """The layout with the smallest estimate, if that fits."""
    from megalong.model.memory_path import needs

    try:
        cluster.check_gpus(ranks)
        layouts = possible_layouts(values, ranks, cluster.gpus_per_node)
    except UserError:
        return None
    estimates = []
    for division in layouts.divisions:
        for config in division.rungs:
            parallel = config.parallel
            replicas = parallel.data_parallel_size(ranks) * parallel.sequence_parallel_size
            needed = needs(config, vocab_size, replicas)
            on_node = needed.host * min(ranks, cluster.gpus_per_node)
            if on_node <= USABLE * cluster.host_memory:
                estimates.append((needed.device, len(estimates), config))
    if not estimates:
        return None
    least, _, config = min(estimates)
    return config if least <= USABLE * cluster.device.memory else None
