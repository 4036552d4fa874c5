"""The formats of text: JSON lines, plain text, source files and repositories, and Parquet.

Reading text is in two steps, so that the costly second one can run in other processes:
`raw_documents` cuts a file into documents, `texts` decodes one. To add a format: two such functions
for files of one kind, and a line in FORMATS.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import NamedTuple

from megalong.data.text import parquet
from megalong.data.text.documents import (
    BrokenDocument,
    LeftOut,
    RawDocument,
    Reading,
    as_text,
    is_binary,
)
from megalong.data.text.files import (
    UNREADABLE,
    check_pyarrow,
    content_files,
    decompressed,
    is_stream,
    open_file,
    shown,
    without_compression,
)
from megalong.utils.errors import UserError

Texts = dict[str, str | BrokenDocument]

_KINDS = {
    dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number",
    bool: "a truth value", type(None): "null",
}  # fmt: skip
_LONGEST_FIRST_LINE = 1 << 24  # bytes, of a file whose name does not say what it is
_LONGEST_LINE = 1 << 30  # bytes; whatever is longer has no lines


def raw_documents(
    path: str, reading: Reading, say: Callable[[str], object]
) -> Iterator[RawDocument]:
    """Yield the documents of one file in order, not yet decoded.

    An unreadable rest of the file becomes one last RawDocument with `error` set.

    Args:
        say: hears a line where the content of the file is not what its name promises.

    Raises:
        UserError: something else has to be given, for Parquet from a stream or without pyarrow.
    """
    return FORMATS[_format_name(path, reading, say)].raw_documents(path, reading)


def texts(document: RawDocument, reading: Reading) -> Texts:
    """Return the text of a document under each key, or the reason why there is none.

    A format without keys has one text, under the first key, and no prompt. An empty record gives
    {}. What else is wrong in a document stands under other keys.

    Raises:
        BrokenDocument: the document is unusable under every key.
    """
    if document.error:
        raise BrokenDocument(f"{document.place}: {document.error}")
    return FORMATS[document.format].texts(document, reading)


def texts_of_folder(folder: str, max_file_size: int) -> Iterator[str]:
    """Yield the texts of the files directly in a folder, by name, without links, what is no text,
    and files of more than max_file_size bytes."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_file(follow_symlinks=False):
            document = RawDocument(SOURCE_FILE, entry.path, None, None, None, 0)
            with contextlib.suppress(BrokenDocument):
                yield _read_source(document, entry.path, max_file_size)


def _format_name(path: str, reading: Reading, say: Callable[[str], object]) -> str:
    if is_stream(path):
        return JSON_LINES if reading.documents == "auto" else PLAIN_TEXT
    if reading.documents != "auto":
        return REPOSITORY if reading.documents == "repository" else SOURCE_FILE
    suffix = os.path.splitext(without_compression(path)[0])[1]
    if suffix == ".parquet":
        return parquet.NAME
    if parquet.is_parquet(path):
        check_pyarrow(path)
        say(f"{path}: taken for Parquet, which it holds, whatever its name")
        return parquet.NAME
    if suffix in (".jsonl", ".json", ".ndjson"):
        return JSON_LINES
    record = _first_object(path)
    if record is None:
        return PLAIN_TEXT
    if any(key in record for key in reading.json_keys):
        say(f"{path}: taken for JSON lines, which it holds, whatever its name")
        return JSON_LINES
    say(
        f"{path}: taken for one document of plain text, though its lines are JSON objects, for want"
        f" of a key {' or '.join(map(repr, reading.json_keys))}"
    )
    return PLAIN_TEXT


def _first_object(path: str) -> dict | None:
    """Return the object in the first line that is not blank, if the next line begins with one too:
    such a file is JSON lines, whatever its name."""
    with contextlib.suppress(*UNREADABLE, ValueError, RecursionError), open(path, "rb") as on_disk:
        file = decompressed(on_disk, path)
        lines = iter(lambda: file.readline(_LONGEST_FIRST_LINE), b"")
        first, second = itertools.islice(itertools.chain(filter(bytes.strip, lines), [b"{"]), 2)
        first = first.removeprefix(b"\xef\xbb\xbf").lstrip()
        if first.startswith(b"{") and second.lstrip().startswith(b"{"):
            record = json.loads(first)
            return record if isinstance(record, dict) else None
    return None


def _json_lines(path: str, reading: Reading) -> Iterator[RawDocument]:
    line, position = 0, 0
    try:
        with open_file(path) as on_disk, decompressed(on_disk, path) as lines:
            magic = parquet.MAGIC
            if is_stream(path) and on_disk.peek(len(magic)).startswith(magic):
                raise UserError(
                    f"{shown(path)}: Parquet, which is read from its end and so from no stream:"
                    " write it to a file, and give its name to --input"
                )
            while data := lines.readline(_LONGEST_LINE):
                if len(data) == _LONGEST_LINE:
                    raise EOFError(f"a line of more than {_LONGEST_LINE:,} bytes")
                line += 1
                size = len(data) if lines is on_disk else on_disk.tell() - position
                position += size
                yield RawDocument(JSON_LINES, path, line, data, None, size)
    except UNREADABLE as error:
        lost = f"unreadable from here on ({error}): all further documents of the file are lost"
        yield RawDocument(JSON_LINES, path, line + 1, None, lost, 0)


