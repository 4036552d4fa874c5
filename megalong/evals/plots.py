"""Plots of accuracy on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def plot_by_distance(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    """Accuracy against how far back the model has to look, a line for each record of a TaskScore,
    on an axis of matplotlib."""
    for record in records:
        centres = [(a + b) / 2 for a, b in pairwise(record["distance_edges"])]
        points = [
            (x, y)
            for x, y in zip(centres, record["accuracy_by_distance"], strict=True)
            if y is not None
        ]
        label = f"{record['task']} of {record['length']:,} tokens: {record['accuracy']:.0%}"
        axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(
        xlabel="distance to what is asked for (tokens)",
        ylabel="share of answers that are right",
        ylim=(-0.02, 1.02),
        title="Accuracy by distance",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
