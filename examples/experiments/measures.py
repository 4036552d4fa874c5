"""What is read off a cell: the columns of an experiment's table. A row here for each `measure`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Cell = dict[str, Any]  # as run.py writes it

FAR = 256  # position that the loss at the end of the sequence is compared with


@dataclass(frozen=True)
class Column:
    """value: of a cell; None where it has none. shown: format of a number."""

    name: str
    value: Callable[[Cell], float | None]
    shown: str = ".3f"


def perplexity(cells: list[Cell]) -> list[Column]:
    """Perplexity by context length, and whether far context helps at the training length."""
    found = [
        Column(f"perplexity at {context:,}", lambda cell, c=context: _text(cell, c, "perplexity"))
        for context in _contexts(cells)
    ]
    found.append(Column(f"loss at position {FAR}", lambda cell: at_position(cell, FAR)))
    found.append(Column("loss at the end", lambda cell: at_position(cell, None)))
    return found


def compute(cells: list[Cell]) -> list[Column]:
    """The loss at the training length."""
    return [Column("loss", lambda cell: _text(cell, cell["seq_length"], "loss"), ".4f")]


def prompts(cells: list[Cell]) -> list[Column]:
    """The loss of the same tokens, by length of the prompt."""
    lengths = sorted({p["prompt"] for cell in cells for p in cell["evaluation"]["prompts"]})

    def loss(cell: Cell, length: int) -> float | None:
        return next(
            (p["loss"] for p in cell["evaluation"]["prompts"] if p["prompt"] == length), None
        )

    return [Column(f"loss behind {n:,}", lambda cell, n=n: loss(cell, n)) for n in lengths]


def ablation(cells: list[Cell]) -> list[Column]:
    """The loss at the training length, and beside that of the first variant with the same seed."""
    first = next(iter(cells[0]["axes"].items()))
    base = {
        (cell["seed"], *_others(cell, first[0])): _text(cell, cell["seq_length"], "loss")
        for cell in cells
        if cell["values"][first[0]] == first[1][0]
    }

    def difference(cell: Cell) -> float | None:
        here = _text(cell, cell["seq_length"], "loss")
        there = base.get((cell["seed"], *_others(cell, first[0])))
        return None if there is None or here is None else here - there

    return [*compute(cells), Column(f"beside {first[1][0]}", difference, "+.4f")]


def recall(cells: list[Cell]) -> list[Column]:
    """Accuracy on each task, by length of the samples."""
    found = {
        (task["task"], task["length"]): None
        for cell in cells
        for task in cell["evaluation"]["tasks"]
    }
    return [
        Column(f"{task} of {length:,}", lambda cell, t=task, n=length: _accuracy(cell, t, n), ".1%")
        for task, length in found
    ]


def _accuracy(cell: Cell, task: str, length: int) -> float | None:
    found = cell["evaluation"]["tasks"]
    return next((t["accuracy"] for t in found if (t["task"], t["length"]) == (task, length)), None)


MEASURES = {
    "perplexity": perplexity,
    "compute": compute,
    "prompts": prompts,
    "ablation": ablation,
    "recall": recall,
}


def at_position(cell: Cell, position: int | None) -> float | None:
    """The loss in the bucket of positions that `position` lies in (None: in the last one) with the
    context that was trained with."""
    found = text_of(cell, cell["seq_length"])
    if found is None:
        return None
    edges, losses = found["position_edges"], found["loss_by_position"]
    if position is None:
        return losses[-1]
    if position >= edges[-1]:
        return None
    return losses[sum(edge <= position for edge in edges) - 1]


def text_of(cell: Cell, context: int) -> dict[str, Any] | None:
    """What was evaluated with this context."""
    texts: Iterable[dict] = cell["evaluation"]["texts"]
    return next((found for found in texts if found["context"] == context), None)


def _text(cell: Cell, context: int, name: str) -> float | None:
    found = text_of(cell, context)
    return None if found is None else found[name]


def _contexts(cells: list[Cell]) -> list[int]:
    return sorted({found["context"] for cell in cells for found in cell["evaluation"]["texts"]})


def _others(cell: Cell, axis: str) -> tuple[str, ...]:
    return tuple(value for name, value in cell["values"].items() if name != axis)
