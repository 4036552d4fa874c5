"""Reading text documents: which files, which documents in them, which texts in a document.

Two kinds of file, plain or gzipped: JSON lines (.jsonl, .json), one document a line; and
anything else, which is plain text, one document a file. Reading is in two steps, so that the
costly second one can run in other processes: raw_documents() cuts a file into raw documents,
texts() decodes one. Both keep file boundaries and line numbers, to name what is broken.
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megalong.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


class BrokenDocument(ValueError):
    """A document that cannot be used. The message says where it is and why."""


class RawDocument(NamedTuple):
    """A document not yet decoded.

    path: the file. line: its line number, from 1, or None for a file that is one document.
    data: the line's bytes; None where texts() is to read the file itself.
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


def is_json_lines(path: str) -> bool:
    """Whether a file is JSON lines, by its name; the others are plain text."""
    return path.lower().endswith(JSON_SUFFIXES)


def raw_documents(path: str) -> Iterator[RawDocument]:
    """Yields the documents of one file in order. Never raises for what is wrong in the file: an
    unreadable rest of it becomes one last RawDocument with `error` set."""
    if not is_json_lines(path):
        yield RawDocument(path, None, None, None, os.path.getsize(path))
        return
    line, position = 0, 0
    try:
        with open(path, "rb") as on_disk, _decompressed(on_disk, path) as lines:
            for data in lines:
                line += 1
                size = len(data) if lines is on_disk else on_disk.tell() - position
                position += size
                yield RawDocument(path, line, data, None, size)
    except (OSError, EOFError, zlib.error) as error:
        yield RawDocument(path, line + 1, None, f"unreadable from here on ({error})", 0)


def _decompressed(on_disk: BinaryIO, path: str) -> BinaryIO:
    return gzip.GzipFile(fileobj=on_disk) if path.lower().endswith(".gz") else on_disk


def texts(document: RawDocument, json_keys: list[str]) -> dict[str, str | BrokenDocument]:
    """The text of a document under each key, or the reason why there is none.

    A plain text file has one text, under the first key. A blank line gives {}.
    Raises BrokenDocument where the document is unusable under every key.
    """
    if document.error:
        raise BrokenDocument(f"{document.place}: {document.error}")
    data = _read_file(document) if document.data is None else document.data
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BrokenDocument(f"{document.place}: not UTF-8 (byte {error.start})") from None
    if document.line is None:
        return {json_keys[0]: text}

    if document.line == 1:
        text = text.removeprefix("\ufeff")  # a byte order mark is no part of JSON
    if not text.strip():
        return {}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenDocument(f"{document.place}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise BrokenDocument(f"{document.place}: a JSON object is expected, not a {kind}")
    return {key: _value(record, key, document) for key in json_keys}


def _read_file(document: RawDocument) -> bytes:
    try:
        data = Path(document.path).read_bytes()
        return gzip.decompress(data) if document.path.lower().endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise BrokenDocument(f"{document.path}: unreadable ({error})") from None


def _value(record: dict, key: str, document: RawDocument) -> str | BrokenDocument:
    if key not in record:
        return BrokenDocument(f"{document.place}: no key {key!r}")
    value = record[key]
    if not isinstance(value, str):
        kind = type(value).__name__
        return BrokenDocument(f"{document.place}: {key!r} is not a string but a {kind}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair; UTF-8 cannot hold it
        return BrokenDocument(f"{document.place}: {key!r} holds a lone surrogate, not Unicode text")
    return value
