"""A sample of a task: facts in a haystack, a question at the end, and the answers to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from megalong.evals.language import Language, Phrase, Said

if TYPE_CHECKING:
    import numpy as np

AND_ONE_MORE = Phrase(",")
END = Phrase(".\n")


@dataclass(frozen=True)
class Answer:
    """Tokens [start, stop) of a sample to be told; the same tokens stand at `place`, in the fact
    that answers the question."""

    start: int
    stop: int
    place: int

    @property
    def distance(self) -> int:
        """How many tokens the model has to look back."""
        return self.start - self.place


@dataclass(frozen=True)
class Sample:
    """tokens: int64 (length,), question and answers included. answers: in their order. hay: which
    tokens are haystack, bool (length,)."""

    tokens: np.ndarray
    answers: list[Answer]
    hay: np.ndarray

    @property
    def answered(self) -> np.ndarray:
        """Which tokens are of answers, bool (length,)."""
        found = self.hay & False
        for answer in self.answers:
            found[answer.start : answer.stop] = True
        return found


@dataclass
class Draft:
    """A sample without its haystack.

    facts: in the order in which they are told, with their depths: where between the beginning (0)
        and the end (1) of the haystack each stands; at equal depths the order is this one.
    """

    language: Language
    facts: list[tuple[float, Said]] = field(default_factory=list)
    question: list[int] = field(default_factory=list)
    asked: list[tuple[int, int, int, int]] = field(default_factory=list)

    def tell(self, depth: float, phrase: Phrase, *words: tuple[int, ...]) -> int:
        """Add a fact. Returns its number."""
        self.facts.append((depth, self.language.say(phrase, *words)))
        return len(self.facts) - 1

    def ask(self, phrase: Phrase, *words: tuple[int, ...]) -> None:
        """Add to the question."""
        self.question += self.language.say(phrase, *words).tokens

    def answer(self, fact: int, words: slice) -> None:
        """Add to the question what is to be told: these words of a fact, one after the other."""
        tokens, places = self.facts[fact][1]
        places = places[words]
        start, stop = places[0][0], places[-1][1]
        self.asked.append((fact, start, len(self.question), len(self.question) + stop - start))
        self.question += tokens[start:stop]

    def answer_all(self, answers: Iterable[tuple[int, slice]]) -> None:
        """Add several (fact, words): a list, and its end."""
        for number, (fact, words) in enumerate(answers):
            if number:
                self.ask(AND_ONE_MORE)
            self.answer(fact, words)
        self.ask(END)

    @property
    def size(self) -> int:
        """The fewest tokens of a sample."""
        return 1 + sum(len(said.tokens) for _, said in self.facts) + len(self.question)

    def answers(self, length: int) -> list[Answer]:
        """Return the answers in a sample of this length, at least `size`."""
        begins, offset = dict(self._begins(length)), length - len(self.question)
        return [
            Answer(offset + start, offset + stop, begins[fact] + place)
            for fact, place, start, stop in self.asked
        ]

    def sample(self, length: int, draw: Random) -> Sample:
        """Return the sample of exactly this length, at least `size`: the first token, haystack with
        the facts in it, the question."""
        import numpy as np  # the configuration needs the names of tasks alone

        unit = self.language.haystack_size
        tokens, hay = [self.language.first], np.zeros(length, bool)

        def add_haystack(stop: int, last: int = 0) -> None:
            """Add pieces up to this place; the last tokens of one, where they begin the text."""
            pieces = 1 if last else (stop - len(tokens)) // unit
            added = self.language.haystack(pieces, draw, tokens)[-last:]
            hay[len(tokens) : len(tokens) + len(added)] = True
            tokens.extend(added)

        if rest := (length - self.size) % unit:
            add_haystack(1 + rest, rest)
        for fact, begin in self._begins(length):
            add_haystack(begin)
            tokens += self.facts[fact][1].tokens
        add_haystack(length - len(self.question))
        tokens += self.question
        return Sample(np.array(tokens, dtype=np.int64), self.answers(length), hay)

    def _begins(self, length: int) -> list[tuple[int, int]]:
        """Facts in the order of the text, and where each begins."""
        pieces, rest = divmod(length - self.size, self.language.haystack_size)
        begins, told = [], 1 + rest
        for fact in sorted(range(len(self.facts)), key=lambda fact: self.facts[fact][0]):
            depth, said = self.facts[fact]
            begins.append((fact, told + round(depth * pieces) * self.language.haystack_size))
            told += len(said.tokens)
        return begins


def largest_that_fits(
    length: int, most: int, least: int, draft_of: Callable[[int], Draft]
) -> Draft:
    """Return the draft of the largest size, from `most` down to `least`, that has room in a sample
    of this length; of `least` where none has."""
    drafts = (draft_of(size) for size in range(most, least, -1))
    return next((draft for draft in drafts if draft.size <= length), None) or draft_of(least)


# Language, length, depth of what is asked for, source of randomness.
Task = Callable[[Language, int, float, Random], Draft]
