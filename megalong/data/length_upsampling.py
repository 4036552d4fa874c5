"""Documents that count more or less often by their length: `--length-upsampling 0:1 32768:5`.

The recipe of long-context continued training: of each source, whose share of a blend stays what it
is, the long documents are seen more often than the short ones. `0:1 32768:5` lets documents count
once, and those of 32,768 tokens or more five times an epoch. A weight may be a fraction: with 2.5
every document is there twice or three times an epoch, and five times in any two epochs that follow
one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from megalong.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np

FLAG = "--length-upsampling"
LARGEST_WEIGHT = 10_000
LARGEST_DENOMINATOR = 1_000_000  # six digits behind the point


@dataclass(frozen=True)
class LengthUpsampling:
    """How often documents count, by buckets of their length.

    bounds: the shortest length of each bucket, in tokens, ascending from 0. weights: how often the
    documents of the bucket count in an epoch.
    """

    bounds: tuple[int, ...]
    weights: tuple[Fraction, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> LengthUpsampling:
        """Of words TOKENS:WEIGHT; documents below the first bound count once.

        Raises UserError for anything else, and where no document would count.
        """
        weights = {0: Fraction(1)}
        given = set()
        for word in words:
            bound, weight = _parse_word(word)
            if bound in given:
                raise UserError(f"{FLAG} {' '.join(words)}: {bound} is there twice")
            given.add(bound)
            weights[bound] = weight
        if not any(weights.values()):
            raise UserError(f"{FLAG} {' '.join(words)}: a weight has to be positive")
        return cls(*zip(*sorted(weights.items()), strict=True))

    def bucket(self, lengths: np.ndarray) -> np.ndarray:
        """The bucket of each length, int64."""
        import numpy as np  # not above: flags are read without it

        return np.searchsorted(self.bounds, lengths, side="right") - 1

    def shares(self, lengths: np.ndarray) -> list[dict[str, Any]]:
        """By bucket its documents in words, its weight, and its share of the tokens before and
        after.

        lengths: int64, of the documents of one source.
        """
        import numpy as np

        tokens = np.bincount(self.bucket(lengths), lengths, len(self.bounds))
        weights = np.array([float(weight) for weight in self.weights])
        before, after = tokens / tokens.sum(), tokens * weights / (tokens @ weights)
        return [
            {
                "documents": _range_in_words(self.bounds, b),
                "weight": float(weights[b]),
                "before": float(before[b]),
                "after": float(after[b]),
            }
            for b in range(len(weights))
        ]

    def describe(self, lengths: np.ndarray) -> str:
        """The same in one line."""
        parts = [
            f"{row['documents']} x {row['weight']:g}: {row['before']:.1%} -> {row['after']:.1%}"
            for row in self.shares(lengths)
        ]
        return f"{FLAG}, shares of the tokens in documents of {', '.join(parts)}"


def _parse_word(word: str) -> tuple[int, Fraction]:
    bound, colon, weight = word.partition(":")
    try:
        if not colon:
            raise ValueError
        parsed = int(bound), Fraction(weight)
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"{FLAG} {word}: TOKENS:WEIGHT is expected, such as 32768:5 for documents of at least"
            " 32,768 tokens five times an epoch"
        ) from None
    if parsed[0] < 0:
        raise UserError(f"{FLAG} {word}: a length of {parsed[0]} tokens is negative")
    if not 0 <= parsed[1] <= LARGEST_WEIGHT:
        raise UserError(f"{FLAG} {word}: a weight lies between 0 and {LARGEST_WEIGHT:,}")
    if parsed[1].denominator > LARGEST_DENOMINATOR:
        raise UserError(f"{FLAG} {word}: a weight has six digits behind the point at most")
    return parsed


def _range_in_words(bounds: tuple[int, ...], bucket: int) -> str:
    if bucket + 1 == len(bounds):
        return f"{bounds[bucket]:,} tokens and more" if bounds[bucket] else "any length"
    if not bounds[bucket]:
        return f"less than {bounds[1]:,}"
    return f"{bounds[bucket]:,} to {bounds[bucket + 1] - 1:,}"
