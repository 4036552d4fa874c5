"""What the ranks who are not there have for the one that is (`megalong.dry_run.share`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from megalong.dry_run.share import SPREADS, Exchanged

TABLE = 2**12  # different rows that are drawn
LIST = 2**31  # more rows than a rank puts into any list

Group = tuple[int, ...]  # its ranks


class SyntheticRows:
    """Rows of normal numbers, with the root mean square of what this rank itself has put in.

    A row is told by the rank that it is from and its place in that rank's list, and by nothing
    else: whoever gets it gets the same one, in any run. What the others add to a sum is one such
    row for all of them together.
    """

    def __init__(self, seed: int = 0):
        self._seed = seed
        self._tables: dict[tuple, torch.Tensor] = {}
        self._lines: dict[tuple, torch.Tensor] = {}

    def answer(self, exchanged: Exchanged) -> None:
        result, me, own = exchanged.result, exchanged.me, exchanged.put_in
        if not len(result):
            return
        if exchanged.kind == "reduce_scatter":
            result += self._rows(exchanged.ranks[me : me + 1], [len(result)], own)
            return
        counts = exchanged.received or [len(own)] * len(exchanged.ranks)
        rows = self._rows(exchanged.ranks, counts, own)
        if exchanged.kind == "all_gather":
            rows[me * len(own) : (me + 1) * len(own)] = own
        result.copy_(rows)

    def _rows(self, ranks: Sequence[int], counts: Sequence[int], own: torch.Tensor) -> torch.Tensor:
        """The lists of some ranks, of so many rows each, one after the other."""
        size = own.float().square().mean().sqrt().nan_to_num(1.0)  # of none it is not a number
        table = self._table(own) * size.to(own.dtype)
        return table[self._lines_of(tuple(ranks), tuple(counts), own.device)]

    def _table(self, like: torch.Tensor) -> torch.Tensor:
        shape = TABLE, *like.shape[1:]
        key = shape, like.dtype, like.device
        if key not in self._tables:
            generator = torch.Generator().manual_seed(self._seed)
            self._tables[key] = torch.randn(shape, generator=generator).to(like)
        return self._tables[key]

    def _lines_of(
        self, ranks: Group, counts: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        """Which line of the table each row is."""
        key = ranks, counts, device
        if key not in self._lines:
            rows = torch.tensor(counts)
            places = torch.arange(sum(counts)) - (rows.cumsum(0) - rows).repeat_interleave(rows)
            numbers = torch.tensor(ranks).repeat_interleave(rows) * LIST + places
            self._lines[key] = ((numbers * SPREADS >> 40) % TABLE).to(device)
        return self._lines[key]


class Rehearsal:
    """The other ranks' own rows, for launches of which every rank's share fits, one after another.

    What a rank puts into its collectives is noted, and answers the others in the next round:

        rehearsal = Rehearsal()
        for _ in range(1 + collectives, one waiting for the other):
            for rank in range(ranks):
                with lone_rank(rank, ranks), answered(sequence, rehearsal.of(rank)):
                    ...  # the same each time
            rehearsal.next_round()

    A collective is right from the round on after that in which what all ranks put into it was
    right; so after as many rounds all are, exactly as in a launch.
    """

    def __init__(self) -> None:
        self._notes: dict[int, dict[Group, list[Exchanged]]] = {}
        self._last: dict[int, dict[Group, list[Exchanged]]] = {}

    def of(self, rank: int) -> _Part:
        """The neighbours of this rank in this round."""
        self._notes[rank] = defaultdict(list)
        return _Part(self._notes[rank], self._last)

    def next_round(self) -> None:
        self._last, self._notes = self._notes, {}


class _Part:
    """notes: what this rank puts in, is added to them. last: what all ranks have put in before."""

    def __init__(self, notes: dict[Group, list[Exchanged]], last: dict[int, dict]):
        self._notes, self._last = notes, last

    def answer(self, exchanged: Exchanged) -> None:
        ranks = tuple(exchanged.ranks)
        number = len(self._notes[ranks])
        self._notes[ranks].append(exchanged.noted())
        if self._last:
            parts = [self._last[rank][ranks][number].part_of(exchanged.me) for rank in ranks]
            parts[exchanged.me] = exchanged.part_of(exchanged.me)
            whole = sum(parts) if exchanged.kind == "reduce_scatter" else torch.cat(parts)
            exchanged.result.copy_(whole)
