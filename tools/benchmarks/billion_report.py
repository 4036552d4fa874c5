"""Tables and plots of `billion.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TITLES = {"attention": "One attention layer", "step": "A training step"}
MIB = 2**20
PROCESSOR = "processor"  # what `billion_share` calls the seconds that a process had a processor


def write_report(report: dict[str, Any], folder: Path) -> None:
    (folder / "billion.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "billion.md").write_text(markdown(report))
    plot(report, folder / "billion.png")


def markdown(report: dict[str, Any]) -> str:
    settings = report["settings"]
    lines = [
        "# One rank's exact share of a long sequence",
        "",
        f"Hidden size {settings['hidden_size']}, {settings['heads']} heads"
        f" ({settings['kv_heads']} of keys), {settings['layers']} layers, vocabulary"
        f" {settings['vocab_size']}, {settings['precision']}, {settings['threads']} thread(s).",
        "Rows of other ranks are made up, right in number and place; nothing goes over a network.",
    ]
    for part, title in TITLES.items():
        if part in report:
            lines += ["", f"## {title}", "", *table(report[part])]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: one for each case, then what the first runs' time went to."""
    times = list(rows[0]["seconds"])
    parts = list(dict.fromkeys(part for row in rows for part in row["first"]["parts"]))
    work = ["pairs, beside the mean rank's"] if "pairs" in rows[0] else []
    header = [
        "tokens", "ranks", "rank", "branches", *(f"{name}, s" for name in times), "peak, MiB",
        "bytes a layer", *work, "runs",
    ]  # fmt: skip
    lines = [line(header), line(["---:"] * len(header))]
    for row in rows:
        numbers = [f"{row[name]:,}" for name in ("tokens", "ranks", "rank")]
        numbers += [str(len(row["branches"])), *(f"{row['seconds'][name]:.2f}" for name in times)]
        numbers += [f"{row['peak'] / MIB:,.0f}", f"{exchanged(row):,}"]
        if work:
            numbers.append(f"{row['pairs'] / row['mean_pairs']:.3f}")
        lines.append(line([*numbers, str(max(1, len(row["runs"])))]))
    if len(rows) > 1:
        lines += ["", flatness(rows)]
    lines += ["", "Parts of the first run's time, and bytes by collective and layer:", ""]
    calls = sorted({name for row in rows for name in row["per_layer"]})
    header = ["tokens", "rank", *parts, *(name.replace("_", "-") for name in calls)]
    lines += [line(header), line(["---:"] * len(header))]
    for row in rows:
        whole = total(row["first"]["seconds"])
        shares = [f"{row['first']['parts'].get(part, 0.0) / whole:.1%}" for part in parts]
        moved = (row["per_layer"].get(name, {"calls": 0, "bytes": 0}) for name in calls)
        texts = [f"{count['bytes']:,} in {count['calls']} calls" for count in moved]
        lines.append(line([f"{row['tokens']:,}", f"{row['rank']:,}", *shares, *texts]))
    return lines


def flatness(rows: list[dict[str, Any]]) -> str:
    columns = {
        "in time": [total(row["seconds"]) for row in rows],
        "in the processor's time": [row["seconds"].get(PROCESSOR) for row in rows],
        "in memory": [row["peak"] for row in rows],
    }
    ratios = (
        f"{max(values) / min(values):.3f} {name}" for name, values in columns.items() if all(values)
    )
    return f"The most beside the least: {', '.join(ratios)}."


def total(seconds: dict[str, float]) -> float:
    return sum(spent for name, spent in seconds.items() if name != PROCESSOR)


def exchanged(row: dict[str, Any]) -> int:
    """Bytes of a layer; where a rank sends and receives different numbers of rows, the larger."""
    return sum(count["bytes"] for count in row["per_layer"].values())


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [part for part in TITLES if part in report]
    figure, axes = plt.subplots(len(parts), 3, figsize=(13, 3.8 * len(parts)), squeeze=False)
    for row_of_axes, part in zip(axes, parts, strict=True):
        draw = plot_one if len(report[part]) == 1 else plot_many
        draw(report[part], *row_of_axes)
        row_of_axes[0].set_title(TITLES[part])
        for axis in row_of_axes:
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_one(rows: list[dict[str, Any]], left, middle, right) -> None:
    """What the time of the first run went to, memory, and bytes by collective."""
    [row] = rows
    parts = row["first"]["parts"]
    left.barh(list(parts), list(parts.values()))
    left.set(xlabel=f"seconds, of {total(row['first']['seconds']):.0f}")
    middle.bar([f"{row['tokens']:,} tokens"], [row["peak"] / MIB], width=0.4)
    middle.set(title="Memory at the peak", ylabel="MiB", xlim=(-1, 1))
    moved = {name.replace("_", "-"): count["bytes"] for name, count in row["per_layer"].items()}
    right.bar(list(moved), [size / MIB for size in moved.values()], width=0.4)
    right.set(title="Exchanged by the rank", ylabel="MiB a layer")


def plot_many(rows: list[dict[str, Any]], left, middle, right) -> None:
    """Time, memory and bytes by length of the sequence; of one length, by rank."""
    by_rank = len({row["tokens"] for row in rows}) == 1
    x = [row["rank"] if by_rank else row["tokens"] for row in rows]
    for name in rows[0]["seconds"]:
        left.plot(x, [row["seconds"][name] for row in rows], "o-", label=name)
    left.set(ylabel="seconds, medians")
    left.legend()
    middle.plot(x, [row["peak"] / MIB for row in rows], "o-")
    middle.set(title="Memory at the peak", ylabel="MiB")
    right.plot(x, [exchanged(row) / MIB for row in rows], "o-")
    right.set(title="Exchanged by the rank", ylabel="MiB a layer, forward and backward")
    for axis in (left, middle, right):
        axis.set_ylim(bottom=0)
        axis.set_xlabel("rank" if by_rank else "tokens in the sequence; a rank's are the same")
        if not by_rank:
            axis.set_xscale("log", base=2)
