"""A cluster's file, of what was measured and of where the rest of it is from."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megalong.dry_run.calibration.device import Attention, Rows
from megalong.dry_run.cluster import CLUSTERS, DEVICES

HEADER = "Written by tools/calibrate_device.py."


def raw_description(name_or_file: str) -> dict[str, Any]:
    """The content of a cluster's file that loads (`load_cluster`), with its device in it."""
    path = CLUSTERS / f"{name_or_file}.yaml"
    values = yaml.safe_load((path if path.exists() else Path(name_or_file)).read_text())
    if isinstance(values["device"], str):
        values["device"] = yaml.safe_load((DEVICES / f"{values['device']}.yaml").read_text())
    return values


def shares(rows: Rows, peak: float) -> list[list[float]]:
    """Of (size, seconds of a call), [size, share of the peak]; what is more than all of it, as of
    data that stays in a cache, is all of it."""
    return [[float(f"{n:.4g}"), rounded(min(1.0, n / seconds / peak))] for n, seconds in rows]


def attention_shares(calls: Sequence[Attention], peak: float) -> list[list[float]]:
    """[FLOPs for each byte, share of the peak]."""
    return [
        [rounded(call.flops / call.bytes), rounded(min(1.0, call.flops / call.seconds / peak))]
        for call in calls
    ]


def best(rows: Rows) -> float:
    """The best rate of any call."""
    return rounded(max(n / seconds for n, seconds in rows))


def link_shares(
    seconds: Mapping[str, Rows],
    through: Mapping[str, tuple[float, int]],
    fixed: Mapping[str, float],
) -> tuple[float, dict[str, Any]]:
    """Bandwidth of the best call between ranks, and the shares of it by collective.

    seconds: of collectives, by bytes of the call. through: the bytes that go through a rank as a
    share of these. fixed: seconds of a call that are not the bytes'.
    """
    rates = {
        name: [
            (size, through[name][0] * size / max(taken - fixed[name], taken / 2))
            for size, taken in rows
        ]
        for name, rows in seconds.items()
    }
    peak = rounded(max(rate for rows in rates.values() for _, rate in rows))
    table = {
        name: [[float(size), rounded(min(1.0, rate / peak))] for size, rate in rows]
        for name, rows in rates.items()
    }
    if "send" in table:
        table["receive"] = [list(row) for row in table["send"]]
    slowest = min(table.values(), key=lambda rows: rows[-1][1])
    return peak, {**table, "others": [list(row) for row in slowest]}


def rounded(value: float) -> float:
    """To three digits, which is more than is known."""
    return float(f"{value:.3g}")


def write(values: dict[str, Any], path: Path, says: Sequence[str]) -> None:
    """says: lines at the top about where its figures are from."""
    wrap = textwrap.TextWrapper(
        98,
        initial_indent="# ",
        subsequent_indent="#   ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    comment = [line for said in (HEADER, *says) for line in wrap.wrap(said)]
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(comment) + "\n" + text)
