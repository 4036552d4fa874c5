"""The cells of an experiment as rows of cells.csv, and the columns of its tables.

A row of cells.csv is a cell: its values of the axes and its seed, what it cost, what was found, the
flags in which cells differ, when and by which commits. Rows of "another_seed" are in no mean.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from megalong.utils.errors import counted
from megalong.utils.files import writable_folder

Row = dict[str, str]  # of cells.csv
FAR = 256  # position that the loss at the end of the sequence is compared with


# ------------------------------------------------------------------------------ cells as rows


def table_of(folder: Path) -> list[Row]:
    """Return the rows of an experiment's folder: those of its cells.csv, and of its cells, which
    win where both have one. Write them to cells.csv."""
    path = folder / "cells.csv"
    found: dict[str, dict] = {}
    if path.exists():
        with path.open(newline="") as file:
            found = {row["cell"]: row for row in csv.DictReader(file)}
    cells = [
        (kind, json.loads(file.read_text()))
        for kind in ("cells", "another_seed")
        for file in sorted((folder / kind).glob("*.json"))
    ]
    if cells:
        flags = [{name: str(value) for name, value in cell["flags"].items()} for _, cell in cells]
        common = set.intersection(*(set(each.items()) for each in flags))
        for kind, cell in cells:
            found[cell["cell"]] = row_of(kind, cell, {name for name, _ in common})
        writable_folder("--output", folder)
        with path.open("w", newline="") as file:
            names = list(dict.fromkeys(chain.from_iterable(found.values())))
            writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(found[name] for name in sorted(found))
        return table_of_csv(path)
    return list(found.values())


def table_of_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row_of(kind: str, cell: dict[str, Any], common: set[str]) -> dict[str, Any]:
    """Return a cell, as run.py writes it, as a row. common: flags that are not told."""
    from grid import as_flags

    flags = {name: value for name, value in cell["flags"].items() if name not in common}
    starts = [
        ({**start["flags"], "seed": None}, start["stages"], start["data"], start["tokens"])
        for start in cell["starts"]
    ]
    without_seed = {name: value for name, value in cell["flags"].items() if name != "seed"}
    trained = [without_seed, cell["stages"], cell["data"], cell["iterations"], cell["processes"]]
    cut = ""
    if not cell["complete"]:
        done = cell["iterations_done"], cell["iterations"]
        cut = "{} of {} iterations".format(*done) if done[0] < done[1] else "in the evaluation"
    device = cell["machine"]["device"] or cell["machine"]["processor"]
    return {
        "cell": cell["cell"],
        "kind": kind,
        **cell["values"],
        "seed": cell["seed"],
        "seq_length": cell["seq_length"],
        "parameters": cell["parameters"],
        "tokens": cell["tokens"],
        "flops": sum(cell["flops"].values()),
        "attention_flops": cell["flops"]["attention"],
        "cut": cut,
        **(numbers_of(cell) if cell["complete"] else {}),
        "seconds": round(sum(cell["seconds"].values()), 1),
        "starts": " ".join(f"{start['settings']}:{start['seconds']}" for start in cell["starts"]),
        "before": ", then ".join(map(start_in_words, cell["starts"])),
        "trained": digest([*trained, starts]),
        "asked": digest([cell["corpus"], cell["evaluate"]]),
        "corpus": cell["corpus"] or "",
        "flags": " ".join(as_flags(flags)),
        "machine": f"{device}, {counted(cell['machine']['processors'], 'processor')}",
        "versions": ", ".join(f"{name} {number}" for name, number in cell["versions"].items()),
        "commits": " ".join(map(str, (*cell["trained_by_commits"], cell["commit"]))),
        "date": cell["date"],
    }


def numbers_of(cell: dict[str, Any]) -> dict[str, str]:
    """Return what was found, by the names of columns."""
    found, evaluation, length = {}, cell["evaluation"], cell["seq_length"]
    only = cell["measure"] in ("compute", "ablation")
    for text in evaluation["texts"]:
        if text["context"] == length and only:
            found["loss"] = text["loss"]
        if only:
            continue
        found[f"loss at {text['context']}"] = text["loss"]
        if text["context"] == length:
            found |= by_place("loss in", text["position_edges"], text["loss_by_position"])
    found |= {f"loss behind {p['prompt']:,}": p["loss"] for p in evaluation["prompts"]}
    for task in evaluation["tasks"]:
        found[f"{task['task']} of {task['length']:,}"] = task["accuracy"]
        if task["length"] == length:
            name = f"{task['task']} back"
            found |= by_place(name, task["distance_edges"], task["accuracy_by_distance"])
    return {name: f"{value:.10g}" for name, value in found.items() if value is not None}


def by_place(name: str, edges: list[int], values: list[float | None]) -> dict[str, float | None]:
    return {f"{name} {a}-{b}": v for (a, b), v in zip(pairwise(edges), values, strict=True)}


def start_in_words(start: dict[str, Any]) -> str:
    kind = "text" if start["data"] is None else "recall tasks"
    return (
        f"{start['tokens'] / 1e6:.2f} M tokens of {kind} at {start['seq_length']:,} with"
        f" {' and '.join(start['attention'])} attention"
        f" ({sum(start['flops'].values()) / 1e12:,.1f} TFLOP)"
    )


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def number(row: Row, name: str) -> float | None:
    return float(row[name]) if row.get(name) else None


def places(row: Row, name: str) -> list[tuple[int, int, float]]:
    """Return from, to and value of the columns "NAME FROM-TO" that a row has."""
    found = []
    for column, value in row.items():
        if value and column.startswith(f"{name} "):
            start, stop = map(int, column.removeprefix(f"{name} ").split("-"))
            found.append((start, stop, float(value)))
    return sorted(found)


# ------------------------------------------------------------------------------ columns of tables


@dataclass(frozen=True)
class Column:
    """value: of a row; None where it has none. shown: format of a number."""

    name: str
    value: Callable[[Row], float | None]
    shown: str = ".3f"


def numbered(rows: list[Row], name: str) -> list[tuple[str, int]]:
    """Return the columns "NAME NUMBER" of which a row has a value, in the order of the numbers."""
    names = {column for row in rows for column in row if column.startswith(name) and row[column]}
    ends = ((column, column.removeprefix(name).replace(",", "")) for column in names)
    return sorted(((c, int(end)) for c, end in ends if end.isdecimal()), key=lambda x: x[1])


def plain(names: list[str], shown: str = ".3f") -> list[Column]:
    return [Column(name, lambda row, n=name: number(row, n), shown) for name in names]


def perplexity(rows: list[Row]) -> list[Column]:
    def of(row: Row, name: str) -> float | None:
        loss = number(row, name)
        return None if loss is None else math.exp(loss)

    def at(row: Row, position: int | None) -> float | None:
        found = places(row, "loss in")
        if position is None:
            return found[-1][-1] if found else None
        return next((loss for a, b, loss in found if a <= position < b), None)

    return [
        *(
            Column(f"perplexity at {n:,}", lambda row, c=c: of(row, c))
            for c, n in numbered(rows, "loss at ")
        ),
        Column(f"loss at position {FAR}", lambda row: at(row, FAR)),
        Column("loss at the end", lambda row: at(row, None)),
    ]


def loss_by_context(rows: list[Row]) -> list[Column]:
    columns = numbered(rows, "loss at ")
    return [Column(f"at {n:,}", lambda row, c=c: number(row, c)) for c, n in columns]


def loss(rows: list[Row]) -> list[Column]:
    return plain(["loss"], ".4f")


def behind_prompts(rows: list[Row]) -> list[Column]:
    return plain([name for name, _ in numbered(rows, "loss behind ")])


def recall(rows: list[Row]) -> list[Column]:
    tasks = dict.fromkeys(c.partition(" of ")[0] for row in rows for c in row if " of " in c)
    return plain([n for task in tasks for n, _ in numbered(rows, f"{task} of ")], ".1%")


# By measure the columns of the table, and those of the second one, whose numbers are differences to
# the first value of the first axis. Accuracies near 0 or 1 have no spread of one size: none there.
MEASURES = {
    "perplexity": (perplexity, loss_by_context),
    "compute": (loss, loss),
    "prompts": (behind_prompts, behind_prompts),
    "ablation": (loss, loss),
    "recall": (recall, lambda rows: []),
}


def beside_the_first(rows: list[Row], axes: dict[str, list[str]], column: Column) -> Column:
    """Return what `column` is more than for the first value of the first axis with the same seed
    and the same values of the other axes. Seeds of small models differ by as much as some kinds of
    attention do: that is in both, and not in their difference."""
    (axis, names), *others = axes.items()
    key = [*(name for name, _ in others), "seed"]
    base = {tuple(row[n] for n in key): row for row in rows if row[axis] == names[0]}

    def difference(row: Row) -> float | None:
        first = base.get(tuple(row[n] for n in key))
        here, there = column.value(row), None if first is None else column.value(first)
        return None if here is None or there is None else here - there

    return Column(column.name, difference, f"+{column.shown}")


def groups(rows: list[Row], axes: dict[str, list[str]]) -> list[list[Row]]:
    """Return the rows that differ in their seed alone, in the order of the axes' values."""
    found: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(v.index(row[axis]) for axis, v in axes.items()), []).append(row)
    return [sorted(found[place], key=lambda row: int(row["seed"])) for place in sorted(found)]


def of_grid(rows: list[Row], axes: dict[str, list[str]]) -> tuple[list[Row], list[str]]:
    """Return the rows that can stand in one table, and the names of the other cells: those of
    values that the grid has no more, or trained or asked otherwise than the newest."""
    alike = [row for row in rows if all(row.get(axis) in v for axis, v in axes.items())]
    if alike:
        asked = max(alike, key=lambda row: row["date"])["asked"]
        alike = [row for row in alike if row["asked"] == asked]
    kept = []
    for group in groups(alike, axes):
        trained = max(group, key=lambda row: row["date"])["trained"]
        kept += [row for row in group if row["trained"] == trained]
    names = {row["cell"] for row in kept}
    return kept, sorted(row["cell"] for row in rows if row["cell"] not in names)
