"""Source code, one document a file, whatever its name: text as it is."""

import contextlib
import os
from collections.abc import Iterator

from megalong.data.text.documents import (
    BrokenDocument,
    LeftOut,
    RawDocument,
    Reading,
    as_text,
    is_binary,
)
from megalong.data.text.files import UNREADABLE

NAME = "source file"


def raw_documents(path: str, reading: Reading) -> Iterator[RawDocument]:
    """The file itself, which `texts` reads."""
    yield RawDocument(NAME, path, None, None, None, os.path.getsize(path))


def texts(document: RawDocument, reading: Reading) -> dict[str, str | BrokenDocument]:
    """The file's text, under the first key. Raises LeftOut for a binary or too large file."""
    return {reading.json_keys[0]: read(document, document.path, reading.max_file_size)}


def texts_of_folder(folder: str, max_file_size: int) -> Iterator[str]:
    """The texts of the files that lie in a folder itself, by name; what is no text, a link
    or larger than max_file_size bytes is left out."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_file(follow_symlinks=False):
            document = RawDocument(NAME, entry.path, None, None, None, 0)
            with contextlib.suppress(BrokenDocument):
                yield read(document, entry.path, max_file_size)


def read(document: RawDocument, path: str, max_file_size: int) -> str:
    """The text of a file that is a document or a part of one. Raises BrokenDocument, LeftOut."""
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
