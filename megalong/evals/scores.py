"""How well a model does: on the samples of a task, and by the position in the context."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megalong.evals.trials import Trials

FEW_TOKENS = 10_000  # below, chance alone moves a perplexity by some percent


def position_edges(seq_length: int) -> list[int]:
    """Edges of the buckets of positions: 0, 4, 6, 8, 12, 16, 24, ... up to the sequence length.

    Two buckets an octave: what a model gains from context it gains over orders of magnitude.
    """
    edges, power = [0], 4
    while power < seq_length:
        edges += [power, power + power // 2]
        power *= 2
    return [edge for edge in edges if edge < seq_length] + [seq_length]


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; of a hopeless one the largest power that a float64 holds."""
    return math.exp(min(loss, 700.0))


class PositionLosses:
    """Sums of token losses, in nats, and how many there were, by bucket of positions.

    edges: of the buckets, from 0 to the longest context (`position_edges`).
    sums, counts: float64 (buckets,), on `device`; ranks that see parts of the losses add these up.
    """

    def __init__(self, edges: Sequence[int], device: torch.device | str = "cpu"):
        self._stops = torch.tensor(edges[1:], device=device)
        self.sums = torch.zeros(len(edges) - 1, dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.sums)

    def add(
        self, positions: torch.Tensor, losses: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Add the losses of some sequences.

        positions: integers (length,) or (sequences, length), places in the context. losses:
        (sequences, length), zero where mask, bool of the same shape, says that there was nothing to
        predict; None: there was everywhere.
        """
        bucket = torch.bucketize(positions.to(self.sums.device), self._stops, right=True)
        mask = torch.ones_like(losses) if mask is None else mask
        for sums, values in ((self.sums, losses.double()), (self.counts, mask.double())):
            values = values.sum(0) if bucket.ndim == 1 else values
            sums.index_add_(0, bucket.flatten(), values.flatten())

    @property
    def total(self) -> float:
        """The sum of all losses."""
        return self.sums.sum().item()

    @property
    def tokens(self) -> int:
        """Predictions that counted."""
        return int(self.counts.sum().item())

    @property
    def mean(self) -> float:
        """The mean loss of a token."""
        return self.total / self.tokens

    @property
    def by_position(self) -> list[float | None]:
        """The mean loss in each bucket; None where a bucket held no prediction."""
        return _means(self.sums, self.counts)


def _means(totals: torch.Tensor, counts: torch.Tensor) -> list[float | None]:
    pairs = zip(totals.tolist(), counts.tolist(), strict=True)
    return [total / count if count else None for total, count in pairs]


@dataclass(frozen=True)
class TaskScore:
    """The result of one task at one length.

    accuracy: share of the answers all of whose tokens are the likeliest, each after the right ones
        before it: greedy decoding would give them.
    token_accuracy: the same share of the answers' tokens. loss: their mean, in nats.
    accuracy_by_distance: by how far back the model has to look, in the buckets of `distance_edges`;
        None where a bucket has no answer. answers_by_distance: how many it has.
    """

    task: str
    length: int
    samples: int
    answers: int
    accuracy: float
    token_accuracy: float
    loss: float
    distance_edges: list[int]
    accuracy_by_distance: list[float | None]
    answers_by_distance: list[int]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class AnswerSums:
    """Of each answer of all samples of some trials: its right tokens, and the sum of its losses.

    sums: float64 (answers, 2), on `device`; ranks that see parts of the samples add these up.
    """

    def __init__(self, trials: Trials, device: torch.device | str = "cpu"):
        self._trials = trials
        self._answers = [trials.answers(i) for i in range(trials.samples)]
        self._first = list(accumulate(map(len, self._answers), initial=0))
        self.sums = torch.zeros(self._first[-1], 2, dtype=torch.float64, device=device)

    def places(self, sample: int, start: int, stop: int) -> tuple[list[int], list[int]]:
        """Of the tokens that are answers of this sample: where each is predicted from, as far as
        that lies in [start, stop) of the sequence; and of which answer, a row of `sums`, it is."""
        answers = self._answers[sample]  # in their order
        first = bisect_right(answers, start, key=lambda answer: answer.stop - 1)
        last = bisect_left(answers, stop, key=lambda answer: answer.start - 1)
        found = [
            (place, self._first[sample] + number)
            for number, answer in enumerate(answers[first:last], first)
            for place in range(max(answer.start - 1, start), min(answer.stop - 1, stop))
        ]
        places, rows = zip(*found, strict=True) if found else ((), ())
        return list(places), list(rows)

    def add(self, rows: torch.Tensor, right: torch.Tensor, losses: torch.Tensor) -> None:
        """Add tokens of answers: integers, bool and float, of one shape. rows: see `places`;
        negative where a token is of no answer."""
        counted = rows >= 0
        values = torch.stack([right.double().flatten(), losses.double().flatten()], dim=1)
        values *= counted.flatten()[:, None]
        self.sums.index_add_(0, rows.clamp(min=0).flatten(), values)

    def score(self) -> TaskScore:
        """Return what the sums, of all tokens of all answers, come to."""
        answers = list(chain.from_iterable(self._answers))
        sizes = torch.tensor([answer.stop - answer.start for answer in answers])
        right, losses = self.sums.cpu().T
        found = (right == sizes).double()
        edges = position_edges(self._trials.length)
        stops = torch.tensor(edges[1:])
        bucket = torch.bucketize(torch.tensor([a.distance for a in answers]), stops, right=True)
        count = torch.bincount(bucket, minlength=len(stops))
        found_by_bucket = torch.zeros(len(stops), dtype=torch.float64).index_add_(0, bucket, found)
        return TaskScore(
            task=self._trials.task,
            length=self._trials.length,
            samples=self._trials.samples,
            answers=len(answers),
            accuracy=found.mean().item(),
            token_accuracy=(right.sum() / sizes.sum()).item(),
            loss=(losses.sum() / sizes.sum()).item(),
            distance_edges=edges,
            accuracy_by_distance=_means(found_by_bucket, count),
            answers_by_distance=count.tolist(),
        )


def plot_buckets(
    axis: Any, edges: Sequence[int], values: Sequence[float | None], label: str
) -> None:
    """Draw a line through the buckets that have a value, on an axis of matplotlib."""
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    points = [(x, y) for x, y in zip(centres, values, strict=True) if y is not None]
    axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)


def plot_by_distance(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    """Accuracy against how far back the model has to look, a line for each record of a TaskScore,
    on an axis of matplotlib."""
    for record in records:
        label = f"{record['task']} of {record['length']:,} tokens: {record['accuracy']:.0%}"
        plot_buckets(axis, record["distance_edges"], record["accuracy_by_distance"], label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(
        xlabel="distance to what is asked for (tokens)",
        ylabel="share of answers that are right",
        ylim=(-0.02, 1.02),
        title="Accuracy by distance",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
