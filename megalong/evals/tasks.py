"""The tasks: a function each, which drafts a sample. RULER's (arXiv 2404.06654, section 3) ask for
several answers in one order, so that these can be told token by token."""

from __future__ import annotations

from random import Random

from megalong.evals.language import Language, Mark, Phrase, Word
from megalong.evals.sample import Draft, largest_that_fits

NEEDLE = Phrase("The magic number of{} is{}.\n", Mark.NEEDLE)
QUESTION = Phrase("What is the magic number of{}? The magic number of{} is", Mark.NEEDLE_QUESTION)
QUESTION_OF_SEVERAL = Phrase("In their order, the magic numbers of{} are", Mark.NEEDLES_QUESTION)
OTHERS = 3  # needles beside the one that is asked for, as in RULER

PAIR, KEY, AFTER_VALUE = Phrase("{}:{}\n"), Phrase("{}:"), Phrase("\n")
FEWEST_PAIRS = 2

ROW = Phrase("Remember these numbers:{}.\n", Mark.ROW)
REPEAT = Phrase("The numbers were:", Mark.ROW_QUESTION)
AFTER_ROW = Phrase(".\n")
ROW_LENGTH = 16  # words

ASSIGN = Phrase("VAR{} ={}.\n", Mark.ASSIGNMENT)
COPY = Phrase("VAR{} = VAR{}.\n", Mark.ASSIGNMENT_OF_VARIABLE)
VARIABLES = Phrase(
    "In their order, the variables that have the value{} are", Mark.VARIABLES_QUESTION
)
CHAINS, HOPS = 2, 4

LIST = Phrase("{}")
COMMON = Phrase(
    "\nThe ten most common words, in the order in which they stand first in the list, are",
    Mark.COMMON_QUESTION,
)
FREQUENT = Phrase(
    "\nThe three most frequent words, the most frequent first, are", Mark.FREQUENT_QUESTION
)
MOST_KINDS = 110
NUM_COMMON = 10
NUM_FREQUENT, EXPONENT = 3, 2.0
SHORTEST_LIST = 60  # in a shorter one the counts of the most frequent words may be equal


