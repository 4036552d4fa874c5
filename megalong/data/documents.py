"""Text documents on their way in: which files there are, and what is read from one.

The formats of the files: `megalong.data.formats`.
"""

import glob
import gzip
import os
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megalong.errors import UserError

# What reading a file may raise, where it is damaged or cannot be read.
UNREADABLE = (OSError, EOFError, zlib.error)


class BrokenDocument(ValueError):
    """A document that cannot be used, and is left out. The message says where it is and why."""


class RawDocument(NamedTuple):
    """A document not yet decoded.

    path: the file. line: its line number, from 1, or None for a file that is one document.
    data: its bytes, as the format has cut them out; None where `texts` is to read the file itself.
    error: why the rest of the file cannot be read, None for a document in order.
    size: bytes of the file on disk that it accounts for (compressed bytes for .gz).
    """

    path: str
    line: int | None
    data: bytes | None
    error: str | None
    size: int

    @property
    def place(self) -> str:
        return self.path if self.line is None else f"{self.path}:{self.line}"


def find_files(inputs: list[str]) -> list[str]:
    """The files that files, folders (searched for files at any depth) and glob patterns name.

    In the order of `inputs`, sorted inside a folder or pattern, each file once. Hidden files and
    folders inside a folder are left out. Raises UserError for an input that names nothing.
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
        raise BrokenDocument(f"{document.place}: not UTF-8 (byte {error.start})") from None
