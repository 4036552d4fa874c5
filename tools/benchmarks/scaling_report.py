"""Tables and plots of `scaling.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from billion_report import exchanged, line, total

MIB, GIB = 2**20, 2**30
FLAT = 1.10  # the most beside the least, of time and of memory
PARTS = {"attention": "attention of a layer", "step": "training step"}


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [line(header), line(["---:"] * len(header)), *map(line, rows)]


# ------------------------------------------------------------------------ length and share


def length_table(rows: list[dict[str, Any]]) -> str:
    contenders = list(dict.fromkeys(name for row in rows for name in row["attention"]))
    header = ["tokens"]
    for name in [*contenders, "step"]:
        header += [f"{name}, s", "us a token", "peak, MiB"]
    header.append("processor of a step, s")
    text = []
    for row in rows:
        cells = [f"{row['tokens']:,}"]
        for found in [*(row["attention"].get(name) for name in contenders), row["step"]]:
            if found is None:
                cells += [""] * 3
                continue
            per_token = 1e6 * found["seconds"] / row["tokens"]
            cells += [f"{found['seconds']:.3f}", f"{per_token:.1f}", f"{found['peak'] / MIB:,.0f}"]
        text.append([*cells, f"{row['step']['processor']:.3f}"])
    runs = ", ".join(str(next(iter(row["attention"].values()))["runs"]) for row in rows)
    steps = ", ".join(str(row["step"]["runs"]) for row in rows)
    notes = [
        "# One process, by length of the sequence",
        "",
        "Attention of one layer forward and backward, and a training step of two layers; medians"
        f" of {runs} runs, of a step of {steps}.",
        "",
    ]
    return "\n".join([*notes, *table(header, text), ""])


def share_table(found: dict[str, list[dict[str, Any]]]) -> str:
    text = ["# A rank's share, with the same length on each rank"]
    for part, rows in found.items():
        header = ["tokens", "ranks", "of a rank", "seconds, median", "least to largest"]
        header += ["processor, s", "peak, MiB", "bytes a layer", "runs"]
        cells = []
        for row in rows:
            runs = [total(run) for run in row["runs"] or [row["first"]["seconds"]]]
            cells.append(
                [
                    f"{row['tokens']:,}", f"{row['ranks']:,}", f"{row['tokens'] // row['ranks']:,}",
                    f"{seconds_of(row):.3f}", f"{min(runs):.3f} to {max(runs):.3f}",
                    f"{row['seconds']['processor']:.3f}", f"{row['peak'] / MIB:,.0f}",
                    f"{exchanged(row):,}", str(len(runs)),
                ]
            )  # fmt: skip
        verdict = "flat" if is_flat(rows) else "NOT FLAT"
        ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in flatness(rows).items())
        text += ["", f"## {PARTS[part].capitalize()}", "", *table(header, cells)]
        text += [
            "",
            f"The most beside the least: {ratios}. Within 1.1, and bytes alike: {verdict}.",
        ]
    return "\n".join([*text, ""])


def seconds_of(row: dict[str, Any]) -> float:
    return total(row["seconds"])


def flatness(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The most beside the least."""
    columns = {
        "time": [seconds_of(row) for row in rows],
        "processor's time": [row["seconds"]["processor"] for row in rows],
        "memory": [row["peak"] for row in rows],
        "bytes a layer": [exchanged(row) for row in rows],
    }
    return {name: max(values) / min(values) for name, values in columns.items()}


def is_flat(rows: list[dict[str, Any]]) -> bool:
    ratios = flatness(rows)
    return max(ratios["time"], ratios["memory"]) <= FLAT and ratios["bytes a layer"] == 1


def plot_length(known: dict[str, Any], path: Path) -> None:
    """One process by length; beside it shares of longer sequences. known: of length and share."""
    figure, axes = _figure(2, 2)
    for (seconds, memory), part in zip(axes, PARTS, strict=True):
        for name, rows in _curves(known.get("length", []), part).items():
            tokens = [row["tokens"] for row in rows]
            seconds.plot(tokens, [row["seconds"] for row in rows], "o-", label=name)
            memory.plot(tokens, [row["peak"] / MIB for row in rows], "o-", label=name)
        shares = known.get("share", {}).get(part, [])
        if shares:
            tokens = [row["tokens"] for row in shares]
            label = f"a rank's share: {shares[0]['tokens'] // shares[0]['ranks']:,} tokens"
            seconds.plot(tokens, [seconds_of(row) for row in shares], "s--", label=label)
            memory.plot(tokens, [row["peak"] / MIB for row in shares], "s--", label=label)
        seconds.set(ylabel=f"seconds, {PARTS[part]}")
        memory.set(ylabel="MiB at the peak")
        for axis in (seconds, memory):
            axis.set_xscale("log", base=2)
            axis.set(yscale="log", xlabel="tokens in the sequence")
            least, most = axis.get_ylim()
            axis.set_ylim(least / 2, 2 * most)  # what is flat looks it
    _save(figure, axes, path)


def _curves(rows: list[dict[str, Any]], part: str) -> dict[str, list[dict[str, Any]]]:
    """By name, what was measured of one process."""
    if part == "step" and rows:
        return {"one process": [{"tokens": row["tokens"], **row["step"]} for row in rows]}
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name, found in row["attention"].items():
            curves.setdefault(f"one process, {name}", []).append({**row, **found})
    return curves


# ------------------------------------------------------------------------------------ link


