"""Datasets of samples of tasks, to train on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from megalong.data.preprocessing.writer import DocumentWriter, token_dtype
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.tasks.language import Language
from megalong.tasks.sample import Sample
from megalong.tasks.trials import Trials

# Which tokens of a sample count in the loss. Haystack and answers follow from what is before them,
# facts and questions do not.
LOSSES: dict[str, Callable[[Sample], np.ndarray] | None] = {
    "all": None,
    "predictable": lambda sample: sample.answered | sample.hay,
    "answers": lambda sample: sample.answered,
}
_CHUNK = 256  # documents that are written at once


@dataclasses.dataclass(frozen=True)
class TaskData:
    """What a dataset is made of: `blocks` documents of as many tokens as the longest of `lengths`,
    each filled with samples of one of them, which take turns. So do the tasks within a length, but
    for those that have no room in it.

    seed: others make other samples; all are drawn apart from those of evaluations.
    """

    tasks: Sequence[str]
    language: Language
    lengths: Sequence[int]
    blocks: int
    seed: int

    def trials(self, flag: str, flag_of_length: str) -> dict[int, list[Trials]]:
        """Those of each length. Raises UserError, naming these flags, where a task has no room in
        the longest."""
        found = {}
        for turn, length in enumerate(self.lengths):
            salt = f"data {self.seed}" + (f" {length}" if len(self.lengths) > 1 else "")
            of_tasks = [Trials(task, self.language, length, 1, salt, False) for task in self.tasks]
            if length < max(self.lengths):
                of_tasks = [trials for trials in of_tasks if trials.needed <= length]
            samples = len(range(turn, self.blocks, len(self.lengths))) * self._in_a_block(length)
            shares = [len(range(turn, samples, len(of_tasks))) for turn in range(len(of_tasks))]
            found[length] = [
                dataclasses.replace(trials, samples=share)
                for trials, share in zip(of_tasks, shares, strict=True)
                if share
            ]
            for trials in found[length]:
                trials.check(flag, flag_of_length)
        return found

    def _in_a_block(self, length: int) -> int:
        return max(self.lengths) // length

    def in_order(self, trials: dict[int, list[Trials]]) -> Iterator[list[Sample]]:
        """The samples of each block."""
        rows = {length: _in_turn(of_length) for length, of_length in trials.items()}
        for block in range(self.blocks):
            length = self.lengths[block % len(self.lengths)]
            yield list(islice(rows[length], self._in_a_block(length)))


def _in_turn(trials: list[Trials]) -> Iterator[Sample]:
    """The first sample of each, the second of each, and so on."""
    for number in range(max(one.samples for one in trials)):
        yield from (one.sample(number) for one in trials if number < one.samples)


def write_dataset(
    prefix: str,
    documents: Iterator[Sequence[Sample]],
    tokenizer: Tokenizer,
    description: dict,
    *,
    loss: str = "all",
    overwrite: bool = False,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes PREFIX.bin, .idx and .json.

    documents: the samples of each, which are put behind one another. loss: which tokens count, one
    of LOSSES; but for "all" with a PREFIX.loss (`megalong.data.loss_mask`). description: what
    PREFIX.json says besides. on_tokens: hears how many more are written.
    Raises UserError where an output is there already and `overwrite` is not set.
    """
    dtype, counts_of = token_dtype(tokenizer.vocab_size), LOSSES[loss]
    masks = counts_of is not None
    with DocumentWriter(prefix, dtype, overwrite=overwrite, masks_loss=masks) as writer:
        while chunk := list(islice(documents, _CHUNK)):
            samples = list(chain.from_iterable(chunk))
            tokens = np.concatenate([sample.tokens for sample in samples]).astype(dtype)
            counts = np.concatenate([counts_of(sample) for sample in samples]) if masks else None
            lengths = [sum(len(sample.tokens) for sample in document) for document in chunk]
            writer.add(tokens, lengths, counts)
            on_tokens(len(tokens))
        writer.commit(
            {
                "tokenizer_sha256": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eod": tokenizer.eod,
                **description,
            }
        )
