"""Recall of what was said before, all of it: pairs of a key and a value, or a row of words."""

from __future__ import annotations

from random import Random

from megalong.evals.language import Language, Mark, Phrase
from megalong.evals.sample import Draft, largest_that_fits

PAIR = Phrase("{}:{}\n")
KEY = Phrase("{}:")
AFTER_VALUE = Phrase("\n")
ROW = Phrase("Remember these numbers:{}.\n", mark=Mark.ROW)
REPEAT = Phrase("The numbers were:", mark=Mark.ROW_QUESTION)
AFTER_ROW = Phrase(".\n")

ROW_LENGTH = 16  # words
FEWEST_PAIRS = 2


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
    return largest_that_fits(
        length, ROW_LENGTH, 2, lambda words: _row(language, words, depth, draw)
    )


def _row(language: Language, words: int, depth: float, draw: Random) -> Draft:
    draft = Draft(language)
    row = draft.tell(depth, ROW, *language.values(words, draw))
    draft.ask(REPEAT)
    draft.answer(row, slice(None))
    draft.ask(AFTER_ROW)
    return draft
