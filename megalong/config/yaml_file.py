"""A YAML file of settings, and in which of its lines each of them stands."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import yaml

from megalong.utils.errors import UserError
from megalong.utils.files import read_yaml


@dataclass(frozen=True)
class YamlFile:
    """What `--config FILE.yaml` holds: keys and values, {} where it is empty."""

    path: str
    text: str
    content: dict[Any, Any]

    @staticmethod
    def read(path: str) -> YamlFile:
        """Raises UserError naming the file, and the line where one is no YAML."""
        text, content = read_yaml(f"--config {path}", path)
        if not isinstance(content, dict | None):
            raise UserError(f"--config {path}: expected `name: value` lines, found {content!r}")
        return YamlFile(path, text, content or {})

    def check_keys(self, of: Callable[[tuple[Hashable, ...]], str] = lambda place: "") -> None:
        """Raise UserError where a mapping has a key twice, of which YAML takes the last.

        of: what the error is to say of the place of the mapping, before the key.
        """
        nodes: list[tuple[yaml.Node, tuple[Hashable, ...]]]
        nodes = [(yaml.compose(self.text, yaml.SafeLoader), ())]
        while nodes:
            node, place = nodes.pop()
            if isinstance(node, yaml.MappingNode):
                seen: set[str] = set()
                for key, value in node.value:
                    if key.value in seen:
                        where = f"--config {self.path}, line {key.start_mark.line + 1}"
                        raise UserError(f"{where}: {of(place)}{key.value}: given twice")
                    seen.add(key.value)
                    nodes.append((value, (*place, key.value)))
            elif isinstance(node, yaml.SequenceNode):
                nodes += [(item, (*place, number)) for number, item in enumerate(node.value)]

    def where(self, *place: Hashable) -> str:
        """ "--config FILE, line 12" of a place, the keys and list indices that lead to it; of one
        that stands in no line (it was merged in by `<<`), of the innermost around it that does."""
        node, line = yaml.compose(self.text, yaml.SafeLoader), None
        for step in place:
            found = _inside(node, step)
            if found is None:
                break
            line, node = found
        return f"--config {self.path}" + ("" if line is None else f", line {line}")


def _inside(node: yaml.Node, step: Hashable) -> tuple[int, yaml.Node] | None:
    """The line, from 1, and the node of one key of a mapping, or of an item of a list."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step].start_mark.line + 1, node.value[step]
    return None
