"""The formats of data, in two tables: files of text, and tokens to train on.

Reading text is in two steps, so that the costly second one can run in other processes. A format of
text is a module with two functions, `raw_documents` and `texts`, which do what those of this module
do, for files of one kind. A format of tokens is a class like `megalong.data.stream.Documents`.
To add one: a file in this folder, and a line in its table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pkgutil import resolve_name
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from megalong.data import json_lines, plain_text
from megalong.data.documents import BrokenDocument, RawDocument

if TYPE_CHECKING:
    from megalong.data.stream import Documents

# By the suffix of a file, less .gz; any other file is plain text.
TEXT = MappingProxyType({".jsonl": json_lines, ".json": json_lines})

# By the suffix that makes the prefix of --data-path a file; imported when it is needed. The first
# is what a prefix of no file is taken for.
TOKENS = MappingProxyType({".idx": "megalong.data.indexed:IndexedDocuments"})


def raw_documents(path: str) -> Iterator[RawDocument]:
    """Yields the documents of one file in order, not yet decoded. Never raises for what is wrong in
    the file: an unreadable rest of it becomes one last RawDocument with `error` set."""
    return _text_format(path).raw_documents(path)


def texts(document: RawDocument, json_keys: list[str]) -> dict[str, str | BrokenDocument]:
    """The text of a document under each key, or the reason why there is none.

    A format without keys has one text, under the first key. An empty record gives {}.
    Raises BrokenDocument where the document is unusable under every key.
    """
    if document.error:
        raise BrokenDocument(f"{document.place}: {document.error}")
    return _text_format(document.path).texts(document, json_keys)


def open_documents(prefix: str) -> Documents:
    """The documents that --data-path names. Raises UserError: there are none, or what is wrong."""
    found = (suffix for suffix in TOKENS if os.path.isfile(prefix + suffix))
    return resolve_name(TOKENS[next(found, next(iter(TOKENS)))])(prefix)


def _text_format(path: str) -> ModuleType:
    suffix = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    return TEXT.get(suffix, plain_text)
