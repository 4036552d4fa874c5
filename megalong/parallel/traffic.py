"""What goes over the network in a step: calls and bytes, by axis of the mesh and by collective.

Counted where every library ends up, at PyTorch's own collective operators, so that Megatron-core's
and DeepSpeed's are in it as well as ours. That looks at every operator of the step, and is done for
one step of a run only: the next ones do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megalong.torch_private import COLLECTIVES, TorchDispatchMode

Counts = dict[str, dict[str, dict[str, int]]]


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
            self._count(operator.__name__.split(".")[0], args)
        return operator(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple[Any, ...]) -> None:
        name = COLLECTIVES.get(operator)
        group = next((g for arg in args if (g := _group(arg)) is not None), None)
        if name is None or group is None or group.size() == 1:
            return
        axis = self._axis_of_group.get(group.group_name, "other")
        count = self.counts.setdefault(axis, {}).setdefault(name, {"calls": 0, "bytes": 0})
        count["calls"] += 1
        count["bytes"] += max(sum(x.nbytes for x in _tensors(arg)) for arg in args)


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
