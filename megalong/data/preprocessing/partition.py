"""Shares of the input files, for jobs that do one each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from megalong.data.text.files import is_stream, shown, total_size
from megalong.utils.errors import UserError, counted
from megalong.utils.progress import human_bytes

_UNEVEN = 2  # times the mean share
_LISTED = 16  # shares, in a line


@dataclass(frozen=True)
class Partition:
    """Share `number`, from 1, of `count`. of: what tells the whole input from another; files,
    bytes: how large that is."""

    number: int
    count: int
    of: str
    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def partition(
    files: list[str], share: str, say: Callable[[str], object]
) -> tuple[list[str], Partition]:
    """The files of a share such as "3/16", which stand together; the files of all shares, in order,
    are all files. Cut by size: a file goes where its middle lies.

    say: hears how much that is, and where shares are uneven, since files are not cut.
    Raises UserError naming --partition.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--partition {share}: k/n is expected, with k from 1 to n")
    stream = next(filter(is_stream, files), None)
    if stream is not None:
        raise UserError(
            f"--partition {share}: {shown(stream)} is no file, and cannot be cut by size"
        )
    sizes = [total_size([file]) or 0 for file in files]
    digest = hashlib.sha256(repr(list(zip(files, sizes, strict=True))).encode()).hexdigest()
    total, end, chosen, shares = sum(sizes), 0, [], [0] * count
    for file, size in zip(files, sizes, strict=True):
        middle = 2 * end + size  # of twice the total; 0 only where nothing has come yet
        end += size
        place = min(count * middle // (2 * total), count - 1) if total else 0
        shares[place] += size
        if place + 1 == number:
            chosen.append(file)
    name = f"--partition {share}"
    size = human_bytes(shares[number - 1])
    say(f"{name}: {len(chosen):,} of {counted(len(files), 'input file')}, {size}")
    if max(shares) * count > _UNEVEN * total or 0 in shares:
        more = f" and {count - _LISTED:,} more" if count > _LISTED else ""
        say(
            f"{name}: files are not cut, and so the shares are uneven:"
            f" {', '.join(map(human_bytes, shares[:_LISTED]))}{more}, the largest"
            f" {human_bytes(max(shares))}: take fewer shares, or cut the largest files in several"
        )
    return chosen, Partition(number, count, digest[:16], len(files), total)
