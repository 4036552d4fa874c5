"""Text documents on their way in: which files there are, and what is read from one.

The formats of the files: `megalong.data.formats`.
"""

from __future__ import annotations

import glob
import gzip
import os
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from megalong.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm

# What reading a file may raise, where it is damaged or cannot be read.
UNREADABLE = (OSError, EOFError, zlib.error)

# How compressed files begin, and the suffixes of those that are not read.
_COMPRESSED = {
    b"\x1f\x8b": "gzip, without a name in .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard, which is not supported yet",
    b"\xfd7zXZ": "xz, which is not supported",
    b"BZh": "bzip2, which is not supported",
    b"PK\x03\x04": "zip, which is not supported",
}
_NOT_SUPPORTED = (".zst", ".xz", ".bz2", ".lz4", ".zip")
_TEXTS = (".jsonl", ".json", ".ndjson", ".txt")
NAMED_REMARKS = 100  # so many are said one by one


class BrokenDocument(ValueError):
    """A document that cannot be used, and is left out. The message says where it is and why."""


class RawDocument(NamedTuple):
    """A document not yet decoded.

    format: of the file, by its name in `megalong.data.formats`. path: the file.
    line: its line number, from 1, or None for a file that is one document.
    data: its bytes, as the format has cut them out; None where `texts` is to read the file itself.
    error: why the rest of the file cannot be read, None for a document in order.
    size: bytes of the file on disk that it accounts for (compressed bytes for .gz).
    """

    format: str
    path: str
    line: int | None
    data: bytes | None
    error: str | None
    size: int

    @property
    def place(self) -> str:
        return self.path if self.line is None else f"{self.path}:{self.line}"


class Remarks:
    """What is odd in the input, said on standard error above a progress bar: the first hundred
    lines; all that is skipped is counted.

    skipped: broken documents, and rests of files that cannot be read.
    """

    def __init__(self, progress: tqdm):
        self.skipped = 0
        self._progress, self._said = progress, 0

    def say(self, line: str) -> None:
        """One line, unless there have been many."""
        self._said += 1
        if self._said <= NAMED_REMARKS:
            self._progress.write(line, file=sys.stderr)
        if self._said == NAMED_REMARKS:
            self._progress.write(
                f"{NAMED_REMARKS} problems named; further ones are only counted", file=sys.stderr
            )

    def skip(self, problem: str | BrokenDocument) -> None:
        """A document that is left out."""
        self.skipped += 1
        self.say(f"skipped {problem}")


def find_files(inputs: list[str]) -> list[str]:
    """The files that files, folders (searched for files at any depth) and glob patterns name.

    In the order of `inputs`, sorted inside a folder or pattern, each file once. Hidden files and
    folders inside a folder are left out. Raises UserError for an input that names nothing, and for
    compressed text that cannot be read.
    """
    files: list[str] = []
    for name in inputs:
        if os.path.isfile(name):
            files.append(name)
            continue
        matches = [name] if os.path.isdir(name) else sorted(glob.glob(name, recursive=True))
        found = [file for match in matches for file in _files_below(match)]
        if not found:
            what = "an empty folder" if os.path.isdir(name) else "no such file, folder or match"
            raise UserError(f"--input {name}: {what}")
        files += found
    for file in files:
        name, suffix = os.path.splitext(file.lower())
        if suffix in _NOT_SUPPORTED and (file in inputs or name.endswith(_TEXTS)):
            raise UserError(
                f"--input {file}: {suffix} is not supported: decompress it, or compress it with"
                " gzip, as .gz"
            )
    return list(dict.fromkeys(files))


def _files_below(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return [
        str(file)
        for file in sorted(Path(path).rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]


def decompressed(on_disk: BinaryIO, path: str) -> BinaryIO:
    """The content of an open file: what it unpacks to, if its name ends in .gz."""
    return gzip.GzipFile(fileobj=on_disk) if path.lower().endswith(".gz") else on_disk


def as_text(data: bytes, document: RawDocument) -> str:
    """Bytes as UTF-8. Raises BrokenDocument."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start})"
        for begin, kind in _COMPRESSED.items():
            if data.startswith(begin):
                problem = f"compressed with {kind}"
        raise BrokenDocument(f"{document.place}: {problem}") from None
