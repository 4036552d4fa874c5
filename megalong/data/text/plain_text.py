"""Plain text: one document a file."""

import os
from collections.abc import Iterator

from megalong.data.text.documents import BrokenDocument, RawDocument, Reading, as_text, is_binary
from megalong.data.text.files import UNREADABLE, decompressed, is_stream, open_file

NAME = "plain text"


def raw_documents(path: str, reading: Reading) -> Iterator[RawDocument]:
    """The file itself, which `texts` reads; a stream is read here."""
    if not is_stream(path):
        yield RawDocument(NAME, path, None, None, None, os.path.getsize(path))
        return
    try:
        with open_file(path) as on_disk, decompressed(on_disk, path) as file:
            data = file.read()
            yield RawDocument(NAME, path, None, data, None, on_disk.tell())
    except UNREADABLE as error:
        yield RawDocument(NAME, path, None, None, f"unreadable ({error})", 0)


def texts(document: RawDocument, reading: Reading) -> dict[str, str | BrokenDocument]:
    """The file's text, under the first key. Raises BrokenDocument for a binary file."""
    data = document.data
    if data is None:
        try:
            with (
                open_file(document.path) as on_disk,
                decompressed(on_disk, document.path) as file,
            ):
                data = file.read()
        except UNREADABLE as error:
            raise BrokenDocument(f"{document.path}: unreadable ({error})") from None
    text = as_text(data, document)
    if is_binary(data):  # as an archive of texts is
        raise BrokenDocument(f"{document.place}: binary")
    return {reading.json_keys[0]: text}
