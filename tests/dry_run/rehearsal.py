"""Neighbours of a rank who answer with their own rows, noted in the round before."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch

from megalong.dry_run.share import Exchanged


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
        self._notes: dict[int, dict[tuple[int, ...], list[Exchanged]]] = {}
        self._last: dict[int, dict[tuple[int, ...], list[Exchanged]]] = {}

    def of(self, rank: int) -> _Part:
        """The neighbours of this rank in this round."""
        self._notes[rank] = defaultdict(list)
        return _Part(self._notes[rank], self._last)

    def next_round(self) -> None:
        self._last, self._notes = self._notes, {}


class _Part:
    """notes: what this rank puts in, is added to them. last: what all ranks have put in before."""

    def __init__(self, notes: dict[tuple[int, ...], list[Exchanged]], last: dict[int, dict]):
        self._notes, self._last = notes, last

    def answer(self, exchanged: Exchanged) -> None:
        ranks = tuple(exchanged.ranks)
        number = len(self._notes[ranks])
        put_in = exchanged.put_in.detach().clone()
        noted = replace(exchanged, put_in=put_in, result=put_in.new_empty(0))
        self._notes[ranks].append(noted)
        if self._last:
            parts = [self._last[rank][ranks][number].part_of(exchanged.me) for rank in ranks]
            parts[exchanged.me] = exchanged.part_of(exchanged.me)
            whole = sum(parts) if exchanged.kind == "reduce_scatter" else torch.cat(parts)
            exchanged.result.copy_(whole)
