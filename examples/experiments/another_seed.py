"""Whether cells with a seed of their own lie where those of the report would have them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from measures import MEASURES, Cell, Column, beside_the_first
from report import of_newest_grid, read_cells
from statistics_of_seeds import Spread

from megalong.errors import UserError

# Two-sided 95% quantiles of Student's t by degrees of freedom (any table of it has them).
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def write_check(folder: Path, seed: int) -> str:
    """Writes another_seed.md in an experiment's folder, of what its `cells` and `another_seed`
    have, and returns it. Raises UserError where there is nothing to compare."""
    of_grid, _ = of_newest_grid(read_cells(folder / "cells"))
    others = [cell for cell in of_grid if cell["complete"] and cell["seed"] != seed]
    new = [
        cell
        for cell in read_cells(folder / "another_seed")
        if cell["complete"] and cell["seed"] == seed
    ]
    rows = [row for cell in new for row in compared(cell, others, new)]
    if not rows:
        raise UserError(
            f"{folder}: no cell of seed {seed} has two others beside it to compare with"
        )
    text = as_text(rows, others[0]["title"], seed)
    (folder / "another_seed.md").write_text(text)
    return text


def compared(cell: Cell, others: list[Cell], new: list[Cell]) -> list[dict[str, Any]]:
    """A row for each number of the cell; where the first value of the first axis has been run with
    its seed, too, also for the differences to that. others: of other seeds. new: of its seed."""
    measure = MEASURES[cell["measure"]]
    columns = [("", column) for column in measure.columns(others)]
    first = cell["axes"][next(iter(cell["axes"]))][0]
    columns += [
        (f", less that of {first}", beside_the_first([*others, *new], column))
        for column in measure.compared(others)
        if first not in cell["values"].values()
    ]
    alike = [other for other in others if other["values"] == cell["values"]]
    found = [row_of(cell, alike, name, column) for name, column in columns]
    return [row for row in found if row is not None]


def row_of(cell: Cell, alike: list[Cell], name: str, column: Column) -> dict[str, Any] | None:
    """Where the cell's number lies among those of other seeds. within: the interval that holds 95%
    of new seeds, if they are normally distributed: mean ± t · s · √(1 + 1/n)."""
    here = column.value(cell)
    values = [value for other in alike if (value := column.value(other)) is not None]
    if here is None or len(values) < 2:
        return None
    spread = Spread.of(values)
    reach = T_95.get(len(values) - 1, 2.0) * spread.deviation * math.sqrt(1 + 1 / len(values))
    return {
        "cell": cell["cell"],
        "number": column.name + name,
        "here": format(here, column.shown),
        "others": f"{format(spread.mean, column.shown)} ± "
        f"{format(spread.deviation, column.shown.replace('+', ''))} ({len(values)})",
        "interval": f"{format(spread.mean - reach, column.shown)} to "
        f"{format(spread.mean + reach, column.shown)}",
        "within": abs(here - spread.mean) <= reach,
    }


def as_text(rows: list[dict[str, Any]], title: str, seed: int) -> str:
    """In Markdown."""
    inside = sum(row["within"] for row in rows)
    lines = [
        f"# {title}: seed {seed} beside the others",
        "",
        f"{inside} of {len(rows)} numbers lie in the interval that holds 95% of new seeds by the"
        " mean and the spread of the others.",
        "",
        "| cell | number | here | mean ± s of the others | 95% of new seeds | within |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['cell']} | {row['number']} | {row['here']} | {row['others']} | {row['interval']} |"
        f" {'yes' if row['within'] else 'no'} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
