"""The formats of data, in two tables: files of text, and tokens to train on.

Reading text is in two steps, so that the costly second one can run in other processes. A format of
text is a module with two functions, `raw_documents` and `texts`, which do what those of this module
do, for files of one kind, and a NAME. A format of tokens is a class like
`megalong.data.stream.Documents`. To add one: a file in this folder, and a line in its table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pkgutil import resolve_name
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from megalong.data import json_lines, plain_text
from megalong.data.documents import BrokenDocument, RawDocument

if TYPE_CHECKING:
    from megalong.data.stream import Documents

TEXT = MappingProxyType({module.NAME: module for module in (json_lines, plain_text)})

# By the suffix of a file, less .gz; of any other its content decides.
_SUFFIXES = MappingProxyType(dict.fromkeys((".jsonl", ".json", ".ndjson"), json_lines))

# By the suffix that makes the prefix of --data-path a file; imported when it is needed. The first
# is what a prefix of no file is taken for.
TOKENS = MappingProxyType({".idx": "megalong.data.indexed:IndexedDocuments"})
# Many .bin/.idx pairs as one.
SHARDS = "megalong.data.shards:ShardedDocuments"


def raw_documents(
    path: str, json_keys: Sequence[str], say: Callable[[str], object]
) -> Iterator[RawDocument]:
    """Yields the documents of one file in order, not yet decoded. Never raises for what is wrong in
    the file: an unreadable rest of it becomes one last RawDocument with `error` set.

    say: hears a line where the content of the file is not what its name promises.
    """
    return _text_format(path, json_keys, say).raw_documents(path)


def texts(document: RawDocument, json_keys: Sequence[str]) -> dict[str, str | BrokenDocument]:
    """The text of a document under each key, or the reason why there is none.

    A format without keys has one text, under the first key. An empty record gives {}.
    Raises BrokenDocument where the document is unusable under every key.
    """
    if document.error:
        raise BrokenDocument(f"{document.place}: {document.error}")
    return TEXT[document.format].texts(document, json_keys)


def open_documents(path: str, place: str | None = None) -> Documents:
    """The documents of the prefix of a file; or of many, where there is no such file, but a folder,
    or where the path is a pattern.

    place: the flag, or the file, that names the path, and the path, for errors; None: --data-path.
    Raises UserError: there are none, or what is wrong.
    """
    kinds = [kind for suffix, kind in TOKENS.items() if os.path.isfile(path + suffix)]
    if os.path.isdir(path) or any(sign in path for sign in "*?["):
        kinds.append(SHARDS)
    return resolve_name([*kinds, *TOKENS.values()][0])(path, place)


def _text_format(path: str, json_keys: Sequence[str], say: Callable[[str], object]) -> ModuleType:
    suffix = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    record = json_lines.first_object(path)
    if record is None:
        return plain_text
    if any(key in record for key in json_keys):
        say(f"{path}: taken for JSON lines, which it holds, whatever its name")
        return json_lines
    say(
        f"{path}: taken for one document of plain text, though its lines are JSON objects, for want"
        f" of a key {' or '.join(map(repr, json_keys))}"
    )
    return plain_text
