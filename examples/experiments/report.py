"""An experiment's table and plots, of its cells' JSON alone."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

from measures import (
    MEASURES,
    Cell,
    Column,
    beside_the_first,
    between,
    compute_and_loss,
)
from plots import PLOTS
from statistics_of_seeds import PowerLaw, Spread

from megalong.utils.errors import UserError, counted
from megalong.utils.files import writable_folder
from megalong.utils.progress import clock


def read_cells(folder: Path) -> list[Cell]:
    """The cells that have been run, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def of_newest_grid(cells: list[Cell]) -> tuple[list[Cell], list[str]]:
    """The cells that can stand in one table, with the axes that the grid has by now, and the names
    of the others: those of other axes, of values that the grid has no more, or of seeds that were
    trained otherwise than the newest of their row."""
    newest = max(cells, key=lambda cell: cell["date"])
    axes = newest["axes"]
    alike = [
        {**cell, "axes": axes}
        for cell in cells
        if asked(cell) == asked(newest)
        and all(cell["values"][axis] in names for axis, names in axes.items())
    ]
    kept = []
    for group in groups(alike):
        like = trained(max(group, key=lambda cell: cell["date"]))
        kept += [cell for cell in group if trained(cell) == like]
    names = {cell["cell"] for cell in kept}
    return kept, [cell["cell"] for cell in cells if cell["cell"] not in names]


def asked(cell: Cell) -> tuple:
    """What is alike in all cells of a table."""
    return list(cell["axes"]), cell["corpus"], cell["evaluate"]


def trained(cell: Cell) -> tuple:
    """What is alike in cells that differ in their seed alone."""
    flags = {name: value for name, value in cell["flags"].items() if name != "seed"}
    starts = [
        ({**start["flags"], "seed": None}, start["stages"], start["data"], start["tokens"])
        for start in cell["starts"]
    ]
    return flags, cell["stages"], cell["data"], cell["iterations"], cell["processes"], starts


def write_report(folder: Path) -> None:
    """Writes report.json, report.md and plots beside `cells`. Raises UserError where there is no
    complete cell."""
    cells, others = of_newest_grid(read_cells(folder / "cells"))
    complete = [cell for cell in cells if cell["complete"]]
    if not complete:
        raise UserError(f"{folder}: no cell is complete: give run.py more --minutes")
    writable_folder("--output", folder)
    found = {**summary(cells, complete), "of_other_settings": others}
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "report.md").write_text(as_text(found))
    in_order = list(chain.from_iterable(groups(complete)))
    for name, plot in PLOTS[complete[0]["measure"]].items():
        plot(in_order).savefig(folder / f"{name}.png", dpi=110)


def summary(cells: list[Cell], complete: list[Cell]) -> dict[str, Any]:
    """All numbers of a report."""
    first = complete[0]
    laws = fits(complete) if first["measure"] == "compute" else {}
    equal_loss = {name: at_equal_loss(some) for name, some in laws.items()}
    measure = MEASURES[first["measure"]]
    columns = measure.columns(complete)
    return {
        **{key: first[key] for key in ("experiment", "scale", "title", "question", "measure")},
        "equal": first["equal"],
        "axes": list(first["axes"]),
        "rows": [row(group, columns) for group in groups(complete)],
        "one_start": one_start(complete),
        "formats": {column.name: column.shown for column in columns},
        "beside_the_first": differences(complete, measure.compared(complete)),
        "fits": {
            name: {kind: law and law._asdict() for kind, law in some.items()}
            for name, some in laws.items()
        },
        "at_equal_loss": {name: found for name, found in equal_loss.items() if found},
        "cut": {
            cell["cell"]: (
                f"{cell['iterations_done']} of {cell['iterations']} iterations"
                if cell["iterations_done"] < cell["iterations"]
                else "in the evaluation"
            )
            for cell in cells
            if not cell["complete"]
        },
        "seconds": seconds(cells),
        "ran_on": distinct(cells, "machine"),
        "processes": distinct(cells, "processes"),
        "versions": distinct(cells, "versions"),
        "commits": sorted(
            {
                str(commit)
                for cell in cells
                for commit in (*cell["trained_by_commits"], cell["commit"])
            }
        ),
        "dates": sorted({cell["date"][:10] for cell in cells}),
    }


def groups(cells: list[Cell]) -> list[list[Cell]]:
    """Cells that differ in their seed alone, in the order of the axes' values."""
    axes = cells[0]["axes"]
    found: dict[tuple, list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple(cell["values"].values()), []).append(cell)
    places = [list(values) for values in axes.values()]

    def place(names: tuple) -> list[int]:
        return [values.index(name) for values, name in zip(places, names, strict=True)]

    return [
        sorted(found[names], key=lambda cell: cell["seed"]) for names in sorted(found, key=place)
    ]


