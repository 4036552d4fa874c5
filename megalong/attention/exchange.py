"""The ranks of a sequence, and the collectives that carry rows between them.

A *row* is the key and the value of one position and one kv head. Rows travel in one flat list:
(rows, 2, batch, head_dim), keys at 0 and values at 1 of the second axis. Which rows, in which
order: `sequence_plan`. The backward pass carries as many back, float32.

Each collective is started before the local attention and finished after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The ranks that share one sequence, in the order of its shards.

    subgroups: by number of ranks m, the group of the m consecutive ranks that this rank is one of
        (fewer, where m does not divide the number of ranks and this is the end).
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    subgroups: dict[int, dist.ProcessGroup]

    @classmethod
    def create(
        cls, group: dist.ProcessGroup, subgroup_sizes=(), timeout: timedelta | None = None
    ) -> SequenceGroup:
        """Make the subgroups of these sizes; called by all ranks of the world, each with the group
        of its own sequence and the same sizes.

        timeout: of their collectives; None is PyTorch's.
        """
        size = dist.get_world_size(group)
        subgroups = {size: group}
        for m in sorted(set(subgroup_sizes) - {1, size}):
            ranks = [list(range(first, min(first + m, size))) for first in range(0, size, m)]
            subgroups[m] = _divide(group, ranks, timeout)
        return cls(dist.get_rank(group), size, group, subgroups)


def _divide(
    group: dist.ProcessGroup, parts: list[list[int]], timeout: timedelta | None
) -> dist.ProcessGroup:
    """This rank's group, of those into which a group is divided.

    parts: for each the ranks, counted in the group; every rank is in one.

    NCCL splits the group's communicator: only its members take part, and no rendezvous is needed.
    For that the default group must be bound to a device, as DeepSpeed does where there are GPUs.
    """
    if dist.get_backend(group) == "nccl" and dist.group.WORLD.bound_device_id is not None:
        return dist.split_group(group, parts, timeout=timeout)
    # The ranks of the world make every group together: PyTorch's other way, among the members
    # alone, names a group by how many a process has, and hangs where two have different numbers.
    groups: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(groups, dist.get_process_group_ranks(group))
    for ranks in sorted({tuple(ranks) for ranks in groups}):
        for part in parts:
            members = [ranks[place] for place in part]
            made = dist.new_group(members, timeout=timeout)
            if dist.get_rank() in members:
                mine = made
    return mine


@dataclass(frozen=True)
class AllGather:
    """Inside the subgroup of `ranks` ranks; backward, a reduce-scatter."""

    ranks: int

    def start(self, sequence: SequenceGroup, rows: torch.Tensor):
        """Begin to gather. Returns the list that will hold the rows of all ranks, and the work."""
        group = sequence.subgroups[self.ranks]
        gathered = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
        return gathered, dist.all_gather_into_tensor(gathered, rows, group=group, async_op=True)

    def start_back(self, sequence: SequenceGroup, gradients: torch.Tensor):
        """Begin to sum the gradients of the gathered list into each rank's own rows."""
        group = sequence.subgroups[self.ranks]
        own = gradients.new_empty(
            len(gradients) // dist.get_world_size(group), *gradients.shape[1:]
        )
        return own, dist.reduce_scatter_tensor(own, gradients, group=group, async_op=True)


@dataclass(frozen=True)
class AllToAll:
    """Over the whole sequence group, different numbers of rows; backward, the reverse."""

    sent: tuple[int, ...]  # rows for each rank
    received: tuple[int, ...]  # rows from each rank

    def start(self, sequence: SequenceGroup, rows: torch.Tensor):
        """Begin to send. Returns the list that will hold the rows received, and the work."""
        return self._exchange(sequence, rows, self.sent, self.received)

    def start_back(self, sequence: SequenceGroup, gradients: torch.Tensor):
        """Begin to send the gradients of the rows received to where the rows are from."""
        return self._exchange(sequence, gradients, self.received, self.sent)

    @staticmethod
    def _exchange(sequence: SequenceGroup, rows: torch.Tensor, sent, received):
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            arriving, rows, list(received), list(sent), group=sequence.group, async_op=True
        )
        return arriving, work
