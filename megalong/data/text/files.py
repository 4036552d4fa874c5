"""Files of text: which there are, and their bytes, compressed or not."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib.util
import io
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megalong.utils.errors import UserError

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
    """A kind of compression. magic: a pattern that files begin with, and texts do not. open: None
    where it is not supported."""

    name: str
    suffix: str
    magic: bytes
    open: Callable[[BinaryIO], BinaryIO] | None

    def begins(self, data: bytes) -> bool:
        return re.match(self.magic, data) is not None

    @property
    def unsupported(self) -> str:
        """What it is, and what to do with a file of it."""
        if self.suffix == ".zst":
            advice = "which needs the package backports.zstd: pip install backports.zstd"
        else:
            advice = "which is not supported: decompress it, or compress it with gzip"
        return f"compressed with {self.name}, {advice}"


COMPRESSIONS = (
    Compression("gzip", ".gz", rb"\x1f\x8b\x08", lambda file: gzip.GzipFile(fileobj=file)),
    # The head of a frame, or of one that is to be skipped, which some tools begin with.
    Compression(
        "Zstandard",
        ".zst",
        rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
        zstd and zstd.ZstdFile,
    ),
    Compression("xz", ".xz", rb"\xfd7zXZ\x00", lzma.LZMAFile),
    # The head of a block, or of the end of an empty file.
    Compression("bzip2", ".bz2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2File),
    Compression("LZ4", ".lz4", rb"\x04\x22\x4d\x18", None),
    Compression("zip", ".zip", rb"PK\x03\x04", None),
)
_MAGIC_BYTES = 10  # of the longest
_BUFFER_BYTES = 1 << 20  # lines may be long
_TEXTS = (".jsonl", ".json", ".ndjson", ".txt")


def find_files(inputs: list[str], documents: str = "auto") -> list[str]:
    """The files that files, folders (searched for files at any depth) and glob patterns name; "-"
    is standard input. A pipe may be named like a file; patterns leave pipes out.

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
        found = [file for match in ([name] if exists else _matches(name)) for file in below(match)]
        if not found:
            what = "an empty folder" if os.path.isdir(name) else "no such file, folder or match"
            if documents == "repository" and (exists or name == STANDARD_INPUT):
                kind = "a stream" if is_stream(name) else "a file"
                what = f"{kind}; --documents repository wants folders"
            raise UserError(f"--input {name}: {what}")
        files += found
    if documents == "auto":
        for file in files:
            _check_readable(file, named=file in inputs)
    return list(dict.fromkeys(files))


def content_files(path: str) -> list[str]:
    """The files that make up what `find_files` found: itself, or those of a repository, by path."""
    return _files_below(path) if os.path.isdir(path) else [path]


def is_stream(path: str) -> bool:
    """Whether it can be read only once: standard input, a named pipe, `<(command)` of a shell."""
    if path == STANDARD_INPUT:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def shown(path: str) -> str:
    """The name of a file, or of standard input, in messages."""
    return "standard input" if path == STANDARD_INPUT else path


def total_size(files: list[str]) -> int | None:
    """Bytes of all that `find_files` found; None with a stream, whose size is not known."""
    if any(map(is_stream, files)):
        return None
    return sum(os.path.getsize(file) for path in files for file in content_files(path))


class _Stream(io.RawIOBase):
    """A stream that knows how far it was read, and whose first bytes, of which a pipe may give any
    number at a time, come together."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        size = self._file.readinto(buffer)
        while self._position == 0 and 0 < size < min(_MAGIC_BYTES, len(buffer)):
            more = self._file.readinto(buffer[size:])
            if not more:
                break
            size += more
        self._position += size
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def open_file(path: str) -> io.BufferedReader:
    """A file, or a stream, as it is on disk."""
    if not is_stream(path):
        return open(path, "rb", _BUFFER_BYTES)
    standard = path == STANDARD_INPUT
    file = io.FileIO(sys.stdin.fileno() if standard else path, closefd=not standard)
    os.set_blocking(file.fileno(), True)  # who has given it may have had it otherwise
    return io.BufferedReader(_Stream(file), _BUFFER_BYTES)


def without_compression(path: str) -> tuple[str, Compression | None]:
    """A file's name in lower case, less the suffix of its compression, and that."""
    lower = path.lower()
    for compression in COMPRESSIONS:
        if lower.endswith(compression.suffix):
            return lower.removesuffix(compression.suffix), compression
    return lower, None


def compression_of(on_disk: io.BufferedReader, path: str) -> Compression | None:
    """How an open file is compressed, as its first bytes say, or else its name."""
    head = on_disk.peek(_MAGIC_BYTES)
    known = (compression for compression in COMPRESSIONS if compression.begins(head))
    return next(known, without_compression(path)[1])


def decompressed(on_disk: io.BufferedReader, path: str) -> BinaryIO:
    """The content of an open file: what it unpacks to, if it is compressed. Raises OSError for a
    compression that is not supported."""
    compression = compression_of(on_disk, path)
    if compression is None:
        return on_disk
    if compression.open is None:
        raise OSError(compression.unsupported)
    return compression.open(on_disk)


def _matches(pattern: str) -> list[str]:
    """The files and folders of a pattern, sorted; neither streams nor links to nothing."""
    found = glob.glob(pattern, recursive=True)
    return sorted(path for path in found if os.path.isfile(path) or os.path.isdir(path))


def _files_below(path: str) -> list[str]:
    if not os.path.isdir(path):
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
        raise UserError(f"--input {file}: {compression.unsupported}")
    if name.endswith(".parquet"):
        if compression:
            raise UserError(f"--input {file}: Parquet is compressed inside: decompress the file")
        check_pyarrow(file)


def check_pyarrow(file: str) -> None:
    """Raises UserError where a file of Parquet cannot be read, for want of the package."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"--input {file}: Parquet needs pyarrow: pip install pyarrow")
