"""Whose turn it is: sample by sample, sources take their shares, never more than one sample off.

This is the chairman assignment problem (R. Tijdeman, Discrete Mathematics 32, 1980). Of K sources,
with 1/M = 1/(2K - 2), there is an order in which each source of share w has had, after any number n
of samples, w n of them to within 1 - 1/M. So its sample number c (from 0) has a first turn, before
which it would be too early, and a last one, after which it would be too late:

    ceil((c + 1/M) / w)  <=  turn  <=  floor((c + 1 - 1/M) / w) + 1      (turns counted from 1)

and taking, of the samples whose time has come, the one whose last turn is nearest, keeps to all of
them wherever that is possible at all (earliest deadline first). All in integers: no rounding adds
up, and every machine finds the same order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush

import numpy as np

BLOCK = 4096  # turns that are found together, and kept
_STATES = 1024  # of the sources at the beginning of blocks, that are kept at most


class Apportionment:
    """Turns 0, 1, 2, ... of the sources. They hang on the shares alone, not on how many are asked
    for, nor in which order; safe among threads.

    shares: of each source, not negative, with sum 1. A source of share 0 has no turn. Where two
        sources are equally urgent, the first comes first.
    taken: the turns that each source has had already, as `counts` gave them: the turns before
        those cannot be asked for, and are not computed again.
    """

    def __init__(self, shares: Sequence[Fraction], taken: Sequence[int] | None = None) -> None:
        if any(share < 0 for share in shares) or sum(shares) != 1:
            raise ValueError(f"shares {', '.join(map(str, shares))}: their sum has to be 1")
        self._whole = math.lcm(*(share.denominator for share in shares))
        self._parts = [int(share * self._whole) for share in shares]
        self._margin = max(2 * sum(part > 0 for part in self._parts) - 2, 2)  # M above
        taken = [0] * len(shares) if taken is None else list(taken)
        self.first = sum(taken)  # the first turn that can be asked for
        self._states = {0: taken}  # by block, from `first` on
        self._spacing = 1  # blocks between those that are kept
        # By block: counts before it, the source of each turn, counts after it.
        self._blocks: dict[int, tuple[list[int], np.ndarray, list[int]]] = {}
        self._lock = threading.Lock()

    def turn(self, i: int) -> tuple[int, int]:
        """The source that has turn i, and how many it had before."""
        with self._lock:
            before, turns, inside = self._at(i)
            source = int(turns[inside])
            return source, before[source] + int(np.count_nonzero(turns[:inside] == source))

    def counts(self, i: int) -> list[int]:
        """How many of the turns before turn i each source has had."""
        with self._lock:
            before, turns, inside = self._at(i)
            inside = np.bincount(turns[:inside], minlength=len(before))
            return [one + two for one, two in zip(before, inside.tolist(), strict=True)]

    def _at(self, i: int) -> tuple[list[int], np.ndarray, int]:
        """Counts before the block of turn i, the sources of its turns, and the place in it."""
        if i < self.first:
            raise IndexError(f"turn {i} is before {self.first}, the first one")
        block, inside = divmod(i - self.first, BLOCK)
        if block not in self._blocks:
            before = self._before(block)
            after = list(before)
            turns = np.array(self._take(after, BLOCK), np.int32)
            while len(self._blocks) >= 2:  # a batch may lie across a boundary
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = before, turns, after
            self._keep(block, before)
        before, turns, _ = self._blocks[block]
        return before, turns, inside

    def _before(self, block: int) -> list[int]:
        """Counts before a block, from the nearest ones before it that are known."""
        known = self._states | {b + 1: after for b, (_, _, after) in self._blocks.items()}
        nearest = max(b for b in known if b <= block)
        counts, at = list(known[nearest]), self.first + nearest * BLOCK
        target = self.first + block * BLOCK
        # Where shares times turns are whole numbers, so are the counts: those.
        periods = target // self._whole
        if periods * self._whole > at:
            at = periods * self._whole
            counts = [periods * part for part in self._parts]
        while at < target:
            step = min(target - at, BLOCK)
            self._take(counts, step)
            at += step
        return counts

    def _keep(self, block: int, counts: list[int]) -> None:
        if block % self._spacing:
            return
        self._states[block] = counts
        if len(self._states) > _STATES:
            self._spacing *= 2
            self._states = {b: s for b, s in self._states.items() if b % self._spacing == 0}

    def _take(self, counts: list[int], turns: int) -> list[int]:
        """The sources of the next turns after these counts, which are brought forward."""
        whole, margin = self._whole, self._margin
        scaled = [margin * part for part in self._parts]
        waiting = [  # (first turn, source)
            (-(-(margin * counts[source] + 1) * whole // scale), source)
            for source, scale in enumerate(scaled)
            if scale
        ]
        heapify(waiting)
        ready: list[tuple[int, int]] = []  # (last turn, source)
        order = []
        begin = sum(counts) + 1
        for now in range(begin, begin + turns):
            while waiting and waiting[0][0] <= now:
                source = heappop(waiting)[1]
                last = (margin * (counts[source] + 1) - 1) * whole // scaled[source] + 1
                heappush(ready, (last, source))
            source = heappop(ready)[1]
            order.append(source)
            counts[source] += 1
            first = -(-(margin * counts[source] + 1) * whole // scaled[source])
            heappush(waiting, (first, source))
        return order
