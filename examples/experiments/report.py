"""The report of an experiment: tables and a plot of its cells.csv alone, and what a seed that is
not in it says beside the others."""

from __future__ import annotations

import io
import math
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statistics_of_seeds import T_95, PowerLaw, Spread
from table import MEASURES, Column, Row, beside_the_first, groups, of_grid, table_of

from megalong.utils.errors import UserError
from megalong.utils.files import writable_folder
from megalong.utils.progress import clock

if TYPE_CHECKING:
    from grid import Grid

EQUAL = {"tokens": "the same number of training tokens", "flops": "the same executed FLOPs"}


def write_report(folder: Path, grid: Grid) -> None:
    """Write cells.csv, report.md and a plot. Raise UserError where no cell is complete."""
    from plots import PLOTS

    rows = [row for row in table_of(folder) if row["kind"] == "cells"]
    kept, others = of_grid(rows, grid.axes)
    complete = list(chain.from_iterable(groups([row for row in kept if not row["cut"]], grid.axes)))
    if not complete:
        raise UserError(f"{folder}: no cell is complete: give run.py more --minutes")
    writable_folder("--output", folder)
    (folder / "report.md").write_text(as_text(kept, complete, others, grid))
    name, plot = PLOTS[grid.measure]
    save(plot(complete, grid.axes), folder / f"{name}.png")


def save(figure: Any, path: Path) -> None:
    """Write a small file: few colours, in a palette."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=min(80, 1000 / figure.get_figwidth()))
    image = Image.open(buffer).convert("RGB")
    image.quantize(48, dither=Image.Dither.NONE).save(path, optimize=True)


def as_text(kept: list[Row], complete: list[Row], others: list[str], grid: Grid) -> str:
    axes = list(grid.axes)
    columns_of, compared_of = MEASURES[grid.measure]
    columns, grouped = columns_of(complete), groups(complete, grid.axes)
    lines = [f"# {grid.title}", "", grid.question, ""]
    lines += [
        f"Equal in all rows with the same budget: {EQUAL[grid.equal]}; both are in the table."
        " FLOPs are executed ones. Means and sample standard deviations over the seeds.",
        "",
    ]
    lines += starts_in_words(grouped, axes)
    names = [column.name for column in columns]
    body = []
    for group in grouped:
        row = group[0]
        flops = int(row["flops"])
        body.append(
            [
                *(row[axis] for axis in axes),
                f"{int(row['parameters']) / 1e6:.2f} M",
                f"{int(row['tokens']) / 1e6:.2f} M",
                f"{flops / 1e12:,.1f}",
                f"{int(row['attention_flops']) / flops:.0%}",
                *(shown(spread_of(group, column), column.shown) for column in columns),
                str(len(group)),
            ]
        )
    costs = ["parameters", "tokens", "TFLOP", "of it attention"]
    lines += markdown([*axes, *costs, *names, "seeds"], body)
    axis, (first, *_) = next(iter(grid.axes.items()))
    compared = [beside_the_first(complete, grid.axes, c) for c in compared_of(complete)]
    if compared and (rest := [group for group in grouped if group[0][axis] != first]):
        lines += [
            "",
            f"Loss minus that of {first} with the same seed (below 0 is better), mean and sample"
            " standard deviation of these differences:",
            "",
        ]
        body = [
            [
                *(group[0][name] for name in axes),
                *(shown(spread_of(group, column), column.shown) for column in compared),
                str(sum(compared[0].value(row) is not None for row in group)),
            ]
            for group in rest
        ]
        lines += markdown([*axes, *(column.name for column in compared), "seeds"], body)
    if grid.measure == "compute":
        lines += laws_in_words(laws_of(complete, grid.axes))
    if cut := [row for row in kept if row["cut"]]:
        lines += ["", "Cut, being longer than their minutes, and in no mean:"]
        lines += [f"- {row['cell']}: {row['cut']}" for row in cut]
    if others:
        lines += [
            "",
            f"Of other settings than the grid has now, and in no mean: {', '.join(others)}.",
        ]
    return "\n".join([*lines, "", ran(kept)]) + "\n"


def markdown(header: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"] + [
        f"| {' | '.join(cells)} |" for cells in body
    ]


def spread_of(rows: list[Row], column: Column) -> Spread | None:
    values = [value for row in rows if (value := column.value(row)) is not None]
    return Spread.of(values) if values else None


def shown(spread: Spread | None, how: str) -> str:
    if spread is None:
        return ""
    text = format(spread.mean, how)
    if spread.deviation is None:
        return text
    return f"{text} ± {format(spread.deviation, how.replace('+', ''))}"


def starts_in_words(grouped: list[list[Row]], axes: list[str]) -> list[str]:
    """Return what came before all of these trainings, and is not in their tokens and FLOPs."""
    if not any(group[0]["before"] for group in grouped):
        return []
    apart = "Tokens and FLOPs of the table come behind these."
    of_seeds: dict[str, set[str]] = {}
    for row in chain.from_iterable(grouped):
        last = row["starts"].split()[-1].partition(":")[0] if row["starts"] else ""
        of_seeds.setdefault(row["seed"], set()).add(last)
    if all(len(each) == 1 for each in of_seeds.values()):
        before = grouped[0][0]["before"]
        return [f"All rows of a seed start from the same weights: {before}. {apart}", ""]
    lines = [f"Rows start from weights that were trained on other tokens before. {apart}", ""]
    for first, *_ in grouped:
        lines.append(f"- {' '.join(first[axis] for axis in axes)}: {first['before'] or 'nothing'}")
    return [*lines, ""]


def between(row: Row, axes: dict[str, list[str]]) -> str:
    """Return a row's values of the axes between the first and the last that have several."""
    return ", ".join(row[axis] for axis, names in list(axes.items())[1:-1] if len(names) > 1)


