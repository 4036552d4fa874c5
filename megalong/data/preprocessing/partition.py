"""Shares of the input files, for jobs that do one each."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from megalong.data.text.files import is_stream, shown, total_size
from megalong.errors import UserError


@dataclass(frozen=True)
class Partition:
    """Share `number`, from 1, of `count`. of: what tells the whole input from another."""

    number: int
    count: int
    of: str

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def partition(files: list[str], share: str) -> tuple[list[str], Partition]:
    """The files of a share such as "3/16", which stand together; the files of all shares, in order,
    are all files. Cut by size: a file goes where its middle lies.

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
    total, end, chosen = sum(sizes), 0, []
    for file, size in zip(files, sizes, strict=True):
        middle = 2 * end + size  # of twice the total; 0 only where nothing has come yet
        end += size
        if min(count * middle // (2 * total), count - 1) + 1 == number if total else number == 1:
            chosen.append(file)
    return chosen, Partition(number, count, digest[:16])
