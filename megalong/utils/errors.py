"""Errors that the user can mend, and the wording and tables that messages share."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: the flag or the file, and what to
    set instead. Commands end with it (`command_line.run`); any other exception is a bug."""


@contextlib.contextmanager
def system_errors_of(flag: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Make a UserError of an error of the operating system inside (no permission, a full disk): it
    names the flag with its value, the file, and the reason."""
    try:
        yield
    except OSError as error:
        file = "" if error.filename in (None, os.fspath(path)) else f"{error.filename}: "
        raise UserError(f"{flag} {path}: {file}{error.strerror or error}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown word, "; did you mean ...?": nothing where no known
    one is like it. Upper and lower case are alike."""
    of_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(word.lower(), list(of_lower), n=1)
    return f"; did you mean {of_lower[close[0]]}?" if close else ""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 rank, 1,024 ranks."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def aligned(rows: Iterable[Sequence[str]], words: Collection[int] = (0, -1)) -> str:
    """Return the lines of a table. words: the columns that begin at the left, from the end where
    negative; numbers end at the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {column % len(widths) for column in words}

    def cell(text: str, column: int) -> str:
        return text.ljust(widths[column]) if column in left else text.rjust(widths[column])

    return "\n".join("  ".join(cell(x, i) for i, x in enumerate(row)).rstrip() for row in rows)
