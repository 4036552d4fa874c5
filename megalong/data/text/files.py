"""Files of text: which there are, and their bytes, compressed or not."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib.util
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megalong.errors import UserError

try:
    from compression import zstd  # from Python 3.14 on
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

STANDARD_INPUT = "-"

# What reading a file may raise, where it is damaged or cannot be read.
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
if zstd is not None:
    UNREADABLE += (zstd.ZstdError,)


class Compression(NamedTuple):
    """A kind of compression. magic: how a file begins. open: None where it is not supported."""

    name: str
    suffix: str
    magic: bytes
    open: Callable[[BinaryIO], BinaryIO] | None

    @property
    def advice(self) -> str:
        """What to do with a file of it."""
        if self.open is not None:
            return f"without a name in {self.suffix}"
        if self.suffix == ".zst":
            return "which needs the package backports.zstd: pip install backports.zstd"
        return "which is not supported: decompress it, or compress it with gzip, as .gz"


COMPRESSIONS = (
    Compression("gzip", ".gz", b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    Compression("Zstandard", ".zst", b"\x28\xb5\x2f\xfd", zstd and zstd.ZstdFile),
    Compression("xz", ".xz", b"\xfd7zXZ", lzma.LZMAFile),
    Compression("bzip2", ".bz2", b"BZh", bz2.BZ2File),
    Compression("LZ4", ".lz4", b"\x04\x22\x4d\x18", None),
    Compression("zip", ".zip", b"PK\x03\x04", None),
)
_BUFFER_BYTES = 1 << 20  # lines may be long
_TEXTS = (".jsonl", ".json", ".ndjson", ".txt")


def find_files(inputs: list[str], documents: str = "auto") -> list[str]:
    """The files that files, folders (searched for files at any depth) and glob patterns name; "-"
    is standard input.

    In the order of `inputs`, sorted inside a folder or pattern, each file once. Hidden files and
    folders inside a folder are left out. documents: as in `documents.Reading`; where it is
    "repository", what is found are folders: one with files of its own is a repository, and
    one of folders only stands for these.
    Raises UserError for an input that names nothing, and for one that cannot be read.
    """
    below = _repositories if documents == "repository" else _files_below
    files: list[str] = []
    for name in inputs:
        if name == STANDARD_INPUT and documents != "repository":
            files.append(name)
            continue
        exists = os.path.exists(name)
        found = [
            file
            for match in ([name] if exists else sorted(glob.glob(name, recursive=True)))
            for file in below(match)
        ]
        if not found:
            what = "an empty folder" if os.path.isdir(name) else "no such file, folder or match"
            if documents == "repository" and os.path.isfile(name):
                what = "a file; --documents repository wants folders"
            raise UserError(f"--input {name}: {what}")
        files += found
    if documents == "auto":
        for file in files:
            _check_readable(file, named=file in inputs)
    return list(dict.fromkeys(files))


def content_files(path: str) -> list[str]:
    """The files that make up what `find_files` found: itself, or those of a repository, by path."""
    return _files_below(path) if os.path.isdir(path) else [path]


def total_size(files: list[str]) -> int | None:
    """Bytes of all that `find_files` found; None with standard input, whose size is not known."""
    if STANDARD_INPUT in files:
        return None
    return sum(os.path.getsize(file) for path in files for file in content_files(path))


def open_file(path: str) -> BinaryIO:
    """A file, or standard input, as it is on disk."""
    if path == STANDARD_INPUT:
        return open(sys.stdin.fileno(), "rb", _BUFFER_BYTES, closefd=False)
    return open(path, "rb", _BUFFER_BYTES)


def without_compression(path: str) -> tuple[str, Compression | None]:
    """A file's name in lower case, less the suffix of its compression, and that."""
    lower = path.lower()
    for compression in COMPRESSIONS:
        if lower.endswith(compression.suffix):
            return lower.removesuffix(compression.suffix), compression
    return lower, None


def decompressed(on_disk: BinaryIO, path: str) -> BinaryIO:
    """The content of an open file: what it unpacks to, if its name says that it is compressed."""
    _, compression = without_compression(path)
    return compression.open(on_disk) if compression and compression.open else on_disk


def _files_below(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    found = []
    for folder, folders, names in os.walk(Path(path), onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (os.path.join(folder, name) for name in names if not name.startswith("."))
        found += filter(os.path.isfile, paths)
    return sorted(found, key=lambda file: file.split(os.sep))


def _refuse(error: OSError) -> None:
    """A folder that cannot be looked into."""
    raise UserError(f"--input {error.filename}: {error.strerror}")


def _repositories(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        return
    entries = [entry for entry in sorted(Path(path).iterdir()) if not entry.name.startswith(".")]
    if any(entry.is_file() for entry in entries):
        yield path
    else:
        yield from (str(entry) for entry in entries if entry.is_dir() and _files_below(str(entry)))


def _check_readable(file: str, named: bool) -> None:
    """Raises UserError for text that cannot be read. named: the user has named it itself."""
    name, compression = without_compression(file)
    if compression and compression.open is None and (named or name.endswith(_TEXTS)):
        raise UserError(f"--input {file}: compressed with {compression.name}, {compression.advice}")
    if name.endswith(".parquet"):
        if compression:
            raise UserError(f"--input {file}: Parquet is compressed inside: decompress the file")
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"--input {file}: Parquet needs pyarrow: pip install pyarrow")
