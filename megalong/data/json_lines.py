"""JSON lines: one document a line, an object with texts under its keys."""

import json
from collections.abc import Iterator

from megalong.data.documents import (
    UNREADABLE,
    BrokenDocument,
    RawDocument,
    as_text,
    decompressed,
)


def raw_documents(path: str) -> Iterator[RawDocument]:
    """The lines of a file."""
    line, position = 0, 0
    try:
        with open(path, "rb") as on_disk, decompressed(on_disk, path) as lines:
            for data in lines:
                line += 1
                size = len(data) if lines is on_disk else on_disk.tell() - position
                position += size
                yield RawDocument(path, line, data, None, size)
    except UNREADABLE as error:
        yield RawDocument(path, line + 1, None, f"unreadable from here on ({error})", 0)


def texts(document: RawDocument, keys: list[str]) -> dict[str, str | BrokenDocument]:
    """The texts of a line's object under these keys. A blank line has none."""
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
        kind = type(record).__name__
        raise BrokenDocument(f"{document.place}: a JSON object is expected, not a {kind}")
    return {key: _value(record, key, document) for key in keys}


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
