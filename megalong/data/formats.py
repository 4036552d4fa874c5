"""The formats of data, in two tables: files of text, and tokens to train on.

Reading text is in two steps, so that the costly second one can run in other processes. A format of
text is a module with a NAME and two functions, `raw_documents` and `texts`, which do what those of
this module do, for files of one kind; where it can, `raw_documents_from` too. A format of tokens is
a class like `megalong.data.stream.Documents`. To add one: a file in this folder, and a line in its
table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from megalong.data.text import json_lines, parquet, plain_text, repository, source_file
from megalong.data.text.documents import BrokenDocument, RawDocument, Reading
from megalong.data.text.files import check_pyarrow, is_stream, without_compression

if TYPE_CHECKING:
    from megalong.data.stream import Documents

_MODULES = (json_lines, parquet, plain_text, source_file, repository)
TEXT = MappingProxyType({module.NAME: module for module in _MODULES})

# By the suffix of a file, less that of its compression; of any other its content decides.
_SUFFIXES = MappingProxyType(
    dict.fromkeys((".jsonl", ".json", ".ndjson"), json_lines) | {".parquet": parquet}
)

# By the suffix that makes the prefix of --data-path a file; imported when it is needed. The first
# is what a prefix of no file is taken for.
TOKENS = MappingProxyType({".idx": "megalong.data.indexed:IndexedDocuments"})
# Many .bin/.idx pairs as one.
SHARDS = "megalong.data.shards:ShardedDocuments"


def raw_documents(
    path: str, reading: Reading, say: Callable[[str], object]
) -> Iterator[RawDocument]:
    """Yields the documents of one file in order, not yet decoded. Never raises for what is wrong in
    the file: an unreadable rest of it becomes one last RawDocument with `error` set. Raises
    UserError where something else has to be given: for Parquet from a stream, or without pyarrow.

    say: hears a line where the content of the file is not what its name promises.
    """
    return _text_format(path, reading, say).raw_documents(path, reading)


def raw_documents_from(path: str, reading: Reading, share: float) -> Iterator[RawDocument]:
    """As `raw_documents`, from about this share of the file on, where its format can begin there;
    else from its beginning. The lines of these documents are not numbered."""
    module = _text_format(path, reading, lambda line: None)
    begin = getattr(module, "raw_documents_from", None)
    return begin(path, reading, share) if begin else module.raw_documents(path, reading)


def texts(document: RawDocument, reading: Reading) -> dict[str, str | BrokenDocument]:
    """The text of a document under each key, or the reason why there is none.

    A format without keys has one text, under the first key, and no prompt. An empty record gives
    {}. What else is wrong in a document stands under other keys.
    Raises BrokenDocument where the document is unusable under every key.
    """
    if document.error:
        raise BrokenDocument(f"{document.place}: {document.error}")
    return TEXT[document.format].texts(document, reading)


def open_documents(path: str, place: str | None = None) -> Documents:
    """The documents of the prefix of a file; or of many, where there is no such file, but a folder,
    or where the path is a pattern.

    place: the flag, or the file, that names the path, and the path, for errors; None: --data-path.
    Raises UserError: there are none, or what is wrong.
    """
    return resolve_name(token_format(path))(path, place)


def token_format(path: str) -> str:
    """Which of `TOKENS` a path is, or SHARDS."""
    kinds = [kind for suffix, kind in TOKENS.items() if os.path.isfile(path + suffix)]
    if os.path.isdir(path) or any(sign in path for sign in "*?["):
        kinds.append(SHARDS)
    return [*kinds, *TOKENS.values()][0]


def _text_format(path: str, reading: Reading, say: Callable[[str], object]) -> ModuleType:
    if is_stream(path):
        return json_lines if reading.documents == "auto" else plain_text
    if reading.documents != "auto":
        return repository if reading.documents == "repository" else source_file
    suffix = os.path.splitext(without_compression(path)[0])[1]
    if suffix != ".parquet" and parquet.is_parquet(path):
        check_pyarrow(path)
        say(f"{path}: taken for Parquet, which it holds, whatever its name")
        return parquet
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    record = json_lines.first_object(path)
    if record is None:
        return plain_text
    if any(key in record for key in reading.json_keys):
        say(f"{path}: taken for JSON lines, which it holds, whatever its name")
        return json_lines
    say(
        f"{path}: taken for one document of plain text, though its lines are JSON objects, for want"
        f" of a key {' or '.join(map(repr, reading.json_keys))}"
    )
    return plain_text
