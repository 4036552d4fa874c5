"""What memory.py found, as tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GIB = 2**30
BASE = "full recomputation"
MODEL = ("weights", "gradients", "optimizer")
HEADER = (
    "rung", "device B/token at {}", "{}", "{}", "per token more", "activations", "temporaries",
    "host", "weights, gradients, optimizer", "MFLOP/token", "of full recomputation",
    "longest in {}", "host at that length", "dry run there",
)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for each shape."""
    text = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        lengths = [f"{int(n):,}" for n in mine[0]["at"]]
        header = " | ".join(HEADER).format(*lengths, limit(mine[0]))
        ranks = mine[0]["ranks"]
        text += [f"### {shape}" + (f", ZeRO 3 over {ranks} ranks" if ranks > 1 else ""), ""]
        text += [f"| {header} |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
        base = next((flops(row) for row in mine if row["rung"] == BASE), None)
        text += [line(row, base) for row in mine] + [""]
    return "\n".join(text)


def limit(row: dict[str, Any]) -> str:
    """What the longest sequence may take of the device."""
    usable = row["usable"]
    return f"{usable / GIB:.0f} GiB" if usable >= GIB else f"{usable / 2**20:.0f} MiB"


def line(row: dict[str, Any], base: float | None) -> str:
    per_token, longest = row["bytes_per_token"], row["longest"]
    *_, last = row["at"].values()
    words = [row["rung"]]
    words += [f"{at['device'] / int(n):,.0f}" for n, at in row["at"].items()]
    words += [
        f"{per_token.get(k, 0):,.0f}" for k in ("device", "activations", "temporaries", "host")
    ]
    words.append(f"{sum(last[k] for k in MODEL) / GIB:.1f} GiB")
    words.append(f"{flops(row) / 1e6:,.0f}")
    words.append(f"{flops(row) / base:.2f}" if base else "")
    words.append(f"{longest['tokens']:,}")
    if longest["tokens"]:
        words.append(f"{longest['host'] / GIB:,.0f} GiB")
        words.append(f"{longest['error']:+.1%}" if "error" in longest else "not run")
    else:
        words += ["", ""]
    return f"| {' | '.join(words)} |"


def flops(row: dict[str, Any]) -> float:
    """Of all parts, forward and backward."""
    return sum(sum(ways.values()) for ways in row["flops_per_token"].values())


def measured_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: measured beside dry, and what each token more takes."""
    text = [
        "| rung | tokens | measured | dry run | difference | B/token more, measured | dry |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for rung in dict.fromkeys(row["rung"] for row in rows):
        before = None
        for row in (row for row in rows if row["rung"] == rung):
            mib = f"{row['measured'] / 2**20:,.0f} MiB | {row['dry'] / 2**20:,.0f} MiB"
            line = f"| {rung} | {row['length']:,} | {mib} | {row['difference']:+.1%}"
            for kind in ("measured", "dry"):
                line += " | "
                if before is not None:
                    more = (row[kind] - before[kind]) / (row["length"] - before["length"])
                    line += f"{more:,.0f}"
            text.append(line + " |")
            before = row
    return "\n".join(text) + "\n"


def plot_measured(rows: list[dict[str, Any]], path: Path) -> None:
    """Peak by length, measured and dry."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, rung in enumerate(dict.fromkeys(row["rung"] for row in rows)):
        mine = [row for row in rows if row["rung"] == rung]
        lengths, color = [row["length"] for row in mine], f"C{number}"
        axes.plot(lengths, [row["dry"] / GIB for row in mine], "-", color=color, label=rung)
        axes.plot(lengths, [row["measured"] / GIB for row in mine], "o", color=color)
    axes.set(
        xlabel="tokens", ylabel="peak (GiB): dry run, and measured (points)", xscale="log",
        yscale="log",
    )  # fmt: skip
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """For each shape, bytes per token of device and host by rung, and the longest sequence."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, grid = plt.subplots(
        2, len(shapes), figsize=(5 * len(shapes), 8), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    for shape, (above, below) in zip(shapes, grid.T, strict=True):
        mine = [row for row in rows if row["shape"] == shape][::-1]
        names = [row["rung"] for row in mine]
        left = [0.0] * len(mine)
        for kind in ("activations", "temporaries"):
            values = [row["bytes_per_token"].get(kind, 0) / 1e3 for row in mine]
            above.barh(names, values, left=left, label=f"device, {kind}")
            left = [a + b for a, b in zip(left, values, strict=True)]
        host = [row["bytes_per_token"]["host"] / 1e3 for row in mine]
        above.barh(names, host, height=0.25, color="gray", label="host")
        above.set(title=shape, xlabel="kB a token at the peak", xscale="log")
        above.xaxis.set_minor_formatter("")  # less than two decades would be full of numbers
        above.legend(fontsize="small")
        tokens = [max(row["longest"]["tokens"], 1) for row in mine]
        below.barh(names, tokens)
        for name, count in zip(names, tokens, strict=True):
            below.text(count, name, f" {count:,}", va="center", fontsize="small")
        below.set(xlabel=f"longest sequence in {limit(mine[0])} (tokens)", xscale="log")
        below.margins(x=0.3)
    figure.savefig(path, dpi=80)
