"""What a run reads, as flags and files name it: the sources of a blend, and sets to evaluate on.

    --data-path 0.7 code=A 0.3 B     shares and paths; NAME= in front of a path names the source
    --data-path A B                  each as much as it has tokens
    --data-blend FILE.yaml           the same as a list:

    - name: code
      path: A
      weight: 0.7    # or `tokens: 3e9`, or `epochs: 2`

A path is the prefix of a .bin/.idx pair, a folder of such pairs, or a pattern of several.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from megalong.utils.errors import UserError, did_you_mean
from megalong.utils.files import read_yaml

if TYPE_CHECKING:
    import numpy as np

_AMOUNTS = ("weight", "tokens", "epochs")
_KEYS = ("name", "path", *_AMOUNTS)
_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class SourceSpec:
    """One source, as it was asked for.

    place: the flag, or the file, that names it, for errors; ends with the path.
    named: whether the name was given, else it is made of the path.
    unit, amount: "weight", "tokens" or "epochs", and how many; where nothing is said, one epoch.
    """

    name: str
    path: str
    place: str
    named: bool = False
    unit: str = "epochs"
    amount: Fraction = Fraction(1)


def sources_of_flag(words: Sequence[str], flag: str, weighted: bool = True) -> list[SourceSpec]:
    """The sources behind a flag: paths, or each after its weight.

    weighted: whether weights may be given. Raises UserError naming the flag.
    """
    weights: Sequence[str | None] = [None] * len(words)
    paths = list(words)
    if len(words) > 1 and any(map(_is_number, words)):
        if not weighted:
            number = next(filter(_is_number, words))
            raise UserError(
                f"{flag}: {number} looks like a weight, and each set is evaluated by itself: give"
                " paths only, named if you like (NAME=PATH)"
            )
        weights, paths = words[::2], list(words[1::2])
        for place, word in enumerate(words):
            if _is_number(word) != (place % 2 == 0):
                what = "a weight" if place % 2 == 0 else "a path"
                raise UserError(
                    f"{flag}: {what} is expected in the place of {word}: WEIGHT PATH WEIGHT PATH"
                    " ..., or paths alone"
                )
        if len(weights) != len(paths):
            raise UserError(f"{flag}: no path behind the weight {words[-1]}")
    specs = []
    for weight, word in zip(weights, paths, strict=True):
        name, path = _split_name(word)
        if not path:
            raise UserError(f"{flag} {word}: no path behind the name")
        place = f"{flag} {path}"
        amount = {} if weight is None else {"unit": "weight", "amount": _amount(weight, flag)}
        named = name is not None
        specs.append(SourceSpec(name or _name_of(path), path, place, named, **amount))
    return _checked(specs, flag, "NAME=PATH")


def sources_of_file(file: str) -> list[SourceSpec]:
    """The sources of a `--data-blend` file. Raises UserError naming the file, and the line."""
    import yaml  # not for --help

    flag = f"--data-blend {file}"
    text, content = read_yaml(flag, file)
    nodes = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(content, list) or not content:
        raise UserError(f"{flag}: a list of sources is expected, each with `path: ...`")
    specs = []
    for entry, node in zip(content, nodes.value, strict=True):
        where = f"{flag}, line {node.start_mark.line + 1}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected `path: ...` and the like, found {entry!r}")
        for key, _ in node.value:
            if key.value not in _KEYS:
                hint = did_you_mean(key.value, _KEYS) or f"; there are {', '.join(_KEYS)}"
                raise UserError(
                    f"{flag}, line {key.start_mark.line + 1}: unknown key {key.value}{hint}"
                )
        specs.append(_spec_of_entry(entry, flag, where))
    units = {spec.unit for spec in specs}
    if "weight" in units and len(units) > 1:
        raise UserError(f"{flag}: weights for all sources, or tokens and epochs for all")
    return _checked(specs, flag, "`name: ...`")


def shares_of(specs: Sequence[SourceSpec], epoch_tokens: Sequence[int]) -> list[Fraction]:
    """The share of the samples that each source has, with sum 1.

    Weights are relative. Tokens, and epochs times the tokens of one, are relative too, so that the
    order does not hang on how long a run is. epoch_tokens: of each source.
    """
    amounts = [
        spec.amount * (tokens if spec.unit == "epochs" else 1)
        for spec, tokens in zip(specs, epoch_tokens, strict=True)
    ]
    return [amount / sum(amounts) for amount in amounts]


def _spec_of_entry(entry: dict[str, Any], flag: str, where: str) -> SourceSpec:
    path, name = entry.get("path"), entry.get("name")
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: no `path: ...`")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise UserError(f"{where}: name {name!r} may have letters, digits and . _ + - only")
    given = [unit for unit in _AMOUNTS if unit in entry]
    if len(given) > 1:
        raise UserError(f"{where}: {' and '.join(given)} are two ways to say how much: keep one")
    amount = {unit: _amount(entry[unit], f"{where}: {unit}") for unit in given}
    unit, value = next(iter(amount.items()), ("epochs", Fraction(1)))
    place = f"{flag}: {path}"
    return SourceSpec(name or _name_of(path), path, place, name is not None, unit, value)


def _checked(specs: list[SourceSpec], flag: str, how_to_name: str) -> list[SourceSpec]:
    seen: dict[str, SourceSpec] = {}
    for spec in specs:
        other = seen.setdefault(spec.name, spec)
        if other is not spec:
            raise UserError(
                f"{flag}: both {other.path} and {spec.path} have the name {spec.name}: name them"
                f" otherwise ({how_to_name})"
            )
    if not any(spec.amount for spec in specs):
        raise UserError(f"{flag}: all weights are 0: at least one has to be positive")
    return specs


def _split_name(word: str) -> tuple[str | None, str]:
    name, separator, path = word.partition("=")
    return (name, path) if separator and _NAME.fullmatch(name) else (None, word)


def _name_of(path: str) -> str:
    """The last part of a path that has letters, with others than a name may have left out."""
    parts = [re.sub(r"[^\w.+-]+", "_", part).strip("_.") for part in path.split(os.sep)]
    return next(filter(None, reversed(parts)), "data")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _amount(value: Any, place: str) -> Fraction:
    """An exact number that is not negative: 0.7 is 7/10."""
    if isinstance(value, bool) or not _is_number(str(value)):
        raise UserError(f"{place} {value!r}: a number is expected")
    if not 0 <= float(value) < math.inf:
        raise UserError(f"{place} {value}: must be a number and not negative")
    return Fraction(str(value))


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
