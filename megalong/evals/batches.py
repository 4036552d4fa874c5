"""Micro batches of the samples of a task, as `megalong.data.batches` has them.

labels are IGNORE_INDEX but where the next token is one of an answer; there answer, int64
(micro_batch, slice), is the row of `AnswerSums.sums` that it counts in, elsewhere -1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from megalong.data.batches import IGNORE_INDEX, starts_behind_first
from megalong.evals.language import Ids
from megalong.evals.scores import AnswerSums
from megalong.evals.trials import Trials


def task_batches(
    trials: Trials,
    sums: AnswerSums,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    sequence_range: tuple[int, int],
    first_apart: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields num_task_batches() micro batches on every rank, with the part of each sequence that is
    in `sequence_range`. A sample stands at the beginning of a sequence; behind it, and in rows
    without a sample, are zeros, which causal attention keeps from it.

    first_apart: the first token belongs to a document before it, which the text does not see. A
    sample of bare ids is one document in any case, as it is in data of `megalong.evals.dataset`,
    which only such models know."""
    start, stop = sequence_range
    apart = first_apart and not isinstance(trials.language, Ids)
    beside = {"document_start": starts_behind_first(micro_batch_size, start, stop)} if apart else {}
    for batch in range(num_task_batches(trials, micro_batch_size, data_parallel_size)):
        first = (batch * data_parallel_size + data_parallel_rank) * micro_batch_size
        tokens = np.zeros((micro_batch_size, stop - start), dtype=np.int64)
        labels, rows = np.full_like(tokens, IGNORE_INDEX), np.full_like(tokens, -1)
        for row, number in enumerate(range(first, min(first + micro_batch_size, trials.samples))):
            sample = trials.sample(number).tokens
            part = sample[start:stop]
            tokens[row, : len(part)] = part
            places, of_answers = sums.places(number, start, stop)
            places = np.array(places, dtype=np.int64)
            labels[row, places - start] = sample[places + 1]
            rows[row, places - start] = of_answers
        yield {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "positions": torch.arange(start, stop),
            "answer": torch.from_numpy(rows),
            **beside,
        }


def num_task_batches(trials: Trials, micro_batch_size: int, data_parallel_size: int) -> int:
    """Micro batches that task_batches() yields on every rank."""
    return -(-trials.samples // (micro_batch_size * data_parallel_size))
