"""Whole matrices for an optimizer that ZeRO 1 or 2 steps on flat partitions, and tensor parallelism
on slices.

The ranks that hold the same weights cut the list of all matrices into equal partitions, anywhere.
A matrix that lies in one partition is computed by its rank alone; one that is cut, by every rank
that has a piece of it, to which the others send theirs. These are two matrices of a rank at most,
unless they are larger than a partition, so little is sent. Then tensor-parallel ranks gather their
slices, and each computes the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalong.parallel.deepspeed_private import Piece


@dataclass(frozen=True)
class DividedMatrix:
    """A parameter of one or several matrices, of which this rank has a piece of a slice.

    shape: of this tensor rank's slice. matrices: from the slices of all tensor ranks to the whole
    matrices in it; slice_of: from them to this rank's slice.
    """

    shape: torch.Size
    piece: Piece
    matrices: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
    slice_of: Callable[[Sequence[torch.Tensor]], torch.Tensor]


class DividedMatrices:
    """All matrices of which this rank has a piece: a `megalong.model.optimizers.WholeMatrices`.

    partition: elements of a partition. replica_group: the ranks with the other partitions of the
    same slices; tensor_group: those with other slices of the same matrices.
    """

    def __init__(
        self,
        matrices: Sequence[DividedMatrix],
        partition: int,
        replica_group: dist.ProcessGroup,
        tensor_group: dist.ProcessGroup,
    ):
        # Everybody sends and receives in this order.
        self._matrices = sorted(matrices, key=lambda matrix: matrix.piece.start)
        self._partition = partition
        self._replicas, self._tensor = replica_group, tensor_group
        self._rank = dist.get_rank(replica_group)
        self._sizes = [self._sizes_of(matrix) for matrix in self._matrices]

    def updates(
        self,
        direction: Callable[[int, int], torch.Tensor],
        update_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Of each matrix, where its piece begins in the partition, and the update of this piece,
        flat; see `WholeMatrices`. Called by all ranks of both groups."""
        pieces = [
            direction(matrix.piece.start, matrix.piece.start + matrix.piece.size)
            for matrix, sizes in zip(self._matrices, self._sizes, strict=True)
            if len(sizes) > 1
        ]
        whole = iter(self._exchanged(pieces, direction(0, 0)))
        for matrix, sizes in zip(self._matrices, self._sizes, strict=True):
            piece = matrix.piece
            if len(sizes) > 1:
                flat = next(whole)
            else:
                flat = direction(piece.start, piece.start + piece.size)
            slices = self._gathered(flat.view(matrix.shape))
            updates = [update_of(part) for part in matrix.matrices(slices)]
            update = matrix.slice_of(updates).flatten()
            yield piece.start, update[piece.first : piece.first + piece.size]

    def _sizes_of(self, matrix: DividedMatrix) -> dict[int, int]:
        """Rank of the replica group -> elements of the matrix in its partition, if it has some."""
        size, piece = self._partition, matrix.piece
        start = self._rank * size + piece.start - piece.first
        stop = start + matrix.shape.numel()
        return {
            rank: min(stop, (rank + 1) * size) - max(start, rank * size)
            for rank in range(start // size, (stop - 1) // size + 1)
        }

    def _exchanged(self, own: list[torch.Tensor], nothing: torch.Tensor) -> list[torch.Tensor]:
        """The matrices that are cut, whole and flat. own: this rank's pieces of them; nothing: a
        piece of no elements."""
        ranks, me = self._replicas.size(), self._rank
        if ranks == 1:
            return []
        cut = [sizes for sizes in self._sizes if len(sizes) > 1]
        # By rank: no two ranks share pieces of two matrices.
        sent, received = {}, {}
        for piece, sizes in zip(own, cut, strict=True):
            for rank in sizes.keys() - {me}:
                sent[rank], received[rank] = piece, sizes[rank]
        received = dict(sorted(received.items()))
        leaving = torch.cat([nothing, *(sent[rank] for rank in received)])
        arriving = nothing.new_empty(sum(received.values()))
        dist.all_to_all_single(
            arriving,
            leaving,
            [received.get(rank, 0) for rank in range(ranks)],
            [len(sent.get(rank, ())) for rank in range(ranks)],
            group=self._replicas,
        )
        pieces = dict(zip(received, arriving.split(list(received.values())), strict=True))
        return [
            torch.cat([piece if rank == me else pieces[rank] for rank in sizes])
            for piece, sizes in zip(own, cut, strict=True)
        ]

    def _gathered(self, part: torch.Tensor) -> Sequence[torch.Tensor]:
        """The slices of all tensor ranks."""
        ranks = self._tensor.size()
        if ranks == 1:
            return [part]
        slices = part.new_empty(ranks * part.size(0), part.size(1))
        dist.all_gather_into_tensor(slices, part, group=self._tensor)
        return slices.chunk(ranks)
