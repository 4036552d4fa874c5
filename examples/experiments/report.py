"""The report of an experiment: cells.csv of its cells, tables and a plot of cells.csv alone.

A row of cells.csv is a cell: its values of the axes and its seed, what it cost, what was found, the
flags in which cells differ, when and by which commits. Rows of "another_seed" are in no mean: they
are compared with the others (`write_check`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statistics_of_seeds import T_95, PowerLaw, Spread

from megalong.utils.errors import UserError, counted
from megalong.utils.files import writable_folder
from megalong.utils.progress import clock

if TYPE_CHECKING:
    from grid import Grid

Row = dict[str, str]  # of cells.csv
FAR = 256  # position that the loss at the end of the sequence is compared with
EQUAL = {"tokens": "the same number of training tokens", "flops": "the same executed FLOPs"}


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


# ------------------------------------------------------------------------------ the report


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
