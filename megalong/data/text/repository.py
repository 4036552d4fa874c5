"""Source code, one document a repository: the files of a folder in the order of their paths.

Each file is a line `==> PATH <==` with its path below the folder, its text, and an empty line (none
behind the last one). What is no text is left out: binary files and too large ones are counted,
files that are not UTF-8 or cannot be read are broken. Hidden files are no part of a repository.
"""

import os
from collections.abc import Iterator

from megalong.data.text import source_file
from megalong.data.text.documents import BrokenDocument, RawDocument, Reading
from megalong.data.text.files import content_files

NAME = "repository"


def raw_documents(path: str, reading: Reading) -> Iterator[RawDocument]:
    """The folder itself, whose files `texts` reads."""
    size = sum(map(os.path.getsize, content_files(path)))
    yield RawDocument(NAME, path, None, None, None, size)


def raw_documents_from(path: str, reading: Reading, share: float) -> Iterator[RawDocument]:
    """The files from this share of them on, each as a document."""
    files = content_files(path)
    for file in files[int(len(files) * share) :]:
        yield from source_file.raw_documents(file, reading)


def texts(document: RawDocument, reading: Reading) -> dict[str, str | BrokenDocument]:
    """The repository's text, under the first key; files without text by their paths."""
    found: dict[str, str | BrokenDocument] = {}
    parts = []
    for path in content_files(document.path):
        try:
            text = source_file.read(document, path, reading.max_file_size)
        except BrokenDocument as problem:
            found[path] = problem
            continue
        end = "" if text.endswith("\n") else "\n"
        parts.append(f"==> {os.path.relpath(path, document.path)} <==\n{text}{end}")
    if parts:
        found[reading.json_keys[0]] = "\n".join(parts)
    return found