def compute_and_loss(rows: list[Row]) -> tuple[list[int], list[float], list[int]]:
    """Return executed FLOPs, loss and seed of each row that has a loss."""
    rows = [row for row in rows if row["loss"]]
    losses = [float(row["loss"]) for row in rows]
    return [int(row["flops"]) for row in rows], losses, [int(row["seed"]) for row in rows]


def laws_of(rows: list[Row], axes: dict[str, list[str]]) -> dict[str, dict[str, PowerLaw | None]]:
    """Return the power laws of loss in compute, over the values of the last axis and all seeds: by
    the values of the axes between the first and the last, and by those of the first."""
    series: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        kind = row[next(iter(axes))]
        series.setdefault(between(row, axes), {}).setdefault(kind, []).append(row)
    return {
        name: {kind: PowerLaw.of(*compute_and_loss(some)) for kind, some in kinds.items()}
        for name, kinds in series.items()
    }


def laws_in_words(found: dict[str, dict[str, PowerLaw | None]]) -> list[str]:
    lines = []
    for name, laws in found.items():
        for kind, law in laws.items():
            lines += ["", f"{', '.join(filter(None, (kind, name)))}: {law_in_words(law)}"]
    for name, laws in found.items():
        if len(laws) > 1 and all(law and law.exponent > 0 for law in laws.values()):
            lines += ["", f"{name}: ".removeprefix(": ") + at_equal_loss(laws)]
    return lines


def law_in_words(law: PowerLaw | None) -> str:
    if law is None:
        return "one amount of compute, no power law"
    text = f"loss = {law.scale:.4g} · FLOP^-{law.exponent:.4f}, with the mean of the seeds' scales"
    if law.exponent_error is not None:
        text += f", exponent ± {law.exponent_error:.4f} (standard error)"
        text += f", points off the line by {law.scatter:.2%}"
    return f"{text}; {law.points} points"


def at_equal_loss(laws: dict[str, PowerLaw]) -> str:
    """Return, by the power laws, the FLOPs of each for the lowest loss that all reach where they
    were measured; and as multiples of those of the first, seed by seed, geometric mean and the
    deviation as a share."""
    loss = max(law.at(law.highest) for law in laws.values())
    parts, errors = [], False
    for name, law in laws.items():
        if (found := law.compute_for(loss)) is None:
            parts.append(f"{name} less than {law.lowest / 1e12:,.2f} TFLOP, the least measured")
            continue
        errors |= bool(found[1])
        parts.append(
            f"{name} {found[0] / 1e12:,.2f} TFLOP" + (f" ± {found[1]:.0%}" if found[1] else "")
        )
    text = f"For a loss of {loss:.3f}, by these laws: {'; '.join(parts)}"
    text += " (standard errors of the laws, for these seeds)." if errors else "."
    first, *rest = laws
    for name in rest:
        if times := laws[name].compute_beside(laws[first], loss):
            text += f" {name}: {math.exp(times.mean):.2f} times the FLOPs of {first}"
            if times.deviation is not None:
                text += f" ± {math.expm1(times.deviation):.0%}, its deviation over the seeds"
            text += "."
    return text


def ran(rows: list[Row]) -> str:
    """Return on what, when, of which commit."""
    dates = ", ".join(sorted({row["date"][:10] for row in rows}))
    commits = ", ".join(sorted({commit for row in rows for commit in row["commits"].split()}))
    starts = dict(start.split(":") for row in rows for start in row["starts"].split())
    seconds = sum(float(row["seconds"]) for row in rows) + sum(map(float, starts.values()))
    machines, versions = (
        "; ".join(dict.fromkeys(row[name] for row in rows)) for name in ("machine", "versions")
    )
    took = clock(round(seconds, 1))
    return f"Ran on {machines}; {dates}; commit {commits}; {versions}; {took} in all."