def _texts_of_line(document: RawDocument, reading: Reading) -> Texts:
    text = as_text(document.data, document)
    if document.line == 1:
        text = text.removeprefix("\ufeff")  # a byte order mark is no part of JSON
    if not text.strip():
        return {}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenDocument(f"{document.place}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise BrokenDocument(
            f"{document.place}: a JSON object is expected, not {_KINDS[type(record)]}"
        )
    return {key: _json_value(record, key, document) for key in reading.keys}


def _json_value(record: dict, key: str, document: RawDocument) -> str | BrokenDocument:
    if key not in record:
        return BrokenDocument(f"{document.place}: no key {key!r}")
    value = record[key]
    if not isinstance(value, str):
        return BrokenDocument(
            f"{document.place}: {key!r} is not a string but {_KINDS[type(value)]}"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair; UTF-8 cannot hold it
        return BrokenDocument(f"{document.place}: {key!r} holds a lone surrogate, not Unicode text")
    return value


def _plain_text(path: str, reading: Reading) -> Iterator[RawDocument]:
    """Yield the file itself, which `texts` reads; a stream is read here."""
    if not is_stream(path):
        yield RawDocument(PLAIN_TEXT, path, None, None, None, os.path.getsize(path))
        return
    try:
        with open_file(path) as on_disk, decompressed(on_disk, path) as file:
            data = file.read()
            yield RawDocument(PLAIN_TEXT, path, None, data, None, on_disk.tell())
    except UNREADABLE as error:
        yield RawDocument(PLAIN_TEXT, path, None, None, f"unreadable ({error})", 0)


def _text_of_plain(document: RawDocument, reading: Reading) -> Texts:
    data, path = document.data, document.path
    if data is None:
        try:
            with open_file(path) as on_disk, decompressed(on_disk, path) as file:
                data = file.read()
        except UNREADABLE as error:
            raise BrokenDocument(f"{path}: unreadable ({error})") from None
    text = as_text(data, document)
    if is_binary(data):  # as an archive of texts is
        raise BrokenDocument(f"{document.place}: binary")
    return {reading.json_keys[0]: text}


def _source_file(path: str, reading: Reading) -> Iterator[RawDocument]:
    yield RawDocument(SOURCE_FILE, path, None, None, None, os.path.getsize(path))


def _text_of_source(document: RawDocument, reading: Reading) -> Texts:
    return {reading.json_keys[0]: _read_source(document, document.path, reading.max_file_size)}


def _read_source(document: RawDocument, path: str, max_file_size: int) -> str:
    """Return the text of a file that is a document or a part of one. Raises BrokenDocument,
    LeftOut."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_file_size:
                raise LeftOut("too large file", f"{path}: {size:,} bytes")
            data = file.read()
    except UNREADABLE as error:
        raise BrokenDocument(f"{path}: unreadable ({error})") from None
    if is_binary(data):
        raise LeftOut("binary file", f"{path}: binary")
    return as_text(data, document._replace(path=path))


def _repository(path: str, reading: Reading) -> Iterator[RawDocument]:
    size = sum(map(os.path.getsize, content_files(path)))
    yield RawDocument(REPOSITORY, path, None, None, None, size)


def _text_of_repository(document: RawDocument, reading: Reading) -> Texts:
    """Join the files of a folder in the order of their paths.

    Each is a line `==> PATH <==`, its text, and an empty line (none behind the last one). What is
    no text stands under its path: binary, too large and broken files.
    """
    found: Texts = {}
    parts = []
    for path in content_files(document.path):
        try:
            text = _read_source(document, path, reading.max_file_size)
        except BrokenDocument as problem:
            found[path] = problem
            continue
        end = "" if text.endswith("\n") else "\n"
        parts.append(f"==> {os.path.relpath(path, document.path)} <==\n{text}{end}")
    if parts:
        found[reading.json_keys[0]] = "\n".join(parts)
    return found


class Format(NamedTuple):
    """The two steps of reading files of one kind, as `raw_documents` and `texts` of this module."""

    raw_documents: Callable[[str, Reading], Iterator[RawDocument]]
    texts: Callable[[RawDocument, Reading], Texts]


JSON_LINES, PLAIN_TEXT = "JSON lines", "plain text"
SOURCE_FILE, REPOSITORY = "source file", "repository"
FORMATS = MappingProxyType(
    {
        JSON_LINES: Format(_json_lines, _texts_of_line),
        parquet.NAME: Format(parquet.raw_documents, parquet.texts),
        PLAIN_TEXT: Format(_plain_text, _text_of_plain),
        SOURCE_FILE: Format(_source_file, _text_of_source),
        REPOSITORY: Format(_repository, _text_of_repository),
    }
)
