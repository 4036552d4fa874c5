"""What messages have in common."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown word: "; did you mean ...?", or nothing where no known one
    is like it. Upper and lower case are alike."""
    of_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(word.lower(), list(of_lower), n=1)
    return f"; did you mean {of_lower[close[0]]}?" if close else ""


def counted(number: int, noun: str) -> str:
    """1 rank, 1,024 ranks."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def aligned(rows: Iterable[Sequence[str]], words: Collection[int] = (0, -1)) -> str:
    """The lines of a table, columns as wide as their widest. words: the columns that begin at the
    left, from the end where negative; numbers end at the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {column % len(widths) for column in words}

    def cell(text: str, column: int) -> str:
        return text.ljust(widths[column]) if column in left else text.rjust(widths[column])

    return "\n".join("  ".join(cell(x, i) for i, x in enumerate(row)).rstrip() for row in rows)
