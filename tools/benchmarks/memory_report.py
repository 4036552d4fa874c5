"""What memory.py found, as tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GIB = 2**30
BASE = "full recomputation"
HEADER = (
    "rung", "device B/token at {}", "{}", "{}", "per token more", "forward", "backward", "host",
    "weights + optimizer", "MFLOP/token", "of full recomputation", "longest in 76 GiB",
    "host at that length", "dry run there",
)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for each shape."""
    text = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        lengths = [f"{int(n) // 1024}K" for n in mine[0]["at"]]
        header = " | ".join(HEADER).format(*lengths)
        ranks = mine[0]["ranks"]
        text += [f"### {shape}" + (f", ZeRO 3 over {ranks} ranks" if ranks > 1 else ""), ""]
        text += [f"| {header} |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
        base = next((flops(row) for row in mine if row["rung"] == BASE), None)
        text += [line(row, base) for row in mine] + [""]
    return "\n".join(text)


def line(row: dict[str, Any], base: float | None) -> str:
    per_token, longest = row["bytes_per_token"], row["longest"]
    *_, last = row["at"].values()
    words = [row["rung"]]
    words += [f"{at['device'] / int(n):,.0f}" for n, at in row["at"].items()]
    words += [f"{per_token.get(k, 0):,.0f}" for k in ("device", "forward", "backward", "host")]
    words.append(f"{(last['weights'] + last['optimizer']) / GIB:.1f} GiB")
    words.append(f"{flops(row) / 1e6:,.0f}")
    words.append(f"{flops(row) / base:.2f}" if base else "")
    words.append(f"{longest['tokens']:,}")
    if longest["tokens"]:
        words += [f"{longest['host'] / GIB:,.0f} GiB", f"{longest['error']:+.1%}"]
    else:
        words += ["", ""]
    return f"| {' | '.join(words)} |"


def flops(row: dict[str, Any]) -> float:
    """Of all parts, forward and backward."""
    return sum(sum(ways.values()) for ways in row["flops_per_token"].values())


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
        for kind in ("forward", "backward"):
            values = [row["bytes_per_token"].get(kind, 0) / 1e3 for row in mine]
            above.barh(names, values, left=left, label=f"device, {kind}")
            left = [a + b for a, b in zip(left, values, strict=True)]
        host = [row["bytes_per_token"]["host"] / 1e3 for row in mine]
        above.barh(names, host, height=0.25, color="gray", label="host")
        above.set(title=shape, xlabel="kB a token at the peak", xscale="log")
        above.legend(fontsize="small")
        tokens = [max(row["longest"]["tokens"], 1) for row in mine]
        below.barh(names, tokens)
        for name, count in zip(names, tokens, strict=True):
            below.text(count, name, f" {count:,}", va="center", fontsize="small")
        below.set(xlabel="longest sequence in 76 GiB (tokens)", xscale="log")
        below.margins(x=0.3)
    figure.savefig(path, dpi=80)
