"""The samples of one task at one length, by number: nothing but that decides what they are. As
micro batches of an evaluation, and as a dataset to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

from megalong.data.batches import IGNORE_INDEX, starts_behind_first
from megalong.data.indexed import token_dtype
from megalong.data.preprocessing.writer import DocumentWriter
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.evals import TASKS
from megalong.evals.language import Ids, Language, Text
from megalong.evals.sample import Answer, Draft, Sample
from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from megalong.evals.scores import AnswerSums

EVALUATION = "evaluation"


def language_of(
    style: str, encode: Callable[[str], Sequence[int]], ids: Sequence[int], first: int
) -> Language:
    """Return what tasks are said in: "text", which `encode` makes tokens of, or bare "ids", of
    these, none special. first: what a sample begins with. Raises UserError for too few ids."""
    return Text(encode, first) if style == "text" else Ids(ids, first)


@dataclass(frozen=True)
class Trials:
    """Samples of a task.

    length: tokens of each. salt: what sets these samples apart from others; those of evaluations
        have the same one in every run. spread: what is asked for stands at depths that are evenly
        spread over the samples; else at random.
    """

    task: str
    language: Language
    length: int
    samples: int
    salt: str = EVALUATION
    spread: bool = True

    def check(self, flag: str, flag_of_length: str) -> None:
        """Raise UserError, naming these flags, where a sample cannot be made."""
        try:
            needed = max(self._draft(i)[0].size for i in range(self.samples))
        except UserError as error:
            raise UserError(f"{flag} {self.task}: {error}") from None
        if needed > self.length:
            raise UserError(
                f"{flag_of_length} {self.length}: {self.task} needs at least {needed} tokens of"
                f" this tokenizer: set {flag_of_length} {needed} or more, or leave {self.task} out"
                f" of {flag}"
            )

    def sample(self, i: int) -> Sample:
        """Sample i, from 0."""
        draft, draw = self._draft(i)
        return draft.sample(self.length, draw)

    def answers(self, i: int) -> list[Answer]:
        """Those of sample i, without its tokens."""
        return self._answers[i]

    @cached_property
    def _answers(self) -> list[list[Answer]]:
        """Those of all samples, drafted once for all evaluations."""
        return [self._draft(i)[0].answers(self.length) for i in range(self.samples)]

    def _draft(self, i: int) -> tuple[Draft, Random]:
        draw = Random(f"{self.salt} {self.task} {i}")  # so that a length long enough stays so
        depth = (i + 0.5) / self.samples if self.spread else draw.random()
        return TASKS[self.task](self.language, self.length, depth, draw), draw


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
    """Yield num_task_batches() micro batches on every rank, with the part of each sequence that is
    in `sequence_range`, as `megalong.data.batches` has them. A sample stands at the beginning of a
    sequence; behind it, and in rows without a sample, are zeros, which causal attention keeps from
    it.

    labels are IGNORE_INDEX but where the next token is one of an answer; there answer, int64
    (micro_batch, slice), is the row of `AnswerSums.sums` that it counts in, elsewhere -1.
    first_apart: the first token belongs to a document before it, which the text does not see. A
    sample of bare ids is one document in any case, as it is in data of `write_dataset`.
    """
    start, stop = sequence_range
    apart = first_apart and not isinstance(trials.language, Ids)
    beside = {"document_start": starts_behind_first(micro_batch_size, start, stop)} if apart else {}
    for batch in range(num_task_batches(trials, micro_batch_size, data_parallel_size)):
        first = (batch * data_parallel_size + data_parallel_rank) * micro_batch_size
        shape = micro_batch_size, stop - start
        tokens, labels, rows = (np.full(shape, x, np.int64) for x in (0, IGNORE_INDEX, -1))
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
    """Return how many micro batches task_batches() yields on every rank."""
    return -(-trials.samples // (micro_batch_size * data_parallel_size))


# Which tokens of a sample count in the loss. Haystack and answers follow from what is before them,
# facts and questions do not.
LOSSES: dict[str, Callable[[Sample], np.ndarray] | None] = {
    "all": None,
    "predictable": lambda sample: sample.answered | sample.hay,
    "answers": lambda sample: sample.answered,
}
_CHUNK = 256  # samples that are written at once


def data_salt(seed: int) -> str:
    """Return the salt of samples to train on, drawn apart from those of evaluations."""
    return f"data {seed}"


def write_dataset(
    prefix: str,
    trials: Sequence[Trials],
    tokenizer: Tokenizer,
    description: dict,
    *,
    loss: str = "all",
    overwrite: bool = False,
    on_samples: Callable[[int], object] = lambda count: None,
) -> None:
    """Write PREFIX.bin, .idx and .json: the first sample of each of these trials, the second of
    each, and so on, a document each; with a PREFIX.loss unless `loss`, of LOSSES, is "all".

    description: what PREFIX.json says besides. on_samples: hears how many more are written.
    Raises UserError where an output is there already and `overwrite` is not set.
    """
    dtype, counts_of = token_dtype(tokenizer.vocab_size), LOSSES[loss]
    masks = counts_of is not None
    numbers = range(max(one.samples for one in trials))
    order = [(one, i) for i in numbers for one in trials if i < one.samples]
    with DocumentWriter(prefix, dtype, overwrite=overwrite, masks_loss=masks) as writer:
        for start in range(0, len(order), _CHUNK):
            samples = [one.sample(i) for one, i in order[start : start + _CHUNK]]
            tokens = np.concatenate([sample.tokens for sample in samples]).astype(dtype)
            counts = np.concatenate(list(map(counts_of, samples))) if masks else None
            writer.add(tokens, [len(sample.tokens) for sample in samples], counts)
            on_samples(len(samples))
        about = {"tokenizer_sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        writer.commit({**about, "eod": tokenizer.eod, **description})
