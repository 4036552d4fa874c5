"""The samples of one task at one length, by number: nothing but that decides what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from megalong.evals import TASKS
from megalong.evals.language import Ids, Language, Text
from megalong.evals.sample import Answer, Draft, Sample
from megalong.utils.errors import UserError

EVALUATION = "evaluation"


def language_of(
    style: str, encode: Callable[[str], Sequence[int]], ids: Sequence[int], first: int
) -> Language:
    """What tasks are said in: "text", that `encode` makes tokens of, or bare "ids", of these.

    ids: those that may occur in samples: none that is special. first: what a sample begins with.
    Raises UserError where there are too few ids.
    """
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
