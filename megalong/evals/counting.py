"""Counting words: which of a long list come most often.

RULER's aggregation tasks (arXiv 2404.06654, section 3). There the order of the answers is free; to
tell them token by token there is one here. A word is answered from the whole list: as its place
counts where it stands first.
"""

from __future__ import annotations

from random import Random

from megalong.evals.language import Language, Mark, Phrase, Word
from megalong.evals.sample import Draft

LIST = Phrase("{}")
COMMON = Phrase(
    "\nThe ten most common words, in the order in which they stand first in the list, are",
    mark=Mark.COMMON_QUESTION,
)
FREQUENT = Phrase(
    "\nThe three most frequent words, the most frequent first, are", mark=Mark.FREQUENT_QUESTION
)

MOST_KINDS = 110
NUM_COMMON = 10
NUM_FREQUENT, EXPONENT = 3, 2.0
SHORTEST_LIST = 60  # in a shorter one the counts of the most frequent words may be equal


def common_words(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """A list of which half is ten words that come equally often, and each of the others comes at
    most half as often. The ten are asked for. `depth` says nothing."""
    kinds = language.keys(max(min(MOST_KINDS, language.num_keys), 2 * NUM_COMMON), draw)
    size = _list_size(language, length, COMMON, kinds, NUM_COMMON)
    often, others = size // (2 * NUM_COMMON), len(kinds) - NUM_COMMON
    left = min(size - often * NUM_COMMON, others * (often // 2))
    counts = [left // others + (number < left % others) for number in range(others)]
    words = _shuffled([often] * NUM_COMMON + counts, draw)
    first = sorted(words.index(kind) for kind in range(NUM_COMMON))
    return _draft(language, [kinds[word] for word in words], COMMON, first)


def frequent_words(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """A list of words whose counts fall with the square of their rank, of which the first three are
    asked for. `depth` says nothing."""
    kinds = language.keys(max(min(MOST_KINDS, language.num_keys), NUM_FREQUENT + 1), draw)
    size = _list_size(language, length, FREQUENT, kinds, NUM_FREQUENT)
    weights = [rank**-EXPONENT for rank in range(1, len(kinds) + 1)]
    counts = [int(size * weight / sum(weights)) for weight in weights]
    words = _shuffled(counts, draw)
    first = [words.index(kind) for kind in range(NUM_FREQUENT)]
    return _draft(language, [kinds[word] for word in words], FREQUENT, first)


def _list_size(
    language: Language, length: int, question: Phrase, kinds: list[Word], asked: int
) -> int:
    """How many words, the longest of these kinds, fit beside the question."""
    longest = max(kinds, key=len)
    room = length - _draft(language, [longest], question, [0] * asked).size + len(longest)
    return max(room // len(longest), SHORTEST_LIST)


def _shuffled(counts: list[int], draw: Random) -> list[int]:
    """Each number, from 0, as often as its count says."""
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    draw.shuffle(numbers)
    return numbers


def _draft(language: Language, words: list[Word], question: Phrase, asked: list[int]) -> Draft:
    """The list behind the haystack, and the question, which these of its words answer."""
    draft = Draft(language)
    fact = draft.tell(1.0, LIST, *words)
    draft.ask(question)
    draft.answer_all((fact, slice(word, word + 1)) for word in asked)
    return draft
