"""What attention.py measured, as text and plots, and as ratios between ours and its baselines.

A row is a dictionary: the fields of Setting, length, contender, and either error or, for each of
MEASURES, {seconds, least, largest, teraflops, share_of_roofline}, and peak_memory_bytes; "forward"
alone where there is no backward pass.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

MEASURES = ("forward", "backward", "forward+backward")
# The first that was measured; the rest is baseline.
OURS = (
    "dilated (triton)", "dilated (sdpa)", "local (triton)", "local (sdpa)", "sparse (triton)",
    "sparse (sdpa)", "dense (ours)",
)  # fmt: skip

DOCUMENTS = ", documents: "  # in the name of a contender that keeps so many apart


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
    for kind in (kind for kind in MEASURES if kind in row):
        found = row[kind]
        text += f"  {kind} {found['seconds'] * 1e3:9.3f} ms {found['teraflops']:7.3g} TFLOP/s"
        if found["share_of_roofline"]:
            text += f" {found['share_of_roofline']:4.0%}"
    if "peak_memory_bytes" in row:
        text += f"  peak {row['peak_memory_bytes'] / 2**20:7.0f} MiB"
    return text


def comparisons(results: list[dict]) -> list[dict]:
    """What we offer beside every baseline: settings, lengths, measures and times."""
    found, cases = [], {}
    for row in results:
        if "error" not in row:
            key = (*setting_of(row), row["length"])
            cases.setdefault(key, {})[row["contender"]] = row
    for case, kind in product(cases.values(), MEASURES):
        name = next((name for name in OURS if name in case), None)
        for baseline, row in case.items() if name else ():
            if baseline != name and kind in row and DOCUMENTS not in baseline:
                where = {**setting_of(row)._asdict(), "length": row["length"]}
                times = {"seconds": row[kind]["seconds"], "ours": case[name][kind]["seconds"]}
                found.append({**where, "measure": kind, "baseline": baseline, **times})
    return found


def comparisons_text(compared: list[dict]) -> list[str]:
    line = "{pattern} d{head_dim} kv{kv_heads} {length:>8}  {measure:<16}  {x:6.2f} x  {baseline}"
    text = [line.format(**row, x=row["seconds"] / row["ours"]) for row in compared]
    lost = sum(row["seconds"] < row["ours"] for row in compared)
    return ["", f"ours is so many times as fast ({lost} times a baseline is faster)", *text]


def isolated_text(results: list[dict]) -> list[str]:
    """What time documents take that are kept apart, beside the same attention without them."""
    rows = {(*setting_of(row), row["length"], row["contender"]): row for row in results}
    line = "{pattern} d{head_dim} kv{kv_heads} {length:>8}  {kind:<16}  {x:6.2f} x  {contender}"
    text = []
    for (*where, name), row in rows.items():
        mixed = rows.get((*where, name.partition(DOCUMENTS)[0]))
        if DOCUMENTS in name and mixed:
            text += [
                line.format(**row, kind=kind, x=row[kind]["seconds"] / mixed[kind]["seconds"])
                for kind in MEASURES
                if kind in row and kind in mixed
            ]
    if text:
        text = ["", "documents kept apart take so many times the time of mixed ones", *text]
    return text


def plot(results: list[dict], title: str, path: Path):
    """A row of panels for each setting; time and TFLOP/s for each measure, roofline, memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results if "error" not in row]
    settings = list(dict.fromkeys(map(setting_of, rows)))
    panels = [
        (f"{kind}: seconds", kind, lambda r, kind=kind: r[kind]["seconds"]) for kind in MEASURES
    ]
    both = MEASURES[2]
    panels.append((f"{both}: TFLOP/s", both, lambda r: r[both]["teraflops"]))
    if any(row[both]["share_of_roofline"] for row in rows if both in row):
        panels.append((f"{both}: share of roofline", both, lambda r: r[both]["share_of_roofline"]))
    panels.append((f"{both}: peak MiB", both, lambda r: r["peak_memory_bytes"] / 2**20))

    size = (4 * len(panels), 3.6 * len(settings))
    figure, grid = plt.subplots(
        len(settings), len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for setting, axes in zip(settings, grid, strict=True):
        name_of_row = f"{setting.pattern}, head_dim {setting.head_dim}, {setting.kv_heads} kv heads"
        of_setting = [row for row in rows if setting_of(row) == setting]
        for axis, (name, kind, value) in zip(axes, panels, strict=True):
            for contender in dict.fromkeys(row["contender"] for row in of_setting):
                mine = [r for r in of_setting if r["contender"] == contender and kind in r]
                axis.plot([r["length"] for r in mine], [*map(value, mine)], "o-", label=contender)
            axis.set(title=f"{name_of_row}\n{name}", xlabel="sequence length (tokens)")
            axis.set_xscale("log", base=2)
            if "share" not in name:
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
