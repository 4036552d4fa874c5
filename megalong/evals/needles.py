"""Needles in a haystack: a key has a value, which is asked for in the end.

RULER's retrieval tasks (arXiv 2404.06654, section 3), with one order of the answers, so that they
can be told token by token: that in which they are asked for, or stand in the text.
"""

from __future__ import annotations

from random import Random

from megalong.evals.language import Language, Mark, Phrase
from megalong.evals.sample import Draft

NEEDLE = Phrase("The magic number of{} is{}.\n", mark=Mark.NEEDLE)
QUESTION = Phrase(
    "What is the magic number of{}? The magic number of{} is", mark=Mark.NEEDLE_QUESTION
)
QUESTION_OF_SEVERAL = Phrase(
    "In their order, the magic numbers of{} are", mark=Mark.NEEDLES_QUESTION
)

OTHERS = 3  # needles beside the one that is asked for, as in RULER


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
    _ask(draft, QUESTION, keys[0], asked)
    return draft


def niah_multivalue(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """One key has several values, which are asked for in the order in which they are told; the
    first of them stands at `depth`."""
    draft = Draft(language)
    [key], values = language.keys(1, draw), language.values(1 + OTHERS, draw)
    depths = [depth, *sorted(draw.uniform(depth, 1) for _ in range(OTHERS))]
    facts = [
        draft.tell(where, NEEDLE, key, value) for where, value in zip(depths, values, strict=True)
    ]
    draft.ask(QUESTION_OF_SEVERAL, key)
    draft.answer_all((fact, slice(1, 2)) for fact in facts)
    return draft


def niah_multiquery(language: Language, length: int, depth: float, draw: Random) -> Draft:
    """Several keys have a value each; all are asked for, the one at `depth` first."""
    draft = Draft(language)
    keys, values = language.keys(1 + OTHERS, draw), language.values(1 + OTHERS, draw)
    depths = [depth, *(draw.random() for _ in range(OTHERS))]
    facts = [
        draft.tell(where, NEEDLE, key, value)
        for where, key, value in zip(depths, keys, values, strict=True)
    ]
    for key, fact in zip(keys, facts, strict=True):
        _ask(draft, QUESTION, key, fact)
    return draft


def _ask(draft: Draft, question: Phrase, key: tuple[int, ...], fact: int) -> None:
    draft.ask(question, key, key)
    draft.answer_all([(fact, slice(1, 2))])