def passkey(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """Some keys have a value each; the one at `depth` is asked for."""
    return _of_many(language, 1 + OTHERS, depth, draw)


def niah_single(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """One needle in the haystack."""
    return _of_many(language, 1, depth, draw)


def niah_multikey(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """The haystack is needles: half of the sample, or as many as there are keys."""
    [key], [value] = language.keys(1, draw), language.values(1, draw)
    size = len(language.say(NEEDLE, key, value).tokens)
    count = max(length // (2 * size), 1 + OTHERS)
    return _of_many(language, min(count, language.num_keys, language.num_values), depth, draw)


def _of_many(language: Language, count: int, depth: float, draw: Random) -> Draft:
    draft = Draft(language)
    keys, values = language.keys(count, draw), language.values(count, draw)
    asked = draft.tell(depth, NEEDLE, keys[0], values[0])
    for key, value in zip(keys[1:], values[1:], strict=True):
        draft.tell(draw.random(), NEEDLE, key, value)
    _ask(draft, keys[0], asked)
    return draft


def niah_multivalue(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """One key has several values, which are asked for in the order in which they are told; the
    first of them stands at `depth`."""
    draft = Draft(language)
    [key], values = language.keys(1, draw), language.values(1 + OTHERS, draw)
    depths = [depth, *sorted(draw.uniform(depth, 1) for _ in range(OTHERS))]
    told = zip(depths, values, strict=True)
    facts = [draft.tell(where, NEEDLE, key, value) for where, value in told]
    draft.ask(QUESTION_OF_SEVERAL, key)
    draft.answer_all((fact, slice(1, 2)) for fact in facts)
    return draft


def niah_multiquery(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """Several keys have a value each; all are asked for, the one at `depth` first."""
    draft = Draft(language)
    keys, values = language.keys(1 + OTHERS, draw), language.values(1 + OTHERS, draw)
    depths = [depth, *(draw.random() for _ in range(OTHERS))]
    told = zip(depths, keys, values, strict=True)
    facts = [draft.tell(where, NEEDLE, key, value) for where, key, value in told]
    for key, fact in zip(keys, facts, strict=True):
        _ask(draft, key, fact)
    return draft


def _ask(draft: Draft, key: Word, fact: int) -> None:
    draft.ask(QUESTION, key, key)
    draft.answer_all([(fact, slice(1, 2))])


def mqar(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """Multi-query associative recall (arXiv 2312.04927): pairs of a key and a value, over all of
    the haystack, then every key once more in another order, each to be followed by its value.

    Pairs and questions take a half of the sample, or less where the keys do not suffice. There are
    answers at every depth; `depth` says nothing. Who only knows which values there are, and does
    not tell one twice, is right in (1 + 1/2 + ... + 1/n) / n of n answers.
    """
    [key], [value] = language.keys(1, draw), language.values(1, draw)
    size = len(language.say(PAIR, key, value).tokens)
    pairs = max(length // (4 * size), FEWEST_PAIRS)
    pairs = min(pairs, language.num_keys, language.num_values)
    draft = Draft(language)
    keys, values = language.keys(pairs, draw), language.values(pairs, draw)
    facts = [
        draft.tell((number + draw.random()) / pairs, PAIR, key, value)
        for number, (key, value) in enumerate(zip(keys, values, strict=True))
    ]
    for fact in draw.sample(facts, pairs):
        draft.ask(KEY, keys[fact])
        draft.answer(fact, slice(1, 2))
        draft.ask(AFTER_VALUE)
    return draft


def copy(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """A row of different words at `depth`, to be said again in the end: one answer. The row is
    shorter where the sample has no room for it."""

    def of(words: int) -> Draft:
        draft = Draft(language)
        row = draft.tell(depth, ROW, *language.values(words, draw))
        draft.ask(REPEAT)
        draft.answer(row, slice(None))
        draft.ask(AFTER_ROW)
        return draft

    return largest_that_fits(length, ROW_LENGTH, 2, of)


def variable_tracking(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """RULER's multi-hop tracing: chains of assignments, X = 12345, Y = X, ..., each with a value of
    its own. All variables of one chain, which begins at `depth`, are asked for in the order of
    their assignments. A chain has fewer hops where the sample has no room for all."""

    def of(hops: int) -> Draft:
        draft, asked = Draft(language), []
        names = language.keys(CHAINS * (hops + 1), draw)
        values = language.values(CHAINS, draw)
        for chain, value in enumerate(values):
            variables = names[chain * (hops + 1) :][: hops + 1]
            begin = draw.random() if chain else depth
            depths = sorted(draw.uniform(begin, 1) for _ in range(hops))
            facts = [draft.tell(begin, ASSIGN, variables[0], value)]
            for where, name, other in zip(depths, variables[1:], variables, strict=False):
                facts.append(draft.tell(where, COPY, name, other))
            asked = asked or facts
        draft.ask(VARIABLES, values[0])
        draft.answer_all((fact, slice(0, 1)) for fact in asked)
        return draft

    return largest_that_fits(length, HOPS, 1, of)


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
    return _list(language, [kinds[word] for word in words], COMMON, first)


def frequent_words(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """A list of words whose counts fall with the square of their rank, of which the first three are
    asked for. `depth` says nothing."""
    kinds = language.keys(max(min(MOST_KINDS, language.num_keys), NUM_FREQUENT + 1), draw)
    size = _list_size(language, length, FREQUENT, kinds, NUM_FREQUENT)
    weights = [rank**-EXPONENT for rank in range(1, len(kinds) + 1)]
    words = _shuffled([int(size * weight / sum(weights)) for weight in weights], draw)
    first = [words.index(kind) for kind in range(NUM_FREQUENT)]
    return _list(language, [kinds[word] for word in words], FREQUENT, first)


def _list_size(
    language: Language, length: int, question: Phrase, kinds: list[Word], asked: int
) -> int:
    """Return how many words, the longest of these kinds, fit beside the question."""
    longest = max(kinds, key=len)
    room = length - _list(language, [longest], question, [0] * asked).size + len(longest)
    return max(room // len(longest), SHORTEST_LIST)


def _shuffled(counts: list[int], draw: Random) -> list[int]:
    """Return each number, from 0, as often as its count says."""
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    draw.shuffle(numbers)
    return numbers


def _list(language: Language, words: list[Word], question: Phrase, asked: list[int]) -> Draft:
    """Return the list behind the haystack, and the question, which these words of it answer: as
    their places count where they stand first."""
    draft = Draft(language)
    fact = draft.tell(1.0, LIST, *words)
    draft.ask(question)
    draft.answer_all((fact, slice(word, word + 1)) for word in asked)
    return draft
