"""YAML files of numbers that people write: every mistake is an error with file, line and key."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megalong.utils.errors import UserError, did_you_mean
from megalong.utils.files import read_yaml


class Section:
    """A mapping of a file."""

    def __init__(self, values: dict[str, Any], where: str, name: str = "", line: int = 1):
        """where: the flag and the file, as messages begin. name: of the section, "" for the file.
        line: on which it begins."""
        self._values, self._where, self.name, self._line = values, where, name, line

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def keys(self) -> list[str]:
        """Those that there are."""
        return list(self._values)

    def only(self, *known: str) -> None:
        """Refuse other keys: to be called first, so that a misspelt one is not said to be
        missing."""
        for key in self._values:
            if key not in known:
                raise self.error(key, f"is not a key of it{did_you_mean(str(key), known)}")

    def error(self, key: str, message: str) -> UserError:
        """To be raised: `message` is said of the key."""
        line = _line_of(self._values, key, self._line)
        full = f"{self.name}.{key}" if self.name else key
        return UserError(f"{self._where}, line {line}: {full} {message}")

    def raw(self, key: str) -> Any:
        """The value as it stands there; UserError where there is none."""
        if key not in self:
            raise self.error(key, "is missing")
        return self._values[key]

    def text(self, key: str) -> str:
        """A word or several."""
        value = self.raw(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, f"is {value!r}, and must be text")
        return value.strip()

    def number(self, key: str, low: float, high: float, unit: str = "") -> float:
        """A number from low to high. unit: what it is a number of, for messages."""
        return self._checked(key, self.raw(key), low, high, unit)

    def whole(self, key: str, low: int, high: int) -> int:
        """A whole number from low to high."""
        value = self.number(key, low, high)
        if value != int(value):
            raise self.error(key, f"is {value:g}, and must be a whole number")
        return int(value)

    def table(
        self, key: str, low: float, high: float, unit: str = ""
    ) -> tuple[tuple[float, float], ...]:
        """A number, or a list of pairs [size, number] with growing sizes: as such a list."""
        value = self.raw(key)
        if not isinstance(value, list):
            return ((1.0, self._checked(key, value, low, high, unit)),)
        pairs = []
        for row in value:
            if not isinstance(row, list) or len(row) != 2:
                raise self.error(key, f"has the row {row!r}: rows are [size, number]")
            size = self._checked(key, row[0], 1, 1e24, "as a size")
            if pairs and size <= pairs[-1][0]:
                raise self.error(key, f"has size {size:g} after {pairs[-1][0]:g}: let sizes grow")
            pairs.append((size, self._checked(key, row[1], low, high, unit)))
        if not pairs:
            raise self.error(key, "is an empty list")
        return tuple(pairs)

    def section(self, key: str) -> Section:
        """A mapping in this one."""
        value = self.raw(key)
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}, and must hold keys of its own")
        full = f"{self.name}.{key}" if self.name else key
        return Section(value, self._where, full, _line_of(self._values, key, self._line))

    def numbers(self, keys: Iterable[str], low: float, high: float, unit: str = ""):
        """Of some keys, those that there are; at least one must be."""
        found = {key: self.number(key, low, high, unit) for key in keys if key in self}
        if not found:
            raise self.error(next(iter(keys)), "is missing")
        return found

    def _checked(self, key: str, value: Any, low: float, high: float, unit: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not low <= number <= high:  # NaN is in no range
            unit = f" {unit}" if unit else ""
            raise self.error(key, f"is {value}, and must be from {low:g} to {high:g}{unit}")
        return number


def read_section(path: Path, where: str) -> Section:
    """A file whose content is a mapping. where: how messages begin, the flag with the file."""
    _, content = read_yaml(where, path, _Loader)
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected keys with values, one a line")
    return Section(content, where)


class _Mapping(dict):
    """With the line of each key."""

    lines: dict[Any, int]


def _line_of(values: dict, key: str, otherwise: int) -> int:
    return getattr(values, "lines", {}).get(key, otherwise)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        mapping = _Mapping(super().construct_mapping(node, deep=True))
        mapping.lines = {
            self.construct_object(key): key.start_mark.line + 1 for key, _ in node.value
        }
        if len(mapping) < len(node.value):
            raise yaml.YAMLError(f"a key stands twice among {', '.join(map(str, mapping))}")
        return mapping


_Loader.add_constructor(
    "tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node)
)
