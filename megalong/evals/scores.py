"""How well a model does on the samples of a task."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch

from megalong.evals.position_losses import position_edges
from megalong.evals.trials import Trials


@dataclass(frozen=True)
class TaskScore:
    """Of one task at one length.

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
        self._first = [0]
        for answers in self._answers:
            self._first.append(self._first[-1] + len(answers))
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
        """What the sums, of all tokens of all answers, come to."""
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
            accuracy_by_distance=_shares(found_by_bucket.tolist(), count.tolist()),
            answers_by_distance=count.tolist(),
        )


def _shares(found: Sequence[float], counts: Sequence[int]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(found, counts, strict=True)]
