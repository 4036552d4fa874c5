"""Whether cells with a seed of their own lie where those of the report would have them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from measures import MEASURES, Cell, Column, beside_the_first
from report import asked, of_newest_grid, read_cells, shown, trained
from statistics_of_seeds import Spread

from megalong.utils.errors import UserError

# Two-sided 95% quantiles of Student's t by degrees of freedom (any table of it has them).
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


def check_others(folder: Path, values: list[dict[str, str]], seed: int, corpus: str | None) -> None:
    """Raise UserError where there are no cells in an experiment's folder to compare with, two with
    the same values as one of those to be run, where these read another corpus than this (digest),
    or where one of them has this seed."""
    cells = [cell for cell in read_cells(folder / "cells") if cell["complete"]]
    if cells and not any(cell["corpus"] == corpus for cell in cells):
        raise UserError(
            f"{folder / 'cells'}: these read another corpus than that of --corpus, so that nothing"
            " can be compared: corpus.json must be that of examples/experiments/results/corpus_cpu,"
            " of the same packages, or run the whole grid on yours"
        )
    there = [cell["values"] for cell in cells]
    if not any(there.count(each) > 1 for each in values):
        raise UserError(
            f"{folder}: has not two of these cells with other seeds to compare with: run"
            f" the grid first, or copy examples/experiments/results/{folder.name}/cells into it"
        )
    if any(cell["seed"] == seed and cell["values"] in values for cell in cells):
        raise UserError(f"--check-seed {seed}: {folder / 'cells'} has that seed: take another")


def write_check(folder: Path, seed: int) -> str:
    """Writes another_seed.md in an experiment's folder, of what its `cells` and `another_seed`
    have, and returns it. Raises UserError where there is nothing to compare."""
    there = read_cells(folder / "cells")
    others = [cell for cell in of_newest_grid(there)[0] if cell["complete"]] if there else []
    others = [cell for cell in others if cell["seed"] != seed]
    new = [
        cell
        for cell in read_cells(folder / "another_seed")
        if cell["complete"] and cell["seed"] == seed
    ]
    alike = {cell["cell"]: like(cell, others) for cell in new}
    of_others = [name for name, cells in alike.items() if len(cells) < 2]
    new = [cell for cell in new if cell["cell"] not in of_others]
    rows = [row for cell in new for row in compared(cell, alike[cell["cell"]], others, new)]
    if not rows:
        raise UserError(
            f"{folder}: no cell of seed {seed} has two of other seeds beside it that were trained"
            " and evaluated as it was"
        )
    text = as_text(rows, others[0]["title"], seed, of_others)
    (folder / "another_seed.md").write_text(text)
    return text


def like(cell: Cell, others: list[Cell]) -> list[Cell]:
    """Those that differ from it in their seed alone."""
    return [
        other
        for other in others
        if other["values"] == cell["values"]
        and asked(other) == asked(cell)
        and trained(other) == trained(cell)
    ]


def compared(
    cell: Cell, alike: list[Cell], others: list[Cell], new: list[Cell]
) -> list[dict[str, Any]]:
    """A row for each number of the cell; where the first value of the first axis has been run with
    its seed, too, also for the differences to that. alike: its like among the `others`, of other
    seeds. new: of its seed."""
    measure = MEASURES[cell["measure"]]
    columns = [("", column) for column in measure.columns(alike)]
    axis, (first, *_) = next(iter(cell["axes"].items()))
    columns += [
        (f", minus that of {first}", beside_the_first([*others, *new], column))
        for column in measure.compared(alike)
        if cell["values"][axis] != first
    ]
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
    t = T_95[min(len(values) - 1, len(T_95)) - 1]
    reach = t * spread.deviation * math.sqrt(1 + 1 / len(values))
    return {
        "cell": cell["cell"],
        "number": column.name + name,
        "here": format(here, column.shown),
        "others": f"{shown(spread._asdict(), column.shown)} ({spread.count})",
        "interval": f"{format(spread.mean - reach, column.shown)} to "
        f"{format(spread.mean + reach, column.shown)}",
        "within": abs(here - spread.mean) <= reach,
    }


def as_text(rows: list[dict[str, Any]], title: str, seed: int, of_others: list[str]) -> str:
    """In Markdown. of_others: cells that nothing is to be compared with."""
    inside = sum(row["within"] for row in rows)
    lines = [
        f"# {title}: seed {seed} beside the others",
        "",
        f"{inside} of {len(rows)} numbers lie in the interval that holds 95% of new seeds by the"
        " mean and the spread of the others. By three seeds it is five deviations wide on either"
        ' side, so that "no" says more than "yes"; numbers of one cell go together.',
        "",
    ]
    if of_others:
        names = ", ".join(of_others)
        lines += [f"Trained or evaluated otherwise than the others, and not here: {names}.", ""]
    lines += [
        "| cell | number | here | mean ± s of the others | 95% of new seeds | within |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['cell']} | {row['number']} | {row['here']} | {row['others']} | {row['interval']} |"
        f" {'yes' if row['within'] else 'no'} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
