"""What is read off a cell: the columns of an experiment's tables. A row here for each `measure`."""

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


def loss_by_context(cells: list[Cell]) -> list[Column]:
    """The loss by context length."""
    return [
        Column(f"at {context:,}", lambda cell, c=context: _text(cell, c, "loss"))
        for context in _contexts(cells)
    ]


def loss_at_training_length(cells: list[Cell]) -> list[Column]:
    """The loss at the training length."""
    return [Column("loss", lambda cell: _text(cell, cell["seq_length"], "loss"), ".4f")]


def loss_behind_prompts(cells: list[Cell]) -> list[Column]:
    """The loss of the same tokens, by length of the prompt."""
    lengths = sorted({p["prompt"] for cell in cells for p in cell["evaluation"]["prompts"]})

    def behind(cell: Cell, length: int) -> float | None:
        return next(
            (p["loss"] for p in cell["evaluation"]["prompts"] if p["prompt"] == length), None
        )

    return [Column(f"loss behind {n:,}", lambda cell, n=n: behind(cell, n)) for n in lengths]


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


def nothing(cells: list[Cell]) -> list[Column]:
    """For what is not compared by seed: accuracies near 0 or 1 have no spread of one size."""
    return []


@dataclass(frozen=True)
class Measure:
    """columns: of the table. compared: of the second one, whose numbers are differences to the
    first value of the first axis."""

    columns: Callable[[list[Cell]], list[Column]]
    compared: Callable[[list[Cell]], list[Column]]


MEASURES = {
    "perplexity": Measure(perplexity, loss_by_context),
    "compute": Measure(loss_at_training_length, loss_at_training_length),
    "prompts": Measure(loss_behind_prompts, loss_behind_prompts),
    "ablation": Measure(loss_at_training_length, loss_at_training_length),
    "recall": Measure(recall, nothing),
}


def beside_the_first(cells: list[Cell], column: Column) -> Column:
    """What `column` is more than for the first value of the first axis with the same seed and the
    same values of the other axes. Seeds of small models differ by as much as some kinds of
    attention do: that is in both, and not in their difference."""
    axis, names = next(iter(cells[0]["axes"].items()))
    base = {_others(cell, axis): cell for cell in cells if cell["values"][axis] == names[0]}

    def difference(cell: Cell) -> float | None:
        first = base.get(_others(cell, axis))
        here, there = column.value(cell), None if first is None else column.value(first)
        return None if here is None or there is None else here - there

    return Column(column.name, difference, f"+{column.shown}")


def compute_and_loss(
    cells: list[Cell], name: str, kind: str
) -> tuple[list[int], list[float], list[int]]:
    """Of the cells that are `name` by the axes between, and `kind` by the first one: executed
    FLOPs, loss and seed, each."""
    [column] = loss_at_training_length(cells)
    first, *_ = cells[0]["axes"]
    points = [
        (sum(cell["flops"].values()), value, cell["seed"])
        for cell in cells
        if (between(cell), cell["values"][first]) == (name, kind)
        and (value := column.value(cell)) is not None
    ]
    flops, losses, seeds = zip(*points, strict=True) if points else ((), (), ())
    return list(flops), list(losses), list(seeds)


def between(cell: Cell) -> str:
    """Its values of the axes between the first and the last, of those that have several."""
    axes = list(cell["axes"].items())[1:-1]
    return ", ".join(cell["values"][axis] for axis, names in axes if len(names) > 1)


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


def _others(cell: Cell, axis: str) -> tuple:
    """Its seed, and its values but for that of one axis."""
    return cell["seed"], *(value for name, value in cell["values"].items() if name != axis)
