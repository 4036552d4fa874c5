"""The rows that shards send each other, and the collectives that carry them.

A *row* is the key and the value of one position and one stream; a stream is a pair (kv head,
offset), so that query heads which read the same rows share them. Rows travel in one flat list:
(rows, 2, batch, head_dim), keys at 0 and values at 1 of the second axis.

Two collectives, each started before the local attention and finished after it:

GatherRows: where a segment spans whole shards, its m ranks all-gather their rows of it. A branch
    (w, r) with w = m l puts ceil(l / r) rows of every stream in, and m times that comes out, so
    for one layer, forward, the gathered list has

        2 x batch x head_dim x streams x m ceil(l / r)   numbers,

    summed over the branches of equal m, which share one collective; 1 / m of it is the rank's own.
    With w / r fixed this does not depend on the number of ranks (r dividing l). The backward pass
    reduce-scatters as many float32.
SendRows: everything else (segments that begin inside a shard; r > l, where most ranks
    have no row at all). One all-to-all, in which each rank receives the rows that its queries see
    and no others.

Shape suffixes: b batch, s sequence, g kv heads, d head_dim, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
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
    def create(cls, group: dist.ProcessGroup, subgroup_sizes=(), timeout=None) -> SequenceGroup:
        """Make the subgroups of these sizes; called by all ranks of the world, each with the group
        of its own sequence and the same sizes.

        timeout: of their collectives, a timedelta; None is PyTorch's.

        All of them take part in making every group: PyTorch's other way, among the members alone,
        names a group by how many groups a process has, and hangs where two have different numbers.
        """
        ranks = dist.get_process_group_ranks(group)
        rank, size = ranks.index(dist.get_rank()), len(ranks)
        sizes = sorted(set(subgroup_sizes) - {1, size})
        subgroups = {size: group}
        sequences: list[list[int]] = [[]] * dist.get_world_size()
        if sizes:
            dist.all_gather_object(sequences, ranks)
        for m in sizes:
            for sequence in sorted({tuple(members) for members in sequences}):
                for first in range(0, size, m):
                    made = dist.new_group(sequence[first : first + m], timeout=timeout)
                    if dist.get_rank() in sequence[first : first + m]:
                        subgroups[m] = made
        return cls(rank, size, group, subgroups)


@dataclass(frozen=True)
class Piece:
    """Rows of a list that belong to different positions or heads, so that they can be added to a
    (batch, sequence, kv heads, head_dim) tensor at once."""

    index: torch.Tensor  # of rows in the list
    positions: torch.Tensor  # in the shard
    kv_heads: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """What one rank puts into a collective; filler rows are in no piece."""

    positions: torch.Tensor  # (rows,), in the shard
    kv_heads: torch.Tensor  # (rows,)
    pieces: tuple[Piece, ...]

    def take(self, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor) -> torch.Tensor:
        """The list (rows, 2, batch, head_dim)."""
        taken = [x[:, self.positions, self.kv_heads].transpose(0, 1) for x in (k_bsgd, v_bsgd)]
        return torch.stack(taken, dim=1)

    def add_to(self, dk_bsgd: torch.Tensor, dv_bsgd: torch.Tensor, rows: torch.Tensor) -> None:
        """Add a list of gradients to those of the shard's keys and values, in place."""
        for piece in self.pieces:
            for half, total in enumerate((dk_bsgd, dv_bsgd)):
                part_bnd = rows[piece.index, half].transpose(0, 1).to(total.dtype)
                total[:, piece.positions, piece.kv_heads] += part_bnd


@dataclass(frozen=True)
class GatherRows:
    """All-gather inside the subgroup of `ranks` ranks; backward, reduce-scatter."""

    rows: Rows
    ranks: int

    def start(self, sequence: SequenceGroup, k_bsgd, v_bsgd):
        """Begin to gather. Returns the list that will hold the rows of all ranks, and the work."""
        own = self.rows.take(k_bsgd, v_bsgd)
        group = sequence.subgroups[self.ranks]
        gathered = own.new_empty(dist.get_world_size(group) * len(own), *own.shape[1:])
        return gathered, dist.all_gather_into_tensor(gathered, own, group=group, async_op=True)

    def start_back(self, sequence: SequenceGroup, gradients: torch.Tensor):
        """Begin to sum the gradients of the gathered list into each rank's own rows."""
        group = sequence.subgroups[self.ranks]
        own = gradients.new_empty(
            len(gradients) // dist.get_world_size(group), *gradients.shape[1:]
        )
        return own, dist.reduce_scatter_tensor(own, gradients, group=group, async_op=True)


@dataclass(frozen=True)
class SendRows:
    """All-to-all over the sequence group; each rank gets what it needs. Backward, the reverse."""

    rows: Rows
    sent: tuple[int, ...]  # rows for each rank
    received: tuple[int, ...]  # rows from each rank

    def start(self, sequence: SequenceGroup, k_bsgd, v_bsgd):
        own = self.rows.take(k_bsgd, v_bsgd)
        return self._exchange(sequence, own, self.sent, self.received)

    def start_back(self, sequence: SequenceGroup, gradients: torch.Tensor):
        return self._exchange(sequence, gradients, self.received, self.sent)

    @staticmethod
    def _exchange(sequence: SequenceGroup, rows: torch.Tensor, sent, received):
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            arriving, rows, list(received), list(sent), group=sequence.group, async_op=True
        )
        return arriving, work
