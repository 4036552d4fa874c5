"""What predicted.py found, as tables and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BOUND = 0.05  # of the difference between measured and predicted memory
CORRELATION = 0.8
MIB = 2**20


def memory_difference(rank: dict[str, Any]) -> float:
    return rank["real"]["memory"]["measured"] / rank["dry"]["memory"]["dry"] - 1


def holds(rank: dict[str, Any]) -> bool:
    """Whether what is measured of a rank is what its dry run says."""
    equal = all(rank["real"][what] == rank["dry"][what] for what in ("traffic", "flops"))
    return equal and abs(memory_difference(rank)) <= BOUND


def exact_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each launch its totals, and the rank that differs most in memory."""
    text = [
        "| launch | ranks | collectives, all ranks | bytes | equal | TFLOPs, all ranks | equal"
        " | peak, measured | followed | dry run | difference |",
        "|---|---:|---:|---:|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        ranks = row["ranks"]
        counts = [
            count
            for rank in ranks
            for axis in rank["real"]["traffic"].values()
            for count in axis.values()
        ]
        calls, nbytes = (sum(count[what] for count in counts) for what in ("calls", "bytes"))
        flops = sum(sum(rank["real"]["flops"].values()) for rank in ranks)
        worst = max(ranks, key=lambda rank: abs(memory_difference(rank)))
        memory = worst["real"]["memory"]
        words = [row["name"], str(row["launched"]), f"{calls:,}", f"{nbytes:,}"]
        words += [equal(ranks, "traffic"), f"{flops / 1e12:.4f}", equal(ranks, "flops")]
        words += [f"{memory[what] / MIB:,.1f} MiB" for what in ("measured", "followed")]
        words.append(f"{worst['dry']['memory']['dry'] / MIB:,.1f} MiB")
        words.append(f"{memory_difference(worst):+.1%}")
        text.append(f"| {' | '.join(words)} |")
    text += ["", "Memory is that of the rank that differs most.", ""]
    return "\n".join(text)


def equal(ranks: list[dict[str, Any]], what: str) -> str:
    same = sum(rank["real"][what] == rank["dry"][what] for rank in ranks)
    return "all ranks" if same == len(ranks) else f"{same} of {len(ranks)} ranks"


def correlation(rows: list[dict[str, Any]]) -> float:
    """Spearman's, of measured and predicted times."""
    pairs = [(row["measured"]["median"], row["predicted"]) for row in rows]
    first, second = (ranks_of(column) for column in zip(*pairs, strict=True))
    count = len(pairs)
    squares = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
    return 1 - 6 * squares / (count * (count**2 - 1))


def ranks_of(values: tuple[float, ...]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    places = [0] * len(values)
    for place, number in enumerate(order):
        places[number] = place
    return places


def ranking_table(result: dict[str, Any]) -> str:
    """Markdown: the fastest first."""
    text = [
        "| launch of 2 ranks | measured, median of a step | fastest to slowest | predicted"
        " | predicted / measured |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(result["rows"], key=lambda row: row["measured"]["median"]):
        seconds = row["measured"]["seconds"]
        median = row["measured"]["median"]
        words = [row["name"], f"{median:.3f} s", f"{min(seconds):.3f} to {max(seconds):.3f} s"]
        words += [f"{row['predicted']:.3f} s", f"{row['predicted'] / median:.2f}"]
        text.append(f"| {' | '.join(words)} |")
    text += ["", f"Rank correlation (Spearman's): {result['correlation']:.3f}", ""]
    return "\n".join(text)


def plot(result: dict[str, Any], path: Path) -> None:
    """Predicted against measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    for row in result["rows"]:
        measured, predicted = row["measured"]["median"], row["predicted"]
        axes.plot(measured, predicted, "o", color="C0")
        axes.annotate(
            row["name"], (measured, predicted), fontsize=6, xytext=(4, -6),
            textcoords="offset points",
        )  # fmt: skip
    ends = [f(f(axes.get_xlim()), f(axes.get_ylim())) for f in (min, max)]
    axes.axline((1, 1), slope=1, color="gray", linewidth=0.8)
    axes.set(
        xscale="log", yscale="log", xlim=(max(ends[0], 1e-2), ends[1] * 1.6),
        ylim=(max(ends[0], 1e-2), ends[1]), xlabel="measured (seconds of a step, median)",
        ylabel="predicted (seconds)",
        title=f"2 ranks, a core each: rank correlation {result['correlation']:.2f}",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
