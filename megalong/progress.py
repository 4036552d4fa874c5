"""A progress bar on a terminal, plain lines in a log file; nothing but the standard library."""

import shutil
import sys
import time
from collections import deque


class ProgressBar:
    """Shows how far a job is, its rate and the time left, on standard error.

    total: the amount of work in `unit`, or None when unknown.
    unit: "B" is shown as kB, MB, GB; anything else is counted as it is.
    initial: work done before this process began (a resumed run); it does not count in the rate.
    interval: seconds between two lines where the stream is not a terminal.
    enabled: False makes it silent (all ranks but one).

    `message` may be set at any time; it is shown behind the rate. Use as a context manager, so
    that the last state is shown and the terminal's line ended.
    """

    def __init__(
        self,
        total: int | None,
        unit: str = "",
        description: str = "",
        *,
        initial: int = 0,
        interval: float = 5.0,
        enabled: bool = True,
        stream=None,
    ) -> None:
        self.total = total
        self.unit = unit
        self._unit = "" if unit == "B" else unit
        self.description = description
        self.message = ""
        self.count = initial
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        self._bar = self._stream.isatty()
        self._interval = 0.1 if self._bar else interval
        self._start = time.monotonic()
        # A minute or so of (time, count): the rate is that of the recent past, since a first
        # step that compiles, or a slow first file, says nothing about the time left.
        self._history = deque([(self._start, initial)], maxlen=64)
        self._shown = self._start

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None or self.count:  # of work that failed before it began there is nothing
            self._show(final=True)

    def update(self, n: int = 1) -> None:
        """Counts n more units of work as done; shows it if the last time was long enough ago."""
        self.count += n
        now = time.monotonic()
        if now - self._history[-1][0] >= 1.0:
            self._history.append((now, self.count))
        if now - self._shown >= self._interval:
            self._show()

    def print(self, text: str) -> None:
        """Prints a line of its own, above the bar. Shown even when the progress is not enabled."""
        clear = "\r\x1b[K" if self._bar and self._enabled else ""
        self._stream.write(f"{clear}{text}\n")
        self._stream.flush()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units of work per second, over the recent past."""
        then, count = self._history[0]
        return (self.count - count) / max(time.monotonic() - then, 1e-9)

    def _show(self, final: bool = False) -> None:
        if not self._enabled:
            return
        self._shown = time.monotonic()
        if not self._bar:
            self._stream.write(self._line() + "\n")
        else:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + self._line(bar=True)[:width] + "\n" * final)
        self._stream.flush()

    def _line(self, bar: bool = False) -> str:
        parts = [self.description] if self.description else []
        rate = self.rate
        if self.total:
            share = min(self.count / self.total, 1.0)
            if bar:
                filled = round(24 * share)
                parts.append("[" + "#" * filled + "." * (24 - filled) + "]")
            parts.append(f"{100 * share:3.0f}%")
            parts.append(f"{self._amount(self.count)}/{self._amount(self.total)} {self._unit}")
        else:
            parts.append(f"{self._amount(self.count)} {self._unit}")
        parts.append(f"{self._amount(rate)}/s")
        if self.total and self.count < self.total and rate > 0:
            parts.append(f"{clock((self.total - self.count) / rate)} left")
        else:
            parts.append(clock(self.seconds))
        if self.message:
            parts.append(self.message)
        return "  ".join(part.rstrip() for part in parts)

    def _amount(self, value: float) -> str:
        if self.unit == "B":
            return human_bytes(value)
        return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:.3g}"


def human_bytes(value: float) -> str:
    """1234567 -> "1.2 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def clock(seconds: float) -> str:
    """3725 -> "1:02:05"; 65 -> "1:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
