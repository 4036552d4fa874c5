"""Plots of the experiments: means over the seeds, with bars of sample standard deviations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from report import between, compute_and_loss, laws_of
from statistics_of_seeds import Spread
from table import Row, beside_the_first, loss, number, numbered, places

Axes = dict[str, list[str]]  # of a grid
Points = list[tuple[float, float]]


def by_position(rows: list[Row], axes: Axes) -> Figure:
    """Loss by position in the window of the training length."""
    figure = lines_by_axis(rows, axes, lambda row: middles(row, "loss in"), True)
    return labelled(figure, "position", "loss (nats per token)")


def by_prompt(rows: list[Row], axes: Axes) -> Figure:
    """Loss of the same tokens by the length of the prompt before them."""
    columns = numbered(rows, "loss behind ")

    def points(row: Row) -> Points:
        return [(n, number(row, column)) for column, n in columns if row[column]]

    figure = lines_by_axis(rows, axes, points, True)
    return labelled(figure, "tokens of the prompt", "loss of the same tokens (nats)")


def by_compute(rows: list[Row], axes: Axes) -> Figure:
    """Loss against executed FLOPs, a point a cell, with the power laws."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    plot = figure.subplots()
    first = next(iter(axes))
    for name, laws in laws_of(rows, axes).items():
        for kind, law in laws.items():
            some = [row for row in rows if (between(row, axes), row[first]) == (name, kind)]
            flops, losses, _ = compute_and_loss(some)
            color, label = f"C{len(plot.containers)}", ", ".join(filter(None, (kind, name)))
            if law:
                ends = np.array([min(flops), max(flops)])
                plot.plot(ends, law.at(ends), color=color, linewidth=1)
                error = "" if law.exponent_error is None else f" ± {law.exponent_error:.3f}"
                label += f": FLOP^-({law.exponent:.3f}{error})"
            plot.errorbar(flops, losses, fmt="o", color=color, markersize=4, label=label)
    behind = " behind what all start from" if rows[0]["starts"] else ""
    plot.set(xscale="log", xlabel=f"executed FLOPs{behind}", ylabel="held-out loss (nats)")
    plot.set_yscale("log")  # with plain numbers, also where there is less than a power of ten
    for set_formatter in (plot.yaxis.set_major_formatter, plot.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    plot.grid(alpha=0.3, which="both")
    plot.legend(fontsize=8)
    return figure


def of_variants(rows: list[Row], axes: Axes) -> Figure:
    """The loss of each variant at the training length, minus that of the first with the same seed:
    a point a seed, the best one below."""
    [column] = loss(rows)
    difference = beside_the_first(rows, axes, column)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    plot = figure.subplots()
    found: dict[str, list[float]] = {}
    for row in rows:
        if (value := difference.value(row)) is not None:
            found.setdefault(", ".join(row[axis] for axis in axes), []).append(value)
    names = sorted(found, key=lambda name: Spread.of(found[name]).mean)
    for place, name in enumerate(names):
        spread = Spread.of(found[name])
        plot.plot(found[name], [place] * spread.count, "o", color="C0", alpha=0.5, markersize=4)
        plot.errorbar(spread.mean, place, xerr=spread.deviation or 0, fmt="|", color="C0")
    plot.set_yticks(range(len(names)), names)
    first = next(iter(axes.values()))[0]
    plot.set(xlabel=f"held-out loss minus that of {first} with the same seed (nats)")
    plot.grid(alpha=0.3)
    return figure


def by_distance(rows: list[Row], axes: Axes) -> Figure:
    """Accuracy by how far back the answer stands, at the training length, a panel a task."""
    tasks = dict.fromkeys(c.partition(" back ")[0] for c in rows[0] if " back " in c)
    of_tasks = [{**row, "task": task} for row in rows for task in tasks]
    figure = lines_by_axis(
        of_tasks, {**axes, "task": list(tasks)}, lambda row: middles(row, f"{row['task']} back")
    )
    labelled(figure, "tokens to look back", "accuracy")
    for plot in figure.axes:
        plot.set_ylim(-0.05, 1.05)
    return figure


PLOTS: dict[str, tuple[str, Callable[[list[Row], Axes], Figure]]] = {
    "perplexity": ("positions", by_position),
    "compute": ("compute", by_compute),
    "prompts": ("prompts", by_prompt),
    "ablation": ("ablation", of_variants),
    "recall": ("distance", by_distance),
}


def middles(row: Row, name: str) -> Points:
    return [((a + b) / 2, value) for a, b, value in places(row, name)]


def lines_by_axis(
    rows: list[Row], axes: Axes, points: Callable[[Row], Points], by_seed: bool = False
) -> Figure:
    """Draw a line for each value of the axis "attention" (else of the first one), a panel for what
    the others have. points: of a row. by_seed: bars are of the differences to the first line with
    the same seed, which has none itself."""
    of_lines = "attention" if "attention" in axes else next(iter(axes))
    panels: dict[str, dict[str, dict[str, Points]]] = {}
    for row in rows:
        panel = ", ".join(f"{axis} {row[axis]}" for axis in axes if axis != of_lines)
        lines = panels.setdefault(panel, {})
        lines.setdefault(row[of_lines], {})[row["seed"]] = points(row)
    columns = min(len(panels), 4)
    count = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.5 + 3.6 * columns, 3.8 * count), layout="constrained")
    grid = figure.subplots(count, columns, squeeze=False).flatten()
    first = axes[of_lines][0]
    for panel, plot in zip(panels, grid, strict=False):
        plot.set_title(panel, fontsize=10)
        for place, name in enumerate(axes[of_lines]):
            if name in panels[panel]:
                base = panels[panel].get(first, {}) if by_seed else None
                draw_line(plot, name, panels[panel][name], base, f"C{place}")
    for plot in grid[len(panels) :]:
        plot.remove()
    if by_seed:
        figure.supxlabel(
            f"bars: spread over the seeds of the difference to {first} with the same seed",
            fontsize=8,
        )
    return figure


def labelled(figure: Figure, x: str, y: str) -> Figure:
    for plot in figure.axes:
        plot.set(xlabel=x, ylabel=y)
        plot.set_xscale("log", base=2)
        plot.xaxis.set_major_formatter("{x:,.0f}")
        plot.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize=8)
    return figure


def draw_line(plot, name: str, of_seeds: dict[str, Points], base, color: str) -> None:
    """base: what bars are differences to, by seed; of the values themselves where None."""
    values: dict[float, list[float]] = {}
    differences: dict[float, list[float]] = {}
    for seed, points in of_seeds.items():
        there = {} if base is None else dict(base.get(seed, ()))
        for x, y in points:
            values.setdefault(x, []).append(y)
            if base is None or x in there:
                differences.setdefault(x, []).append(y - there.get(x, 0.0))
    xs = sorted(values)
    means = [Spread.of(values[x]).mean for x in xs]
    bars = [Spread.of(differences[x]).deviation or 0.0 if x in differences else 0.0 for x in xs]
    plot.errorbar(xs, means, yerr=bars, fmt="o-", color=color, markersize=3, capsize=2, label=name)
