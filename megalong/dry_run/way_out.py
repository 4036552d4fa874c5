"""What would make a model fit that fits nowhere: other settings than some that were given, more
devices, or a shorter sequence.

By the estimate of `--memory-path auto`, not by dry runs: it says where to look next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalong.config import Config, flag_name
from megalong.config.flags import shown
from megalong.config.memory import PIECES, USABLE
from megalong.dry_run.cluster import Cluster
from megalong.dry_run.layouts import DIVISION, RUNG, possible_layouts
from megalong.utils.errors import UserError, counted

_DOUBLINGS = 10


def ways_out(
    values: Mapping[str, Any], vocab_size: int, cluster: Cluster, ranks: int
) -> list[tuple[str, Config, int]]:
    """The least that would be enough: "without --zero-stage 1", "512 GPUs", or "--seq-length
    65536", each with the layout that needs least memory and its ranks. Empty where nothing helps.

    values: settings as given, of which those of the layout stay, but for those that are named.
    """
    found = []
    for names in _left_out(values, vocab_size, cluster, ranks):
        least = _smallest(_without(values, names), vocab_size, cluster, ranks)
        flags = " ".join(_as_given(name, values[name]) for name in names)
        found.append((f"without {flags}", least, ranks))
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


def _left_out(
    values: Mapping[str, Any], vocab_size: int, cluster: Cluster, ranks: int
) -> list[tuple[str, ...]]:
    """The given settings of the layout without which it would fit: each that is enough by itself,
    or else as few as are enough together."""

    def fits(without: tuple[str, ...]) -> bool:
        return _smallest(_without(values, without), vocab_size, cluster, ranks) is not None

    given = tuple(name for name in (*DIVISION, *RUNG, *PIECES) if name in values)
    if not given or fits(()) or not fits(given):  # or the estimate has no other reason
        return []
    alone = [(name,) for name in given if fits((name,))]
    if alone:
        return alone
    needed = given
    for name in given:
        fewer = tuple(other for other in needed if other != name)
        needed = fewer if fits(fewer) else needed
    return [needed]


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _as_given(name: str, value: Any) -> str:
    """ "--zero-stage 1", "--no-tiled-mlp"."""
    flag = flag_name(name)
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag} {shown(value)}"


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
        layouts = possible_layouts(values, ranks, cluster.gpus_per_node, cluster.device.on_gpu)
    except UserError:
        return None
    estimates = []
    for division in layouts.divisions:
        for config in division.rungs:
            parallel = config.parallel
            replicas = parallel.data_parallel_size(ranks) * parallel.sequence_parallel_size
            needed = needs(config, vocab_size, replicas, on_gpu=cluster.device.on_gpu)
            on_node = needed.host * min(ranks, cluster.gpus_per_node)
            if on_node <= USABLE * cluster.host_memory:
                estimates.append((needed.device, len(estimates), config))
    if not estimates:
        return None
    least, _, config = min(estimates)
    return config if least <= USABLE * cluster.device.memory else None
