"""Parquet: one document a row, with texts in columns of strings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from megalong.data.text.documents import BrokenDocument, RawDocument, Reading, as_text

NAME = "Parquet"
MAGIC = b"PAR1"  # how a file begins, and ends
_BATCH_BYTES = 1 << 22  # of text, about, that are decoded at a time
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20  # that are read of a column at a time


def is_parquet(path: str) -> bool:
    """Whether a file is of this format, whatever its name."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            file.seek(-len(MAGIC), os.SEEK_END)
            return file.read() == MAGIC
    return False


def raw_documents(path: str, reading: Reading) -> Iterator[RawDocument]:
    """The rows of a file. Its pages are read as they are needed, never a whole row group."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with _open(path) as file:
            names = file.schema_arrow.names
            missing = _missing(names, reading)
            if missing is not None:
                there = ", ".join(names)
                yield _cut_short(path, 1, f"no column {missing} (there are: {there})")
                return
            columns = _columns(file, reading)
            size_of_row = _Share(os.path.getsize(path), file.metadata.num_rows)
            for batch in _batches(file, columns, range(file.num_row_groups)):
                for data in _rows(batch, columns):
                    row += 1
                    yield RawDocument(NAME, path, row, data, None, size_of_row(row))
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        lost = f"unreadable from here on ({reason}): all further documents of the file are lost"
        yield _cut_short(path, row + 1, lost)


def texts(document: RawDocument, reading: Reading) -> dict[str, str | BrokenDocument]:
    """The texts of a row."""
    return {key: _text(document, key) for key in reading.keys}


def _text(document: RawDocument, key: str) -> str | BrokenDocument:
    if key not in document.data:
        return BrokenDocument(f"{document.place}: no column {key!r} of strings")
    data = document.data[key]
    if data is None:
        return BrokenDocument(f"{document.place}: {key!r} is not a string but null")
    try:
        return as_text(data, document)
    except BrokenDocument as error:
        return error


class _Share:
    """The bytes of a file that each of its rows accounts for: all of them, together."""

    def __init__(self, size: int, rows: int) -> None:
        self._size, self._rows = size, max(rows, 1)

    def __call__(self, row: int) -> int:
        """row: from 1."""
        return self._size * row // self._rows - self._size * (row - 1) // self._rows


def _open(path: str):
    from pyarrow.parquet import ParquetFile

    return ParquetFile(
        path, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
    )


def _missing(names: list[str], reading: Reading) -> str | None:
    """The columns without which no row has a text, in words; None: it may have."""
    if not set(reading.json_keys) & set(names):
        return " or ".join(map(repr, reading.json_keys))
    return None if {*reading.keys} - {*reading.json_keys} <= {*names} else repr(reading.prompt_key)


def _columns(file, reading: Reading) -> list[str]:
    """The keys that are columns of strings."""
    schema = file.schema_arrow
    return [key for key in reading.keys if key in schema.names and _is_text(schema.field(key).type)]


def _batches(file, columns: list[str], groups: Iterable[int]) -> Iterator:
    """Some rows at a time: fewer where they are long."""
    for group in groups:
        of_group = file.metadata.row_group(group)
        chunks = map(of_group.column, range(of_group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema in columns)
        rows = min(max(_BATCH_BYTES * of_group.num_rows // max(size, 1), 1), _BATCH_ROWS)
        yield from file.iter_batches(rows, row_groups=[group], columns=columns)


def _rows(batch, columns: list[str]) -> Iterator[dict[str, bytes | None]]:
    texts = {key: _bytes(batch.column(key)) for key in columns}
    for i in range(batch.num_rows):
        yield {key: texts[key][i].as_py() for key in columns}


def _is_text(kind) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _bytes(column):
    """A column of strings as bytes: what is not UTF-8 in it shows when a text is decoded."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary())


def _cut_short(path: str, row: int, problem: str) -> RawDocument:
    return RawDocument(NAME, path, row, None, problem, 0)