def row(group: list[Cell], columns: list[Column]) -> dict[str, Any]:
    """Of cells with other seeds: what they cost, and mean and spread of each column."""
    first = group[0]
    return {
        "values": first["values"],
        "seeds": [cell["seed"] for cell in group],
        "parameters": first["parameters"],
        "tokens": first["tokens"],
        "flops": sum(first["flops"].values()),
        "attention_flops": first["flops"]["attention"],
        "starts": [
            {
                "tokens": start["tokens"],
                "flops": sum(start["flops"].values()),
                "of": "text" if start["data"] is None else "recall tasks",
                "seq_length": start["seq_length"],
                "attention": start["attention"],
            }
            for start in first["starts"]
        ],
        "numbers": spreads(group, columns),
    }


def differences(cells: list[Cell], compared: list[Column]) -> dict[str, Any] | None:
    """What each row is more than that of the first axis' first value, seed by seed. None where
    there is nothing to compare."""
    axis, names = next(iter(cells[0]["axes"].items()))
    columns = [beside_the_first(cells, column) for column in compared]
    if not columns:
        return None
    rows = [
        {
            "values": group[0]["values"],
            "pairs": sum(columns[0].value(cell) is not None for cell in group),
            "numbers": spreads(group, columns),
        }
        for group in groups(cells)
        if group[0]["values"][axis] != names[0]
    ]
    if not rows:
        return None
    return {
        "first": names[0],
        "formats": {column.name: column.shown for column in columns},
        "rows": rows,
    }


def spreads(group: list[Cell], columns: list[Column]) -> dict[str, dict | None]:
    """Of cells with other seeds, mean and spread of each column; None where it has no value."""
    found = {}
    for column in columns:
        values = [value for cell in group if (value := column.value(cell)) is not None]
        found[column.name] = Spread.of(values)._asdict() if values else None
    return found


def fits(cells: list[Cell]) -> dict[str, dict[str, PowerLaw | None]]:
    """The power laws of loss in compute, over the values of the last axis and all seeds: by the
    values of the axes between the first and the last, and by those of the first."""
    found: dict[str, dict[str, PowerLaw | None]] = {}
    first, *_ = cells[0]["axes"]
    for cell in chain.from_iterable(groups(cells)):
        of = found.setdefault(between(cell), {})
        of.setdefault(cell["values"][first], None)
    for name, laws in found.items():
        for kind in laws:
            laws[kind] = PowerLaw.of(*compute_and_loss(cells, name, kind))
    return found


def one_start(cells: list[Cell]) -> bool:
    """Whether all cells of a seed start from the same weights."""
    found: dict[int, set[str]] = {}
    for cell in cells:
        last = cell["starts"][-1]["settings"] if cell["starts"] else ""
        found.setdefault(cell["seed"], set()).add(last)
    return all(len(each) == 1 for each in found.values())


def commits(cell: Cell) -> list[str | None]:
    """Of the code that has trained and evaluated it."""
    return [*cell["trained_by_commits"], cell["commit"]]


def seconds(cells: list[Cell]) -> float:
    """That all of it took, what several cells start from once."""
    starts = {start["settings"]: start["seconds"] for cell in cells for start in cell["starts"]}
    own = (sum(cell["seconds"].values()) for cell in cells)
    return round(sum(own) + sum(starts.values()), 1)


def at_equal_loss(laws: dict[str, PowerLaw | None]) -> dict[str, Any] | None:
    """By the power laws, the FLOPs of each for the lowest loss that all reach where they were
    measured, and their standard error as a share; None for one whose measurements end before.
    times: of the FLOPs of the first, seed by seed, geometric mean and the deviation as a share.
    None where there are not several laws, or one does not fall."""
    if len(laws) < 2 or not all(law and law.exponent > 0 for law in laws.values()):
        return None
    loss = max(law.at(law.highest) for law in laws.values())
    first, *rest = laws
    times = {name: laws[name].compute_beside(laws[first], loss) for name in rest}
    return {
        "loss": loss,
        "flops": {name: law.compute_for(loss) for name, law in laws.items()},
        "least": {name: law.lowest for name, law in laws.items()},
        "times": {
            name: spread
            and [math.exp(spread.mean), spread.deviation and math.expm1(spread.deviation)]
            for name, spread in times.items()
        },
    }


def distinct(cells: list[Cell], key: str) -> list[Any]:
    """The values that there are, each once."""
    found = []
    for cell in cells:
        if cell[key] not in found:
            found.append(cell[key])
    return found


