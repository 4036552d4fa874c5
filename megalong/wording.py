"""What messages have in common."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown word: "; did you mean ...?", or nothing where no known one
    is like it."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def counted(number: int, noun: str) -> str:
    """1 rank, 1,024 ranks."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
