"""The flags of tools that say what text is read, and how."""

from __future__ import annotations

import argparse

from megalong.data.text.documents import DOCUMENTS, Reading
from megalong.utils.errors import UserError


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """--input and what belongs to it."""
    add = parser.add_argument
    default = Reading()
    add(
        "--input",
        nargs="+",
        required=True,
        help="files, folders, glob patterns, and JSON lines from - (standard input), <(command)"
        " or a named pipe",
    )
    add(
        "--json-keys",
        nargs="+",
        default=list(default.json_keys),
        help="keys of JSON lines, or columns of Parquet, that hold text; of preprocess_data.py one"
        " output each. Any other text goes to the first",
    )
    add(
        "--documents",
        choices=DOCUMENTS,
        default=default.documents,
        help="what is a document. auto: a line of JSON lines, a row of Parquet, any other file;"
        " file: a file, whatever its name (source code; of a stream, plain text);"
        " repository: all files of a folder, each behind a line with its path. An input folder"
        " with files of its own is a repository, one of folders only stands for these",
    )
    add(
        "--max-file-size",
        type=int,
        default=default.max_file_size,
        help="bytes; larger files are left out where --documents is file or repository, and so are"
        " binary ones",
    )


def reading_of(args: argparse.Namespace) -> Reading:
    """How the flags say that text is read. Raises UserError."""
    keys = args.json_keys
    if len(set(keys)) != len(keys):
        raise UserError(f"--json-keys {' '.join(keys)}: a key is named twice")
    if args.max_file_size < 1:
        raise UserError("--max-file-size must be positive")
    return Reading(tuple(keys), args.documents, args.max_file_size)
