"""Text documents on their way in: what is read, and what is odd in it.

Which files there are: `megalong.data.text.files`. Their formats: `megalong.data.formats`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from megalong.data.text.files import COMPRESSIONS, shown
from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm

_LOOKED_AT = 8000  # bytes
NAMED_REMARKS = 100  # so many are said one by one

# What is a document: "auto": a line of JSON lines, a row of Parquet, any other file; "file" and
# "repository": of source code, where a file is plain text whatever its name.
DOCUMENTS = ("auto", "file", "repository")


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    json_keys: keys of JSON lines and columns of Parquet with text; any other text has the first.
    prompt_key: the one of a prompt, which such a text is the answer to; any other text has none.
    documents: one of DOCUMENTS. max_file_size: bytes; larger files of source code are left out.
    """

    json_keys: tuple[str, ...] = ("text",)
    documents: str = "auto"
    max_file_size: int = 1 << 20
    prompt_key: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that are read."""
        return self.json_keys if self.prompt_key is None else (*self.json_keys, self.prompt_key)


class BrokenDocument(ValueError):
    """A document that cannot be used, and is left out. The message says where it is and why."""


class LeftOut(BrokenDocument):
    """A file that is not meant to be read, as binary ones among source code. kind: what it is, in
    the singular: "binary file"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RawDocument(NamedTuple):
    """A document not yet decoded.

    format: of the file, by its name in `megalong.data.formats`. path: the file, or the folder.
    line: its line number (in Parquet: row), from 1, or None for a file that is one document.
    data: its bytes, as the format has cut them out, or those of each of its texts (None: there is
        none); None where `texts` is to read the file itself.
    error: why the rest of the file cannot be read, None for a document in order.
    size: bytes of the file on disk that it accounts for (compressed bytes for .gz).
    """

    format: str
    path: str
    line: int | None
    data: bytes | Mapping[str, bytes | None] | None
    error: str | None
    size: int

    @property
    def place(self) -> str:
        path = shown(self.path)
        return path if self.line is None else f"{path}:{self.line}"

    @property
    def weight(self) -> int:
        """Bytes of text, about."""
        if self.data is None:
            return self.size
        if isinstance(self.data, bytes):
            return len(self.data)
        return sum(len(data or b"") for data in self.data.values())


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


def is_binary(data: bytes) -> bool:
    """Whether a file with this content is none of text: a NUL is near its beginning, as git has
    it."""
    return b"\0" in data[:_LOOKED_AT]


def as_text(data: bytes, document: RawDocument) -> str:
    """Bytes as UTF-8. Raises BrokenDocument."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start})"
        for compression in COMPRESSIONS:
            if compression.begins(data):
                problem = f"compressed with {compression.name}"
        raise BrokenDocument(f"{document.place}: {problem}") from None


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """--input and what belongs to it."""
    add = parser.add_argument
    default = Reading()
    add(
        "--input",
        nargs="+",
        required=True,
        help="files, folders, glob patterns, and JSON lines from - (standard input), <(command)"
        " or a named pipe",
    )
    add(
        "--json-keys",
        nargs="+",
        default=list(default.json_keys),
        help="keys of JSON lines, or columns of Parquet, that hold text; of preprocess_data.py one"
        " output each. Any other text goes to the first",
    )
    add(
        "--documents",
        choices=DOCUMENTS,
        default=default.documents,
        help="what is a document. auto: a line of JSON lines, a row of Parquet, any other file;"
        " file: a file, whatever its name (source code; of a stream, plain text);"
        " repository: all files of a folder, each behind a line with its path. An input folder"
        " with files of its own is a repository, one of folders only stands for these",
    )
    add(
        "--max-file-size",
        type=int,
        default=default.max_file_size,
        help="bytes; larger files are left out where --documents is file or repository, and so are"
        " binary ones",
    )


def reading_of(args: argparse.Namespace) -> Reading:
    """How the flags say that text is read. Raises UserError."""
    keys = args.json_keys
    if len(set(keys)) != len(keys):
        raise UserError(f"--json-keys {' '.join(keys)}: a key is named twice")
    if args.max_file_size < 1:
        raise UserError("--max-file-size must be positive")
    return Reading(tuple(keys), args.documents, args.max_file_size)
