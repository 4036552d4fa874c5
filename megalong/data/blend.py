"""Several sources as one endless row of samples, each source by its share.

Which source a sample is from, its turn, is decided by the shares alone (`Apportionment`): after any
number of samples each source has had its share, to within one sample. Every source counts its own
samples, and has its own order of documents, which the seed and its salt decide. So nothing hangs on
how long a run is, and a run may go on with other shares, or other sources: what a source has given
stays given, and what it gives next is what it would have given next.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from megalong.data.samples import ContextReport, Samples

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


_SHOWN = 12  # sources in a line


@dataclass(frozen=True)
class Source:
    """One source of a blend.

    share: of the samples. open: makes its samples, of a salt of the order.
    """

    name: str
    share: Fraction
    open: Callable[[int], Samples]


@dataclass(frozen=True)
class Phase:
    """A part of a run in which nothing changes about its blend.

    first: number of the run's sample that it begins with, sequence_length: the length of that and
    all others. shares: by source. began: by source, also of those that have no share any more, the
    first of its own samples that comes.
    """

    first: int
    sequence_length: int
    shares: dict[str, Fraction]
    began: dict[str, int]


@dataclass(frozen=True)
class History:
    """Where a blend stands, and what it was on the way there: what a checkpoint keeps of it.

    phases: at least one, the last is in force. taken: samples of each of its sources since then.
    salts, epoch_tokens: by source, of the order of its documents, and tokens in an epoch.
    masked: sources of the last phase some tokens of which may not count in the loss.
    """

    phases: tuple[Phase, ...]
    taken: dict[str, int]
    salts: dict[str, int]
    epoch_tokens: dict[str, int]
    masked: tuple[str, ...] = ()

    @classmethod
    def of_one(cls, name: str, consumed_tokens: int, sequence_length: int) -> History:
        """That of a run on one source, as checkpoints have it that know of no blends."""
        phase = Phase(0, sequence_length, {name: Fraction(1)}, {name: 0})
        return cls((phase,), {name: -(-consumed_tokens // sequence_length)}, {name: 0}, {})

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> History:
        """What `values` made JSON of."""
        phases = tuple(
            Phase(**phase | {"shares": {n: Fraction(s) for n, s in phase["shares"].items()}})
            for phase in values["phases"]
        )
        return cls(**values | {"phases": phases, "masked": tuple(values.get("masked", ()))})

    def values(self) -> dict[str, Any]:
        """This as what JSON has: an exact share is "7/10"."""
        phases = [
            vars(phase) | {"shares": {name: str(share) for name, share in phase.shares.items()}}
            for phase in self.phases
        ]
        return vars(self) | {"phases": phases}

    def next_samples(self, sequence_length: int) -> dict[str, int]:
        """The sample of this length of each source's own with which it goes on."""
        phase = self.phases[-1]
        tokens = {
            name: (began + self.taken.get(name, 0)) * phase.sequence_length
            for name, began in phase.began.items()
        }
        return {name: -(-count // sequence_length) for name, count in tokens.items()}

    def in_words(self) -> list[str]:
        """The phases, and how far each source was read, in lines."""
        lines = [
            f"training data from sample {phase.first:,} on: {shown_shares(phase.shares)}"
            for phase in self.phases
        ]
        length = self.phases[-1].sequence_length
        read = [
            f"{name} {(first * length) / self.epoch_tokens[name]:.4g}"
            for name, first in self.next_samples(length).items()
            if name in self.epoch_tokens
        ]
        return [*lines, f"epochs read: {', '.join(read)}"]


class Blend:
    """The samples of several sources, or of one, as those of a run (`Samples`).

    history: where the blend stands at sample `first`, which is the first that can be read; None:
        at the beginning.
    """

    def __init__(
        self, sources: Sequence[Source], first: int = 0, history: History | None = None
    ) -> None:
        self._given = tuple(sources)
        self.sources = tuple(source.name for source in sources)
        self.shares = {source.name: source.share for source in sources}
        salts = {} if history is None else history.salts
        # A run on one source has no salt, since it may be older than blends. One that a source
        # begins with it keeps, so that it goes on in its order with whatever other sources.
        default = (lambda name: 0) if len(sources) == 1 else _salt
        self._salts = {name: salts.get(name, default(name)) for name in self.sources}
        self.parts = [source.open(self._salts[source.name]) for source in sources]
        self.sequence_length = self.parts[0].sequence_length
        self.seed = self.parts[0].seed
        self.epoch_tokens = {
            name: part.tokens_per_epoch for name, part in zip(self.sources, self.parts, strict=True)
        }
        # Those that have gone may come back.
        self._all_salts = salts | self._salts
        known = {} if history is None else history.epoch_tokens
        self._all_epoch_tokens = known | self.epoch_tokens
        self._phases, taken = self._continued(first, history)
        self._phase = self._phases[-1]
        # Equally urgent sources come by name: the order in which they are listed changes nothing.
        self._by_name = sorted(self.sources)
        self._turns = Apportionment(
            [self.shares[name] for name in self._by_name],
            None if taken is None else [taken[name] for name in self._by_name],
        )
        self._place = {name: place for place, name in enumerate(self.sources)}

    @property
    def tokens_per_epoch(self) -> int:
        """Those of all sources together."""
        return sum(self.epoch_tokens.values())

    @property
    def samples_per_epoch(self) -> int:
        """Those of all sources together."""
        return sum(part.samples_per_epoch for part in self.parts)

    def continued(self, first: int, history: History) -> tuple[Blend, list[str]]:
        """The blend of these sources that goes on from sample `first` where another one stands, and
        what is new about it, a line each."""
        blend = Blend(self._given, first, history)
        return blend, blend._news(history)

    def sample(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of sample i, as of `Samples`."""
        part, its = self._locate(i)
        return part.sample(its, start, stop)

    @property
    def masked(self) -> list[str]:
        """The sources some tokens of which may not count in the loss."""
        parts = zip(self.sources, self.parts, strict=True)
        return [name for name, part in parts if part.masks_loss]

    @property
    def masks_loss(self) -> bool:
        """Whether some tokens of any source may not count in the loss."""
        return bool(self.masked)

    def loss_mask(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of these tokens count in the loss, as of `Samples`: all of a source without a
        mask."""
        part, its = self._locate(i)
        return part.loss_mask(its, start, stop)

    def document_bounds(
        self, i: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents of these tokens begin and end, as of `Samples`."""
        part, its = self._locate(i)
        return part.document_bounds(its, start, stop)

    def context_report(self) -> ContextReport:
        """How much real context the tokens of the sources' first epochs have, by their shares."""
        return ContextReport.mean_of(
            (float(self.shares[name]), part.context_report())
            for name, part in zip(self.sources, self.parts, strict=True)
            if self.shares[name]
        )

    def source(self, i: int) -> int:
        """Which of `sources` sample i is from."""
        return self._place[self._by_name[self._turns.turn(i - self._phase.first)[0]]]

    def make_orders(self, i: int) -> None:
        """Have the orders of documents made that samples from i on begin with, of every source."""
        taken = self._taken(i)
        for name, part in zip(self.sources, self.parts, strict=True):
            part.sample(self._phase.began[name] + taken[name], 0, 1)

    def history(self, i: int) -> History:
        """Where the blend stands before sample i."""
        taken, masked = self._taken(i), tuple(self.masked)
        return History(self._phases, taken, self._all_salts, self._all_epoch_tokens, masked)

    def realised(self, i: int) -> dict[str, tuple[float, float]]:
        """By source, before sample i: its share of the samples since the blend is as it is, and how
        many epochs of it were read since the run began."""
        taken, length = self._taken(i), self.sequence_length
        total = max(sum(taken.values()), 1)
        return {
            name: (
                taken[name] / total,
                (self._phase.began[name] + taken[name]) * length / self.epoch_tokens[name],
            )
            for name in self.sources
        }

    def _taken(self, i: int) -> dict[str, int]:
        """Samples of each source since the phase began, before sample i."""
        counts = self._turns.counts(i - self._phase.first)
        return dict(zip(self._by_name, counts, strict=True))

    def _locate(self, i: int) -> tuple[Samples, int]:
        """The samples of the source of sample i, and its number there."""
        turn, taken = self._turns.turn(i - self._phase.first)
        name = self._by_name[turn]
        return self.parts[self._place[name]], self._phase.began[name] + taken

    def _continued(
        self, first: int, history: History | None
    ) -> tuple[tuple[Phase, ...], dict[str, int] | None]:
        """The phases up to the one in force, and how far it has come; None: it begins."""
        began = {} if history is None else history.next_samples(self.sequence_length)
        began = dict.fromkeys(self.sources, 0) | began
        phase = Phase(first, self.sequence_length, self.shares, began)
        if history is None:
            return (phase,), None
        last = history.phases[-1]
        if (last.shares, last.sequence_length) == (self.shares, self.sequence_length):
            return history.phases, history.taken
        return (*history.phases, phase), None

    def _news(self, history: History) -> list[str]:
        lines, before = [], history.phases[-1].shares
        if before != self.shares:
            lines.append(
                f"from sample {self._phase.first:,} on the training data is"
                f" {shown_shares(self.shares)}; before it was {shown_shares(before)}"
            )
        for name in before:
            if name in self.sources and (name in self.masked) != (name in history.masked):
                now = "a loss mask now, and had none" if name in self.masked else "no loss mask now"
                lines.append(f"source {name} has {now}: other tokens are predicted")
        for name, tokens in self.epoch_tokens.items():
            known = history.epoch_tokens.get(name, tokens)
            if known != tokens:
                lines.append(
                    f"source {name} has {tokens:,} tokens, and had {known:,}: it goes on at the"
                    " same place of another order"
                )
        return lines


def shown_shares(shares: dict[str, Fraction]) -> str:
    """code 0.7, books 0.3; of many sources those with the largest shares."""
    names = list(shares)
    if len(names) > _SHOWN:
        names = sorted(names, key=lambda name: -shares[name])[:_SHOWN]
    words = ", ".join(f"{name} {float(shares[name]):.4g}" for name in names)
    return words + (f" and {len(shares) - _SHOWN} more" if len(shares) > _SHOWN else "")


def _salt(name: str) -> int:
    return zlib.crc32(name.encode())
