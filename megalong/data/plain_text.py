"""Plain text: one document a file."""

import os
from collections.abc import Iterator, Sequence

from megalong.data.documents import (
    UNREADABLE,
    BrokenDocument,
    RawDocument,
    as_text,
    decompressed,
)

NAME = "plain text"


def raw_documents(path: str) -> Iterator[RawDocument]:
    """The file itself, which `texts` reads."""
    yield RawDocument(NAME, path, None, None, None, os.path.getsize(path))


def texts(document: RawDocument, keys: Sequence[str]) -> dict[str, str | BrokenDocument]:
    """The file's text, under the first key."""
    try:
        with open(document.path, "rb") as on_disk, decompressed(on_disk, document.path) as file:
            data = file.read()
    except UNREADABLE as error:
        raise BrokenDocument(f"{document.path}: unreadable ({error})") from None
    return {keys[0]: as_text(data, document)}
