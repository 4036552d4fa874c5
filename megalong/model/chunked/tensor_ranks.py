"""The ranks that share each layer's matrices (Megatron's tensor parallelism), tile by tile.

A matrix that is cut along its outputs is entered by `enter`, one that is cut along its inputs is
left by `leave`. With `divides_rows` (Megatron's sequence parallelism) a rank has its own share of
the rows outside of the two, and all of them in between: tile i of the shares of all ranks, one
after the other.

Shape suffixes: s rows in between, l rows of a rank's own, b batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TensorRanks:
    """The ranks, and this one's place among them. ALONE is one that shares nothing.

    divides_rows: outside of `enter` and `leave`, each has its own share of the rows.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    divides_rows: bool = False

    @property
    def shares(self) -> int:
        """Into how many shares the rows are divided."""
        return self.size if self.divides_rows else 1

    def enter(self, x_lb: torch.Tensor) -> torch.Tensor:
        """A tile of rows (l, batch, ...) as (shares * l, batch, ...), those of all ranks; and of a
        gradient on the way back, what `leave` undoes."""
        if self.shares == 1:
            return x_lb
        x_lb = x_lb.contiguous()
        x_sb = x_lb.new_empty(self.size * x_lb.shape[0], *x_lb.shape[1:])
        dist.all_gather_into_tensor(x_sb, x_lb, group=self.group)
        return x_sb

    def leave(self, part_sb: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of their parts (shares * l, batch, ...) of a tile; of it this
        rank's own rows (l, batch, ...). May be computed in place."""
        if self.size == 1:
            return part_sb
        part_sb = part_sb.contiguous()
        if not self.divides_rows:
            dist.all_reduce(part_sb, group=self.group)
            return part_sb
        own_lb = part_sb.new_empty(part_sb.shape[0] // self.size, *part_sb.shape[1:])
        dist.reduce_scatter_tensor(own_lb, part_sb, group=self.group)
        return own_lb

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """x, overwritten with its sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def tile(self, x_s: torch.Tensor, rows: slice) -> torch.Tensor:
        """Of x (s, ...), which has all rows, those that a tile's `enter` gives: (shares * l, ...).

        rows: the tile, counted in a share. A view where there is one share, else a copy.
        """
        if self.shares == 1:
            return x_s[rows]
        return x_s.unflatten(0, (self.shares, -1))[:, rows].flatten(0, 1)

    def put_tile(self, x_s: torch.Tensor, rows: slice, value_s: torch.Tensor) -> None:
        """Write what `tile` reads."""
        if self.shares == 1:
            x_s[rows] = value_s
        else:
            x_s.unflatten(0, (self.shares, -1))[:, rows] = value_s.unflatten(0, (self.shares, -1))


ALONE = TensorRanks()
