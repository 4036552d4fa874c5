"""Plots of the experiments: means over the seeds, with bars of sample standard deviations."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from measures import (
    Cell,
    beside_the_first,
    between,
    compute_and_loss,
    loss_at_training_length,
    text_of,
)
from statistics_of_seeds import PowerLaw, Spread

Points = list[tuple[float, float]]


def by_context(cells: list[Cell]) -> Figure:
    """Loss by evaluation length, a panel for each training length."""
    figure = lines_by_axis(
        cells, lambda cell: [(t["context"], t["loss"]) for t in cell["evaluation"]["texts"]], True
    )
    return labelled(figure, "evaluation length", "loss (nats per token)")


def by_position(cells: list[Cell]) -> Figure:
    """Loss by position in the window of the training length."""
    figure = lines_by_axis(cells, _positions, True)
    return labelled(figure, "position", "loss (nats per token)")


def by_prompt(cells: list[Cell]) -> Figure:
    """Loss of the same tokens by the length of the prompt before them."""
    figure = lines_by_axis(
        cells, lambda cell: [(p["prompt"], p["loss"]) for p in cell["evaluation"]["prompts"]], True
    )
    return labelled(figure, "tokens of the prompt", "loss of the same tokens (nats)")


def by_compute(cells: list[Cell]) -> Figure:
    """Loss against executed FLOPs, a point a cell, with the power laws."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    first, *_ = cells[0]["axes"]
    series = dict.fromkeys((between(cell), cell["values"][first]) for cell in cells)
    for number, (name, kind) in enumerate(series):
        flops, losses, seeds = compute_and_loss(cells, name, kind)
        color, label = f"C{number}", ", ".join(filter(None, (kind, name)))
        if law := PowerLaw.of(flops, losses, seeds):
            ends = np.array([min(flops), max(flops)])
            axes.plot(ends, law.at(ends), color=color, linewidth=1)
            error = "" if law.exponent_error is None else f" ± {law.exponent_error:.3f}"
            label += f": FLOP^-({law.exponent:.3f}{error})"
        axes.plot(flops, losses, "o", color=color, markersize=4, label=label)
    behind = " behind what all start from" if cells[0]["starts"] else ""
    axes.set(xscale="log", xlabel=f"executed FLOPs{behind}", ylabel="held-out loss (nats)")
    _log_scale(axes)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def of_variants(cells: list[Cell]) -> Figure:
    """The loss of each variant at the training length, minus that of the first with the same seed:
    a point a seed, the best one below."""
    [column] = loss_at_training_length(cells)
    difference = beside_the_first(cells, column)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    found: dict[str, list[float]] = {}
    for cell in cells:
        if (value := difference.value(cell)) is not None:
            found.setdefault(", ".join(cell["values"].values()), []).append(value)
    names = sorted(found, key=lambda name: Spread.of(found[name]).mean)
    for place, name in enumerate(names):
        spread = Spread.of(found[name])
        axes.plot(found[name], [place] * spread.count, "o", color="C0", alpha=0.5, markersize=4)
        axes.errorbar(spread.mean, place, xerr=spread.deviation or 0, fmt="|", color="C0")
    axes.set_yticks(range(len(names)), names)
    first = next(iter(cells[0]["axes"].values()))[0]
    axes.set(xlabel=f"held-out loss minus that of {first} with the same seed (nats)")
    axes.grid(alpha=0.3)
    return figure


def by_distance(cells: list[Cell]) -> Figure:
    """Accuracy by how far back the answer stands, at the training length, a panel a task."""
    tasks = dict.fromkeys(t["task"] for cell in cells for t in cell["evaluation"]["tasks"])
    of_tasks = [
        {
            **cell,
            "values": {**cell["values"], "task": task},
            "evaluation": {"tasks": [t for t in cell["evaluation"]["tasks"] if t["task"] == task]},
        }
        for cell in cells
        for task in tasks
    ]
    figure = labelled(lines_by_axis(of_tasks, _distances), "tokens to look back", "accuracy")
    for axes in figure.axes:
        axes.set_ylim(-0.05, 1.05)
    return figure


PLOTS: dict[str, dict[str, Callable[[list[Cell]], Figure]]] = {
    "perplexity": {"lengths": by_context, "positions": by_position},
    "compute": {"compute": by_compute},
    "prompts": {"prompts": by_prompt},
    "ablation": {"ablation": of_variants},
    "recall": {"distance": by_distance},
}


def lines_by_axis(
    cells: list[Cell], points: Callable[[Cell], Points], by_seed: bool = False
) -> Figure:
    """A line for each value of the axis "attention" (else of the first one), a panel for what the
    others have. points: of a cell. by_seed: bars are of the differences to the first line with the
    same seed, which has none itself."""
    axes = cells[0]["axes"]
    of_lines = "attention" if "attention" in axes else next(iter(axes))
    panels: dict[str, dict[str, dict[int, Points]]] = {}
    for cell in cells:
        panel = ", ".join(f"{k} {v}" for k, v in cell["values"].items() if k != of_lines)
        lines = panels.setdefault(panel, {})
        lines.setdefault(cell["values"][of_lines], {})[cell["seed"]] = points(cell)
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.5 + 3.6 * columns, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    first = axes[of_lines][0]
    for panel, place in zip(panels, grid, strict=False):
        place.set_title(panel, fontsize=10)
        for number, name in enumerate(axes[of_lines]):
            if name in panels[panel]:
                base = panels[panel].get(first, {}) if by_seed else None
                _line(place, name, panels[panel][name], base, f"C{number}")
    for place in grid[len(panels) :]:
        place.remove()
    if by_seed:
        figure.supxlabel(
            f"bars: spread over the seeds of the difference to {first} with the same seed",
            fontsize=8,
        )
    return figure


def labelled(figure: Figure, x: str, y: str) -> Figure:
    for axes in figure.axes:
        axes.set(xlabel=x, ylabel=y)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize=8)
    return figure


def _log_scale(axes: Axes) -> None:
    """Of y, with plain numbers, also between the powers of ten where there is less than one."""
    axes.set_yscale("log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def _line(
    axes: Axes, name: str, of_seeds: dict[int, Points], base: dict[int, Points] | None, color: str
) -> None:
    """base: what bars are differences to, by seed; of the values themselves where None."""
    values: dict[float, list[float]] = {}
    differences: dict[float, list[float]] = {}
    for seed, points in of_seeds.items():
        there = {} if base is None else dict(base.get(seed, ()))
        for x, y in points:
            values.setdefault(x, []).append(y)
            if base is None or x in there:
                differences.setdefault(x, []).append(y - there.get(x, 0.0))
    places = sorted(values)
    means = [Spread.of(values[x]).mean for x in places]
    bars = [Spread.of(differences[x]).deviation or 0.0 if x in differences else 0.0 for x in places]
    axes.errorbar(
        places, means, yerr=bars, fmt="o-", color=color, markersize=3, capsize=2, label=name
    )


def _positions(cell: Cell) -> Points:
    found = text_of(cell, cell["seq_length"])
    if found is None:
        return []
    pairs = zip(pairwise(found["position_edges"]), found["loss_by_position"], strict=True)
    return [((a + b) / 2, loss) for (a, b), loss in pairs if loss is not None]


def _distances(cell: Cell) -> Points:
    found = [t for t in cell["evaluation"]["tasks"] if t["length"] == cell["seq_length"]]
    if not found:
        return []
    pairs = zip(pairwise(found[0]["distance_edges"]), found[0]["accuracy_by_distance"], strict=True)
    return [((a + b) / 2, share) for (a, b), share in pairs if share is not None]
