"""The inputs of preprocessing: shares of them, their hashes, and how a change of them is noticed.

Files are known by their size and time, streams by what they give.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megalong.data.formats import raw_documents
from megalong.data.preprocessing.unfinished import InputSpent
from megalong.data.text.documents import Reading
from megalong.data.text.files import content_files, is_stream, shown, total_size
from megalong.utils.errors import UserError, counted
from megalong.utils.progress import human_bytes

INPUTS = "inputs.jsonl"  # in the folder of an unfinished run
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


def file_state(path: str) -> dict:
    """What tells that a file, or a folder of files, has changed. Nothing is known of a stream."""
    try:
        stats = None if is_stream(path) else [os.stat(file) for file in content_files(path)]
    except OSError:
        stats = None
    if stats is None:
        return {"path": path, "size": None, "modified": None}
    modified = max((stat.st_mtime_ns for stat in stats), default=None)
    return {"path": path, "size": sum(stat.st_size for stat in stats), "modified": modified}


def changed_input(
    files: list[str], reading: Reading, bar: tqdm, folder: Path, progress: dict
) -> str | None:
    """Which of the files that have been read is no longer what it was. Raises InputSpent for a
    stream."""
    done = progress["place"][0]
    try:
        with open(folder / INPUTS, encoding="utf-8") as lines:
            states = [json.loads(line) for line in itertools.islice(lines, done)]
    except (OSError, ValueError) as error:
        return f"{INPUTS} is damaged ({error})"
    for path, then in zip(files, [*states, *progress["current"]], strict=False):
        now = file_state(path)
        if (now["size"], now["modified"]) != (then["size"], then["modified"]):
            return f"{path} has changed since it was read"
    # Last: once they are read, the job cannot begin anew.
    for path, then in zip(files, states, strict=False):
        if is_stream(path):
            bar.write(f"{shown(path)}: read to see that it gives the same again", file=sys.stderr)
            if stream_sha256(path, reading) != then["sha256"]:
                raise InputSpent(
                    f"{folder}: {shown(path)} gives something else than when it was read: give the"
                    f" same as then to go on, or {removal(folder)}"
                )
    return None


def stream_sha256(path: str, reading: Reading) -> str:
    """The hash of all that a stream gives, as `_Run` takes it."""
    digest = hashlib.sha256()
    for document in raw_documents(path, reading, lambda line: None):
        digest.update(document.data or b"")
    return digest.hexdigest()


def removal(folder: Path) -> str:
    return f"remove {folder} to begin anew"


class InputHashes:
    """The sha256 of every input, taken by a thread while it is read for its documents. A context
    manager.

    That of a folder is of the lines `sha256sum` has for its files; what is neither has None.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[str | None]] = {}

    def __enter__(self) -> InputHashes:
        return self

    def __exit__(self, *exception) -> None:
        self._stopped.set()
        self._thread.shutdown(cancel_futures=True)

    def begin(self, number: int, path: str) -> None:
        """Have a file hashed, known by its number from now on."""
        self._coming[number] = self._thread.submit(self._digest, path)

    def take(self, number: int) -> str | None:
        """Return the hash of a file, once; None: it cannot be read."""
        return self._coming.pop(number).result()

    def _digest(self, path: str) -> str | None:
        try:
            if os.path.isfile(path):
                return self._digest_file(path)
            if not os.path.isdir(path):
                return None
            digest = hashlib.sha256()
            for part in content_files(path):
                line = f"{self._digest_file(part)}  {os.path.relpath(part, path)}\n"
                digest.update(line.encode(errors="surrogateescape"))
            return digest.hexdigest()
        except OSError:
            return None

    def _digest_file(self, path: str) -> str:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as content:
            while not self._stopped.is_set() and (chunk := content.read(1 << 20)):
                digest.update(chunk)
        return digest.hexdigest()
