"""What goes over the network in a step: calls and bytes, by axis of the mesh and by collective.

Counted where every library ends up, at PyTorch's own collective operators, so that Megatron-core's
and DeepSpeed's are in it as well as ours. That looks at every operator of the step, and is done for
one step of a run only: the next ones do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megalong.utils.torch_private import COLLECTIVES, TorchDispatchMode

Counts = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Call:
    """A collective, as its operator was called.

    name: as people know it. bytes: of the larger of its buffers. tensors: all of them.
    peer: the rank within the group that one sends to or receives from, where it is that.
    """

    name: str
    group: dist.ProcessGroup
    bytes: int
    tensors: tuple[torch.Tensor, ...]
    peer: int | None


def call_of(operator: Any, args: tuple[Any, ...]) -> Call | None:
    """What an operator of torch.ops.c10d sends; None where it sends nothing (a barrier)."""
    name = COLLECTIVES.get(operator.__name__.split(".")[0])
    group = next((g for arg in args if (g := _group(arg)) is not None), None)
    if name is None or group is None:
        return None
    buffers = [list(_tensors(arg)) for arg in args]
    nbytes = max(sum(x.nbytes for x in buffer) for buffer in buffers)
    peer = args[2] if name in ("send", "receive") and isinstance(args[2], int) else None
    return Call(name, group, nbytes, tuple(x for buffer in buffers for x in buffer), peer)


class CountTraffic(TorchDispatchMode):
    """A context that counts this process's collectives.

    counts: axis -> collective -> {"calls", "bytes"}; bytes are those of the larger of a call's
        buffers. A group of one rank sends nothing and is left out.
    """

    def __init__(self, groups_by_axis: dict[str, list[dist.ProcessGroup]]):
        """groups_by_axis: `Mesh.groups_by_axis`; what none of them carries is "other"."""
        super().__init__()
        self.counts: Counts = {}
        self._axis_of_group = {
            group.group_name: axis for axis, groups in groups_by_axis.items() for group in groups
        }

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            self._count(call_of(operator, args))
        return operator(*args, **(kwargs or {}))

    def _count(self, call: Call | None) -> None:
        if call is None or call.group.size() == 1:
            return
        axis = self._axis_of_group.get(call.group.group_name, "other")
        count = self.counts.setdefault(axis, {})
        count = count.setdefault(call.name, {"calls": 0, "bytes": 0})
        count["calls"] += 1
        count["bytes"] += call.bytes


def _group(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument)
        except (RuntimeError, TypeError):
            return None  # the kind of reduction
    return argument if isinstance(argument, dist.ProcessGroup) else None


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _tensors(item)
