"""The .bin/.idx format of Megatron: its header, and a writer that never shows half a file.

.bin: the tokens of all sequences, back to back, nothing else.
.idx: magic, version, data type, number of sequences S, number of documents plus one, then
    int32 (S,) tokens per sequence, int64 (S,) byte offset of each sequence in the .bin,
    int64 (documents + 1,) the first sequence of each document, and S at the end.
The same bytes as megatron.core's IndexedDatasetBuilder writes (a test compares them); but this
module needs numpy only, and holds the lengths in arrays, not in lists of Python integers.
"""

import fcntl
import json
import os
import struct
from pathlib import Path

import numpy as np

from megalong.disk import writable_folder
from megalong.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, data type code, sequences, documents + 1
DTYPES = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
SUFFIXES = (".bin", ".json", ".idx")  # .idx last: readers take its presence for completeness


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class DocumentWriter:
    """Writes documents to PREFIX.bin, PREFIX.idx and PREFIX.json (a description).

    Everything is written to PREFIX.*.partial and renamed by commit(). Use as a context manager:
    without a commit the partial files are removed. Raises UserError where an output exists
    and `overwrite` is not set, or where another process is writing the same output.
    """

    def __init__(self, prefix: str, dtype: np.dtype, *, overwrite: bool = False) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.num_documents = 0
        self.num_tokens = 0
        self._lengths: list[np.ndarray] = []
        existing = [prefix + suffix for suffix in SUFFIXES if os.path.exists(prefix + suffix)]
        if existing and not overwrite:
            raise UserError(
                f"{existing[0]} is there already: choose another --output-prefix, or --overwrite"
            )
        writable_folder("--output-prefix", Path(prefix).parent)
        # Opened for appending, so that a file another process is writing is not cut before the
        # lock says so; what a killed process left behind is.
        self._bin = open(self._partial(".bin"), "ab")  # noqa: SIM115, closed by __exit__
        try:
            fcntl.flock(self._bin, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._bin.close()
            raise UserError(f"another process is writing {prefix}.bin") from None
        except OSError:
            pass  # some network file systems have no locks
        if not self._still_named():  # another process has finished between the two lines above
            self._bin.close()
            raise UserError(f"another process has written {prefix}.bin")
        self._bin.truncate(0)

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(self, *exception) -> None:
        """Removes the partial files, if commit() did not rename them."""
        for suffix in SUFFIXES:
            Path(self._partial(suffix)).unlink(missing_ok=True)
        self._bin.close()  # only now, since closing gives up the lock

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents of one sequence each.

        tokens: (sum(lengths),) of the writer's dtype. lengths: integers, tokens per document.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise UserError(f"a document of {lengths.max():,} tokens: the format ends at 2^31 - 1")
        assert tokens.dtype == self.dtype and tokens.size == lengths.sum()
        self._bin.write(np.ascontiguousarray(tokens).data)
        self._lengths.append(lengths.astype(np.int32))
        self.num_documents += len(lengths)
        self.num_tokens += tokens.size

    def commit(self, description: dict) -> None:
        """Makes the files durable and gives them their names. description: JSON-able, becomes
        PREFIX.json together with the counts of documents and tokens."""
        counts = {"documents": self.num_documents, "tokens": self.num_tokens}
        _make_durable(self._bin)
        with open(self._partial(".json"), "w", encoding="utf-8") as file:
            json.dump(counts | description, file, indent=2)
            file.write("\n")
            _make_durable(file)
        with open(self._partial(".idx"), "wb") as file:
            self._write_index(file)
            _make_durable(file)
        # Without an index the old files are not taken for the new ones, wherever this stops.
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        for suffix in SUFFIXES:
            os.replace(self._partial(suffix), self.prefix + suffix)
        folder = os.open(Path(self.prefix).parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _partial(self, suffix: str) -> str:
        return f"{self.prefix}{suffix}.partial"

    def _still_named(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._bin.fileno()), os.stat(self._partial(".bin")))
        except FileNotFoundError:
            return False

    def _write_index(self, file) -> None:
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        file.write(lengths.data)
        ends = np.cumsum(lengths, dtype=np.int64)
        file.write(((ends - lengths) * self.dtype.itemsize).data)
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)


def _make_durable(file) -> None:
    file.flush()
    os.fsync(file.fileno())
