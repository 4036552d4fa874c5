"""Progress of a job, tqdm's bar on a terminal and lines in a log file; times and sizes in words."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm


def progress_bar(
    total: int | None,
    unit: str,
    description: str,
    *,
    interval: float = 5.0,
    enabled: bool = True,
    stream: TextIO | None = None,
    bar_format: str | None = None,
) -> tqdm:
    """Make a bar with rate and time left, on standard error: a context manager.

    total: the amount of work in `unit`, None where it is not known; "B" is shown as kB, MB, GB.
    interval: seconds between two lines where the stream is not a terminal, and before the first.
    enabled: False makes it silent (all ranks but one).
    """
    stream = sys.stderr if stream is None else stream
    common = {"total": total, "unit": unit, "desc": description, "disable": not enabled}
    common |= {"unit_scale": unit == "B", "bar_format": bar_format}
    if stream.isatty():
        return tqdm(**common, file=stream, dynamic_ncols=True)
    # miniters: every update looks at the clock, and no thread has to.
    pace = {"mininterval": interval, "delay": interval, "miniters": 1, "maxinterval": float("inf")}
    return tqdm(**common, **pace, file=_Lines(stream), ncols=0, ascii=True)


@contextlib.contextmanager
def stopwatch(description: str, *, tick: float = 1.0, **options: Any) -> Iterator[None]:
    """Show the time gone by inside, for a job that does not say how far it is. tick: seconds
    between two looks at the clock. options: of `progress_bar`."""
    done = threading.Event()

    def count(bar: tqdm) -> None:
        while not done.wait(tick):
            bar.update()

    with progress_bar(None, "s", description, bar_format="{desc}: {elapsed}", **options) as bar:
        counting = threading.Thread(target=count, args=(bar,), daemon=True)
        counting.start()
        try:
            yield
        finally:
            done.set()
            counting.join()


class _Lines:
    """A log file in the terminal's place: what would overwrite a line is a new one."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.flush = stream.flush

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._stream.write(line + "\n")


def human_bytes(value: float) -> str:
    """Return bytes in words: 1234567 is "1.2 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def clock(seconds: float) -> str:
    """Return a time in words: 3725 is "1:02:05", 65 is "1:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def human_flops(value: float) -> str:
    """Return operations in words: 1.234e13 is "12.3 TFLOP"."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z", "Y"):
        if value < 1000:
            return f"{value:.3g} {prefix}FLOP"
        value /= 1000
    return f"{value:.3g} RFLOP"
