"""How much of the documents that are held out stands in those that are trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

RUN = 4  # lines; a single one, or a closing brace, is in everything


def seen_shares(train: Path, held_out: Path) -> dict[str, float]:
    """By path, the share of a held-out document's runs of four lines (empty ones left out, blanks
    at the ends too) that a document of `train` has; both are JSON lines of {"text", "path"}."""
    wanted = {record["path"]: runs(record["text"]) for record in records(held_out)}
    unseen = set().union(*wanted.values())
    for record in records(train):
        unseen -= runs(record["text"])
    return {
        path: 1 - len(found & unseen) / len(found) if found else 0.0
        for path, found in wanted.items()
    }


def runs(text: str) -> set[int]:
    """Hashes of the runs of lines; of a text with fewer lines, none."""
    lines = [hash(line.strip()) for line in text.splitlines() if line.strip()]
    return {hash(tuple(lines[i : i + RUN])) for i in range(len(lines) - RUN + 1)}


def records(path: Path) -> Iterator[dict]:
    with path.open() as file:
        yield from map(json.loads, file)