# ------------------------------------------------------------------------------ another seed


def check_others(folder: Path, values: list[dict[str, str]], seed: int, corpus: str | None) -> None:
    """Raise UserError where an experiment's folder has not two cells to compare one of `values`
    with, where they read another corpus than this (digest), or have this seed."""
    rows = [row for row in table_of(folder) if row["kind"] == "cells" and not row["cut"]]
    if rows and not any(row["corpus"] == (corpus or "") for row in rows):
        raise UserError(
            f"{folder}: its cells read another corpus than that of --corpus, so that nothing can be"
            " compared: corpus.json must be that of examples/experiments/results/corpus_cpu, of the"
            " same packages, or run the whole grid on yours"
        )
    there = [{axis: row.get(axis) for axis in values[0]} for row in rows]
    if not any(there.count(each) > 1 for each in values):
        raise UserError(
            f"{folder}: has not two of these cells with other seeds to compare with: run the grid"
            f" first, or copy examples/experiments/results/{folder.name}/cells.csv into it"
        )
    seeds = zip(rows, there, strict=True)
    if any(row["seed"] == str(seed) and value in values for row, value in seeds):
        raise UserError(f"--check-seed {seed}: {folder} has a cell of that seed: take another")


def write_check(folder: Path, grid: Grid, seed: int) -> str:
    """Write another_seed.md in an experiment's folder, and return it. Raise UserError where there
    is nothing to compare."""
    complete = [row for row in table_of(folder) if not row["cut"]]
    others, _ = of_grid([row for row in complete if row["kind"] == "cells"], grid.axes)
    others = [row for row in others if row["seed"] != str(seed)]
    new = [row for row in complete if (row["kind"], row["seed"]) == ("another_seed", str(seed))]
    same = (*grid.axes, "asked", "trained")
    alike = {
        row["cell"]: [other for other in others if all(other[n] == row.get(n) for n in same)]
        for row in new
    }
    apart = [name for name, rows in alike.items() if len(rows) < 2]
    new = [row for row in new if row["cell"] not in apart]
    body = [line for row in new for line in compared(row, alike[row["cell"]], others, new, grid)]
    if not body:
        raise UserError(
            f"{folder}: no cell of seed {seed} has two of other seeds beside it that were trained"
            " and evaluated as it was"
        )
    inside = sum(line[-1] == "yes" for line in body)
    lines = [
        f"# {grid.title}: seed {seed} beside the others",
        "",
        f"{inside} of {len(body)} numbers lie in the interval that holds 95% of new seeds by the"
        " mean and the spread of the others. By three seeds it is five deviations wide on either"
        ' side, so that "no" says more than "yes"; numbers of one cell go together.',
        "",
    ]
    if apart:
        names = ", ".join(apart)
        lines += [f"Trained or evaluated otherwise than the others, and not here: {names}.", ""]
    header = ["cell", "number", "here", "mean ± s of the others", "95% of new seeds", "within"]
    text = "\n".join([*lines, *markdown(header, body)]) + "\n"
    (folder / "another_seed.md").write_text(text)
    return text


def compared(
    row: Row, alike: list[Row], others: list[Row], new: list[Row], grid: Grid
) -> list[list[str]]:
    """Return a line for each number of a cell and, where the first value of the first axis has been
    run with its seed too, of the differences to that. The interval holds 95% of new seeds, if they
    are normally distributed: mean ± t · s · √(1 + 1/n)."""
    columns_of, compared_of = MEASURES[grid.measure]
    columns = [("", column) for column in columns_of(alike)]
    axis, (first, *_) = next(iter(grid.axes.items()))
    if row[axis] != first:
        columns += [
            (f", minus that of {first}", beside_the_first([*others, *new], grid.axes, column))
            for column in compared_of(alike)
        ]
    found = []
    for name, column in columns:
        here, spread = column.value(row), spread_of(alike, column)
        if here is None or spread is None or spread.count < 2:
            continue
        t = T_95[min(spread.count - 1, len(T_95)) - 1]
        reach = t * spread.deviation * math.sqrt(1 + 1 / spread.count)
        low, high = (format(spread.mean + way * reach, column.shown) for way in (-1, 1))
        found.append(
            [
                row["cell"],
                column.name + name,
                format(here, column.shown),
                f"{shown(spread, column.shown)} ({spread.count})",
                f"{low} to {high}",
                "yes" if abs(here - spread.mean) <= reach else "no",
            ]
        )
    return found