def link_table(rows: list[dict[str, Any]]) -> str:
    header = [
        "ranks",
        "link",
        "it carries, Mbit/s",
        "step, s",
        "in collectives",
        "predicted step, s",
    ]
    header += ["predicted communication", "more than unlimited, s", "predicted", "sent, MB"]
    header += ["predicted, MB"]
    cells = []
    for row in rows:
        guess, free = row["predicted"], unlimited(rows, row)
        cells.append(
            [
                str(row["ranks"]), rate_name(row["rate"]), f"{row['carried'] / 1e6:,.0f}",
                f"{row['seconds']:.3f}", f"{row['inside']:.1%}", f"{guess['seconds']:.3f}",
                f"{guess['communication'] / guess['seconds']:.1%}",
                f"{row['seconds'] - free['seconds']:.3f}",
                f"{guess['seconds'] - free['predicted']['seconds']:.3f}",
                f"{row['sent'] / 1e6:.2f}", f"{guess['sent'] / 1e6:.2f}",
            ]
        )  # fmt: skip
    notes = [
        "# A training step over limited links",
        "",
        f"{rows[0]['shard']:,} tokens on each rank; medians of {len(rows[0]['all_seconds'])} steps."
        " In collectives: the share of a step in which a rank waits for one to end, mean of the"
        " ranks. Predicted communication: the share that computation does not hide. Sent: by a"
        " rank in a step, with headers; predicted without.",
        "",
    ]
    return "\n".join([*notes, *table(header, cells), ""])


def unlimited(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """The row of as many ranks without a limit."""
    return next(x for x in rows if x["ranks"] == row["ranks"] and x["rate"] is None)


def rate_name(rate: float | None) -> str:
    return "unlimited" if rate is None else f"{rate / 1e6:,.0f} Mbit/s"


def plot_link(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of communication and time of a step by bandwidth, a colour for each number of ranks."""
    figure, axes = _figure(1, 2)
    [[shares, seconds]] = axes
    names = list(dict.fromkeys(rate_name(row["rate"]) for row in rows))
    for number, ranks in enumerate(dict.fromkeys(row["ranks"] for row in rows)):
        mine = [row for row in rows if row["ranks"] == ranks]
        x = [names.index(rate_name(row["rate"])) for row in mine]
        guesses = [row["predicted"] for row in mine]
        measured = {"color": f"C{number}", "label": f"{ranks} ranks, measured"}
        predicted = {"color": f"C{number}", "label": f"{ranks} ranks, predicted"}
        shares.plot(x, [row["inside"] for row in mine], "o-", **measured)
        parts = [guess["communication"] / guess["seconds"] for guess in guesses]
        shares.plot(x, parts, "s--", **predicted)
        seconds.plot(x, [row["seconds"] for row in mine], "o-", **measured)
        seconds.plot(x, [guess["seconds"] for guess in guesses], "s--", **predicted)
    shares.set(ylabel="share of a step in communication", ylim=(0, 1))
    seconds.set(ylabel="seconds of a step", ylim=(0, None))
    for axis in (shares, seconds):
        axis.set_xticks(range(len(names)), names)
        axis.set_xlabel("link of a rank, each direction")
    _save(figure, axes, path)


# ------------------------------------------------------------------------------------ weak


def weak_table(rows: list[dict[str, Any]]) -> str:
    header = ["ranks", "tokens", "branches", "step, s", "beside 1 rank", "communication"]
    header += ["hidden, s", "sequence axis, MB", "data axis, MB", "memory, GiB", "host, GiB"]
    text = ["# Weak scaling, by dry run", ""]
    shard = rows[0]["tokens"] // rows[0]["ranks"]
    text += [f"{shard:,} tokens on each rank, {rows[0]['layers']} layers; {rows[0]['cluster']}."]
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        mine = [row for row in rows if row["pattern"] == pattern]
        cells = [
            [
                f"{row['ranks']:,}", f"{row['tokens']:,}", str(len(row["branches"])),
                f"{row['seconds']:.3f}", f"{row['seconds'] / mine[0]['seconds']:.3f}",
                f"{exposed(row):.2%}", f"{sum(row['hidden'].values()):.4f}",
                *(f"{row['bytes'].get(axis, 0) / 1e6:,.1f}" for axis in ("sequence", "data")),
                f"{row['memory'] / GIB:.2f}", f"{row['host'] / GIB:.2f}",
            ]
            for row in mine
        ]  # fmt: skip
        text += ["", f"## Pattern: {pattern}", "", *table(header, cells)]
    return "\n".join([*text, ""])


def exposed(row: dict[str, Any]) -> float:
    """Communication that computation does not hide, as a share of the step."""
    return sum(row["communication"].values()) / row["seconds"]


def plot_weak(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = _figure(2, 2)
    (seconds, shares), (bytes_, memory) = axes
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        mine = [row for row in rows if row["pattern"] == pattern]
        ranks = [row["ranks"] for row in mine]
        seconds.plot(ranks, [row["seconds"] for row in mine], "o-", label=pattern)
        shares.plot(ranks, [exposed(row) for row in mine], "o-", label=pattern)
        moved = [row["bytes"].get("sequence", 0) / 1e6 for row in mine]
        bytes_.plot(ranks, moved, "o-", label=pattern)
        memory.plot(ranks, [row["memory"] / GIB for row in mine], "o-", label=pattern)
    seconds.set(ylabel="seconds of a step, predicted")
    shares.set(ylabel="share of it in communication that nothing hides")
    bytes_.set(ylabel="MB of a rank along the sequence, a step")
    memory.set(ylabel="GiB of a rank at the peak")
    for row in axes:
        for axis in row:
            axis.set_xscale("log", base=2)
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
            axis.set_xlabel("ranks; the sequence grows with them")
    _save(figure, axes, path)


def _figure(rows: int, columns: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (6.5 * columns, 4.2 * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _save(figure, axes, path: Path) -> None:
    for row in axes:
        for axis in row:
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


TABLES = {"length": length_table, "share": share_table, "link": link_table, "weak": weak_table}
PLOTS = {"link": plot_link, "weak": plot_weak}
