"""JSON lines: one document a line, an object with texts under its keys."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator

from megalong.data.text.documents import BrokenDocument, RawDocument, Reading, as_text
from megalong.data.text.files import (
    UNREADABLE,
    compression_of,
    decompressed,
    is_stream,
    open_file,
    shown,
)
from megalong.data.text.parquet import MAGIC as PARQUET
from megalong.utils.errors import UserError

NAME = "JSON lines"
_KINDS = {
    dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number",
    bool: "a truth value", type(None): "null",
}  # fmt: skip
_LONGEST_FIRST_LINE = 1 << 24  # bytes, of a file whose name does not say what it is
_LONGEST_LINE = 1 << 30  # bytes; whatever is longer has no lines


def raw_documents(path: str, reading: Reading) -> Iterator[RawDocument]:
    """The lines of a file. Raises UserError for a stream of Parquet."""
    line, position = 0, 0
    try:
        with open_file(path) as on_disk, decompressed(on_disk, path) as lines:
            if is_stream(path) and on_disk.peek(len(PARQUET)).startswith(PARQUET):
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
                yield RawDocument(NAME, path, line, data, None, size)
    except UNREADABLE as error:
        lost = f"unreadable from here on ({error}): all further documents of the file are lost"
        yield RawDocument(NAME, path, line + 1, None, lost, 0)


def raw_documents_from(path: str, reading: Reading, share: float) -> Iterator[RawDocument]:
    """The lines behind this share of a file, or all lines of a compressed one."""
    with contextlib.suppress(*UNREADABLE), open_file(path) as lines:
        if compression_of(lines, path):
            yield from raw_documents(path, reading)
            return
        lines.seek(int(os.path.getsize(path) * share))
        lines.readline(_LONGEST_LINE)
        while data := lines.readline(_LONGEST_LINE):
            yield RawDocument(NAME, path, None, data, None, len(data))


def first_object(path: str) -> dict | None:
    """What the first line holds that is not blank, if that is an object and the next line begins
    with one too: such a file is JSON lines, whatever its name."""
    with contextlib.suppress(*UNREADABLE, ValueError, RecursionError), open(path, "rb") as on_disk:
        file = decompressed(on_disk, path)
        lines = iter(lambda: file.readline(_LONGEST_FIRST_LINE), b"")
        first, second = itertools.islice(itertools.chain(filter(bytes.strip, lines), [b"{"]), 2)
        first = first.removeprefix(b"\xef\xbb\xbf").lstrip()
        if first.startswith(b"{") and second.lstrip().startswith(b"{"):
            record = json.loads(first)
            return record if isinstance(record, dict) else None
    return None


def texts(document: RawDocument, reading: Reading) -> dict[str, str | BrokenDocument]:
    """The texts of a line's object. A blank line has none."""
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
    return {key: _value(record, key, document) for key in reading.keys}


def _value(record: dict, key: str, document: RawDocument) -> str | BrokenDocument:
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