def as_text(found: dict[str, Any]) -> str:
    """A report in Markdown."""
    equal = {"tokens": "the same number of training tokens", "flops": "the same executed FLOPs"}
    lines = [f"# {found['title']}", "", found["question"], ""]
    lines += [
        f"Equal in all rows with the same budget: {equal[found['equal']]}; both are in the table."
        " FLOPs are executed ones. Means and sample standard deviations"
        " over the seeds.",
        "",
    ]
    lines += starts_in_words(found["rows"], found["one_start"])
    columns = list(found["formats"])
    header = [*found["axes"], "parameters", "tokens", "TFLOP", "of it attention", *columns, "seeds"]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for line in found["rows"]:
        cells = [
            *line["values"].values(),
            f"{line['parameters'] / 1e6:.2f} M",
            f"{line['tokens'] / 1e6:.2f} M",
            f"{line['flops'] / 1e12:,.1f}",
            f"{line['attention_flops'] / line['flops']:.0%}",
            *(shown(line["numbers"][name], found["formats"][name]) for name in columns),
            str(len(line["seeds"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if found["beside_the_first"]:
        lines += ["", *differences_in_words(found["beside_the_first"], found["axes"])]
    for name, laws in found["fits"].items():
        for kind, law in laws.items():
            lines += ["", f"{', '.join(filter(None, (kind, name)))}: {law_in_words(law)}"]
    for name, equal_loss in found["at_equal_loss"].items():
        lines += ["", f"{name}: ".removeprefix(": ") + equal_loss_in_words(equal_loss)]
    if found["cut"]:
        lines += ["", "Cut, being longer than their minutes, and in no mean:"]
        lines += [f"- {name}: {what}" for name, what in found["cut"].items()]
    if found["of_other_settings"]:
        names = ", ".join(found["of_other_settings"])
        lines += ["", f"Of other settings than the grid has now, and in no mean: {names}."]
    lines += ["", *ran(found)]
    return "\n".join(lines) + "\n"


def starts_in_words(rows: list[dict], one_start: bool) -> list[str]:
    """What came before all of these trainings, and is not in their tokens and FLOPs."""
    if not any(row["starts"] for row in rows):
        return []
    trained = [
        ", then ".join(
            f"{start['tokens'] / 1e6:.2f} M tokens of {start['of']} at {start['seq_length']:,} with"
            f" {' and '.join(start['attention'])} attention ({start['flops'] / 1e12:,.1f} TFLOP)"
            for start in row["starts"]
        )
        or "nothing"
        for row in rows
    ]
    apart = "Tokens and FLOPs of the table come behind these."
    if one_start:
        return [f"All rows of a seed start from the same weights: {trained[0]}. {apart}", ""]
    lines = [f"Rows start from weights that were trained on other tokens before. {apart}", ""]
    lines += [
        f"- {' '.join(row['values'].values())}: {words}"
        for row, words in zip(rows, trained, strict=True)
    ]
    return [*lines, ""]


def differences_in_words(found: dict[str, Any], axes: list[str]) -> list[str]:
    """The second table."""
    columns = list(found["formats"])
    lines = [
        f"Loss minus that of {found['first']} with the same seed (below 0 is better), mean and"
        " sample standard deviation of these differences:",
        "",
        f"| {' | '.join([*axes, *columns, 'seeds'])} |",
        f"|{'---|' * len([*axes, *columns, 'seeds'])}",
    ]
    for line in found["rows"]:
        numbers = (shown(line["numbers"][name], found["formats"][name]) for name in columns)
        cells = [*line["values"].values(), *numbers, str(line["pairs"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def equal_loss_in_words(found: dict[str, Any]) -> str:
    """One paragraph."""
    parts = []
    for name, flops in found["flops"].items():
        if flops is None:
            least = found["least"][name] / 1e12
            parts.append(f"{name} less than {least:,.2f} TFLOP, the least measured")
            continue
        value, error = flops
        parts.append(f"{name} {value / 1e12:,.2f} TFLOP" + (f" ± {error:.0%}" if error else ""))
    text = f"For a loss of {found['loss']:.3f}, by these laws: {'; '.join(parts)}"
    if any(flops and flops[1] for flops in found["flops"].values()):
        text += " (standard errors of the laws, for these seeds)"
    text += "."
    first = next(iter(found["flops"]))
    for name, times in found["times"].items():
        if times is not None:
            mean, deviation = times
            error = "" if deviation is None else f" ± {deviation:.0%}, its deviation over the seeds"
            text += f" {name}: {mean:.2f} times the FLOPs of {first}{error}."
    return text


def shown(number: dict | None, how: str) -> str:
    """Mean ± spread."""
    if number is None:
        return ""
    text = format(number["mean"], how)
    if number["deviation"] is None:
        return text
    return f"{text} ± {format(number['deviation'], how.replace('+', ''))}"


def law_in_words(law: dict | None) -> str:
    if law is None:
        return "one amount of compute, no power law"
    text = (
        f"loss = {law['scale']:.4g} · FLOP^-{law['exponent']:.4f}, with the mean of"
        " the seeds' scales"
    )
    if law["exponent_error"] is not None:
        text += (
            f", exponent ± {law['exponent_error']:.4f} (standard error), points off the line by"
            f" {law['scatter']:.2%}"
        )
    return f"{text}; {law['points']} points"


def ran(found: dict[str, Any]) -> list[str]:
    """On what, when, of which commit."""
    machines = "; ".join(
        f"{m['device'] or m['processor']}, {counted(m['processors'], 'processor')}"
        for m in found["ran_on"]
    )
    versions = "; ".join(
        ", ".join(f"{name} {number}" for name, number in some.items()) for some in found["versions"]
    )
    commits = ", ".join(map(str, found["commits"]))
    return [
        f"Ran on {machines}; {', '.join(found['dates'])}; commit {commits}; {versions};"
        f" {clock(found['seconds'])} in all."
    ]
