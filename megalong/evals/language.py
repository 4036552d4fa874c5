"""What task samples are said in: text of a tokenizer, or bare token ids.

Either has words of two sorts, keys (what is asked by) and values (what is told), and haystack in
which neither occurs. A word is a few tokens, the same wherever it is said, so that an answer stands
in the context token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, unique
from functools import cache
from random import Random
from typing import NamedTuple

from megalong.utils.errors import UserError

STYLES = ("text", "ids")

Word = tuple[int, ...]

MARKS = 12  # ids that stand for phrases, two of them for phrases to come
HAYSTACK = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)


# An adjective and a noun, "brave-otter", make a key.
_ADJECTIVES = """
    able amber ancient bold brave bright brisk broad calm careful cheerful clear clever cold
    curious dark deep distant eager early easy empty faint famous fancy fast fierce fine firm
    fresh friendly gentle glad golden grand great green happy heavy hidden honest humble icy
    jolly keen kind large late lively lonely loud lucky mellow merry mighty mild modern narrow
    neat noble old pale patient plain polite proud quick quiet rapid rare ready red rich rough
    round royal sharp shiny short shy silent silver simple sleepy slow small smooth soft solid
    spare steady steep strange strong sunny sweet swift tall tame tender thick thin tidy tiny
    tough true vast warm wary wide wild wise witty young zealous
"""
_NOUNS = """
    anchor apple arrow badger barrel basket beacon bear beaver bell bird boat bottle branch
    bread bridge brook bucket button cabin camel candle canyon carpet castle cedar chair
    cherry circle clock cloud coast coin comet copper coral cottage cricket crow crown dancer
    desert dolphin door dragon drum eagle engine falcon farmer feather fern ferry field finch
    fire flag flute forest fox frog garden gate ghost glacier goose grape hammer harbor hat
    hawk heron hill horse house island jacket jewel kettle key kite ladder lake lamp lantern
    leaf lemon lion lizard lobster magnet maple marble market meadow mirror monkey moon moose
    mountain mouse needle nest oak ocean olive orange orchard otter owl paddle paper parrot
    peach pebble pencil penguin pepper piano pigeon pillow pine planet plum pocket pony potato
    puppet rabbit raven ribbon river robin rocket rose saddle sailor salmon sparrow spider
    spoon squirrel stone stove swan table teapot temple tiger timber tower train trumpet tulip
    tunnel turtle valley violin wagon walnut whale wheel willow window wolf zebra
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


@unique
class Mark(IntEnum):
    """Which of these ids stands for which phrase. None changes, so that samples stay what they are
    for models that are trained on them."""

    NEEDLE = 0
    NEEDLE_QUESTION = 1
    NEEDLES_QUESTION = 2
    ROW = 3
    ROW_QUESTION = 4
    ASSIGNMENT = 5
    ASSIGNMENT_OF_VARIABLE = 6
    VARIABLES_QUESTION = 7
    COMMON_QUESTION = 8
    FREQUENT_QUESTION = 9


@dataclass(frozen=True)
class Phrase:
    """Something to say. text: has {} for each word, the last of which takes all that are left;
    words bring the space before them. mark: what stands for the text, before the words, where there
    is no text; None: nothing does."""

    text: str
    mark: Mark | None = None


class Said(NamedTuple):
    """Tokens, and where the words are in them: (start, stop) each, in their order."""

    tokens: list[int]
    words: list[tuple[int, int]]


class Text:
    """English, in the tokens of a tokenizer: keys like "brave-otter", values of five digits."""

    def __init__(self, encode: Callable[[str], Sequence[int]], first: int):
        """encode: text to ids, without special tokens."""
        self.first = first
        self.num_keys, self.num_values = len(ADJECTIVES) * len(NOUNS), 90_000  # of five digits
        self._encode = cache(lambda text: tuple(encode(text)))
        self._haystack = list(self._encode(HAYSTACK))
        self.haystack_size = len(self._haystack)

    def keys(self, count: int, draw: Random) -> list[Word]:
        numbers = _distinct("keys", self.num_keys, count, draw)
        pairs = (divmod(number, len(NOUNS)) for number in numbers)
        return [self._encode(f" {ADJECTIVES[one]}-{NOUNS[other]}") for one, other in pairs]

    def values(self, count: int, draw: Random) -> list[Word]:
        numbers = _distinct("values", self.num_values, count, draw)
        return [self._encode(f" {10_000 + number}") for number in numbers]

    def say(self, phrase: Phrase, *words: Word) -> Said:
        before, *behind = phrase.text.split("{}")
        tokens, places = list(self._encode(before)), []
        for number, word in enumerate(words):
            places.append((len(tokens), len(tokens) + len(word)))
            tokens += word
            left_for_last = number >= len(behind) - 1
            if not left_for_last or number == len(words) - 1:
                tokens += self._encode(behind[min(number, len(behind) - 1)])
        return Said(tokens, places)

    def haystack(self, pieces: int, draw: Random, before: Sequence[int]) -> list[int]:
        return self._haystack * pieces


class Ids:
    """Bare ids: the first few stand for phrases, of the others a quarter are haystack, and half of
    the rest are keys, half values, of one id each. For models that are trained on the tasks.

    A token of the haystack follows from the one before the last, whatever that is. Of random ones
    a model learns nothing, and small models then take very long to find out that it helps to know
    what stood before a token, which all tasks are about; text teaches that by itself."""

    haystack_size = 1

    def __init__(self, ids: Sequence[int], first: int):
        """ids: those that may occur, in order. Raises UserError where they are too few."""
        if len(ids) < MARKS + 8:
            raise UserError(
                f"a vocabulary of {len(ids)} ids is too small for tasks of bare ids: these need at"
                f" least {MARKS + 8}"
            )
        self.first = first
        self._marks, others = ids[:MARKS], ids[MARKS:]
        quarter = len(others) // 4
        half = quarter + (len(others) - quarter) // 2
        self._hay, self._keys, self._values = others[:quarter], others[quarter:half], others[half:]
        self.num_keys, self.num_values = len(self._keys), len(self._values)

    def keys(self, count: int, draw: Random) -> list[Word]:
        return [(self._keys[i],) for i in _distinct("keys", self.num_keys, count, draw)]

    def values(self, count: int, draw: Random) -> list[Word]:
        return [(self._values[i],) for i in _distinct("values", self.num_values, count, draw)]

    def say(self, phrase: Phrase, *words: Word) -> Said:
        tokens = [] if phrase.mark is None else [self._marks[phrase.mark]]
        places = []
        for word in words:
            places.append((len(tokens), len(tokens) + len(word)))
            tokens += word
        return Said(tokens, places)

    def haystack(self, pieces: int, draw: Random, before: Sequence[int]) -> list[int]:
        tokens, known = list(before[-2:]), len(before[-2:])
        for _ in range(pieces):
            tokens.append(self._hay[tokens[-2:][0] % len(self._hay)])
        return tokens[known:]


def _distinct(what: str, known: int, count: int, draw: Random) -> list[int]:
    if count > known:
        raise UserError(
            f"it takes {count} different {what}, and the vocabulary has {known}: use a tokenizer"
            " with more ids"
        )
    return draw.sample(range(known), count)


Language = Text | Ids
