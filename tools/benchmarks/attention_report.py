"""What attention.py measured, as text, as plots, and as the list of what is faster than ours.

A row is a dictionary: the fields of Setting, length, contender, and either error or, for each of
MEASURES, {seconds, least, largest, teraflops, share_of_roofline}, and peak_memory_bytes.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

MEASURES = ("forward", "backward", "forward+backward")
OURS = ("dilated (triton)", "dilated (sdpa)")  # the first that was measured; the rest is baseline


class Setting(NamedTuple):
    """What is measured by sequence length."""

    pattern: str
    head_dim: int
    kv_heads: int


def setting_of(row: dict) -> Setting:
    return Setting(*(row[field] for field in Setting._fields))


def row_text(row: dict) -> str:
    text = "{pattern} d{head_dim:<3} kv{kv_heads:<3} {length:>8}  {contender:<16}".format(**row)
    if "error" in row:
        return f"{text}  {row['error']}"
    for kind in MEASURES:
        found = row[kind]
        text += f"  {kind} {found['seconds'] * 1e3:9.3f} ms {found['teraflops']:7.3g} TFLOP/s"
        if found["share_of_roofline"]:
            text += f" {found['share_of_roofline']:4.0%}"
    return f"{text}  peak {row['peak_memory_bytes'] / 2**20:7.0f} MiB"


def losses(results: list[dict]) -> list[dict]:
    """Where a baseline is faster than what we offer: settings, lengths, measures and times."""
    lost, cases = [], {}
    for row in results:
        if "error" not in row:
            key = (*setting_of(row), row["length"])
            cases.setdefault(key, {})[row["contender"]] = row
    for case, kind in product(cases.values(), MEASURES):
        name = next((name for name in OURS if name in case), None)
        for baseline, row in case.items() if name else ():
            if baseline != name and row[kind]["seconds"] < case[name][kind]["seconds"]:
                where = {**setting_of(row)._asdict(), "length": row["length"]}
                times = {"seconds": row[kind]["seconds"], "ours": case[name][kind]["seconds"]}
                lost.append({**where, "measure": kind, "baseline": baseline, **times})
    return lost


def losses_text(lost: list[dict]) -> list[str]:
    if not lost:
        return ["", "no baseline is faster anywhere"]
    line = "{pattern} d{head_dim} kv{kv_heads} {length:>8}  {measure:<16}  {baseline} {x:.2f}x"
    text = [line.format(**row, x=row["ours"] / row["seconds"]) for row in lost]
    return ["", "faster than ours are", *text]


def plot(results: list[dict], title: str, path: Path):
    """A row of panels for each setting; time and TFLOP/s for each measure, roofline, memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results if "error" not in row]
    settings = list(dict.fromkeys(map(setting_of, rows)))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    panels = [(f"{kind}: seconds", lambda r, kind=kind: r[kind]["seconds"]) for kind in MEASURES]
    both = MEASURES[2]
    panels.append((f"{both}: TFLOP/s", lambda r: r[both]["teraflops"]))
    if any(row[both]["share_of_roofline"] for row in rows):
        panels.append((f"{both}: share of roofline", lambda r: r[both]["share_of_roofline"]))
    panels.append((f"{both}: peak MiB", lambda r: r["peak_memory_bytes"] / 2**20))

    size = (4 * len(panels), 3.6 * len(settings))
    figure, grid = plt.subplots(
        len(settings), len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for setting, axes in zip(settings, grid, strict=True):
        name_of_row = f"{setting.pattern}, head_dim {setting.head_dim}, {setting.kv_heads} kv heads"
        for axis, (name, value) in zip(axes, panels, strict=True):
            for contender in contenders:
                mine = [r for r in rows if (setting_of(r), r["contender"]) == (setting, contender)]
                axis.plot([r["length"] for r in mine], [*map(value, mine)], "o-", label=contender)
            axis.set(title=f"{name_of_row}\n{name}", xlabel="sequence length (tokens)")
            axis.set_xscale("log", base=2)
            if "share" not in name:
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
