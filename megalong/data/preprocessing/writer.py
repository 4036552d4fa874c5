"""The .bin/.idx format of Megatron: its header, and a writer that never shows half a file.

.bin: the tokens of all sequences, back to back, nothing else.
.idx: magic, version, data type, number of sequences S, number of documents plus one, then
    int32 (S,) tokens per sequence, int64 (S,) byte offset of each sequence in the .bin,
    int64 (documents + 1,) the first sequence of each document, and S at the end.
The same bytes as megatron.core's IndexedDatasetBuilder writes (a test compares them); but this
module needs numpy only, and holds the lengths in a file, not in a list of Python integers.
Where not all tokens count in the loss there is PREFIX.loss too (`megalong.data.loss_mask`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalong.data import loss_mask
from megalong.data.preprocessing.unfinished import Unfinished, disk_errors, write_durably
from megalong.utils.errors import UserError

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
_CHUNK = 1 << 20  # lengths held at once


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class GrowingDocuments:
    """Documents that are added to files of an unfinished job: tokens, and int32 lengths.

    name: of these files, and of those that `finish` makes, without suffix.
    masks_loss: with a loss mask.
    """

    def __init__(
        self, job: Unfinished, name: str, dtype: np.dtype, *, masks_loss: bool = False
    ) -> None:
        self.dtype = np.dtype(dtype)
        self._folder, self._name = job.folder, name
        self._tokens = job.file(name + ".bin")
        self._lengths = job.file(name + ".lengths")
        self._loss_mask = job.file(name + loss_mask.SUFFIX) if masks_loss else None

    @property
    def lengths_path(self) -> Path:
        """The file of the lengths."""
        return self._lengths.path

    @property
    def num_documents(self) -> int:
        return self._lengths.size // 4

    @property
    def num_tokens(self) -> int:
        return self._tokens.size // self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes written."""
        masks = 0 if self._loss_mask is None else self._loss_mask.size
        return self._tokens.size + self._lengths.size + masks

    def add(
        self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None
    ) -> None:
        """Appends documents of one sequence each.

        tokens: (sum(lengths),) of this dtype. lengths: integers, tokens per document. counts: which
        of the tokens count in the loss, bool (sum(lengths),), for the loss mask; None: all.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise UserError(f"a document of {lengths.max():,} tokens: the format ends at 2^31 - 1")
        assert tokens.dtype == self.dtype and tokens.size == lengths.sum()
        self._tokens.write(np.ascontiguousarray(tokens))
        self._lengths.write(lengths.astype(np.int32))
        if self._loss_mask is not None:
            counts = np.ones(tokens.size, bool) if counts is None else counts
            assert counts.dtype == bool and counts.size == tokens.size
            self._loss_mask.write(np.ascontiguousarray(counts).view(np.uint8))

    def finish(self, description: dict) -> None:
        """Writes the index, and a description with the counts of documents and tokens, the longest
        document and the histogram of lengths. description: JSON-able."""
        index = self._folder / (self._name + ".idx")
        with disk_errors(index), open(index, "wb") as file:
            self._write_index(file)
            file.flush()
            os.fsync(file.fileno())
        longest, histogram = 0, np.zeros(32, np.int64)
        for lengths in self._read_lengths():
            longest = max(longest, int(lengths.max()))
            # frexp's exponent of n is the number of its binary digits.
            histogram += np.bincount(np.frexp(lengths.astype(float))[1], minlength=32)
        counts = {
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "longest_document": longest,
            "length_histogram": {
                # From 0, from 1, from 2, from 4, ...: the least length of each bucket.
                str(2**digits // 2): int(histogram[digits])
                for digits in range(32)
                if histogram[digits]
            },
        }
        if self._loss_mask is not None:
            counts[loss_mask.KEY] = loss_mask.description(self._loss_mask.path)
        path = self._folder / (self._name + ".json")
        with disk_errors(path):
            write_durably(path, counts | description)

    def moves(self, prefix: str) -> list[tuple[str, str]]:
        """What `Unfinished.give_names` is to do, for the files to be PREFIX.bin, .json and .idx,
        and .loss before them."""
        masks = [loss_mask.SUFFIX] if self._loss_mask is not None else []
        return [(self._name + suffix, prefix + suffix) for suffix in (*masks, *SUFFIXES)]

    def obsolete(self, prefix: str) -> list[str]:
        """Files of an earlier output of that prefix that have no successor."""
        return [prefix + loss_mask.SUFFIX] if self._loss_mask is None else []

    def _read_lengths(self) -> Iterator[np.ndarray]:
        with open(self._lengths.path, "rb") as file:
            while len(lengths := np.fromfile(file, np.int32, _CHUNK)):
                yield lengths

    def _write_index(self, file: BinaryIO) -> None:
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        documents = self.num_documents
        file.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
        for lengths in self._read_lengths():
            file.write(lengths.data)
        end = 0
        for lengths in self._read_lengths():
            ends = end + np.cumsum(lengths, dtype=np.int64)
            file.write(((ends - lengths) * self.dtype.itemsize).data)
            end = int(ends[-1])
        for first in range(0, documents + 1, _CHUNK):
            last = min(first + _CHUNK, documents + 1)
            file.write(np.arange(first, last, dtype=np.int64).data)


class DocumentWriter(GrowingDocuments):
    """Writes documents to PREFIX.bin, PREFIX.idx and PREFIX.json (a description), in one go.

    Everything is written aside and gets its name in commit(). Use as a context manager: without a
    commit nothing remains. masks_loss: with PREFIX.loss. Raises UserError where an output exists
    and `overwrite` is not set, or where another process is writing the same output.
    """

    def __init__(
        self, prefix: str, dtype: np.dtype, *, overwrite: bool = False, masks_loss: bool = False
    ) -> None:
        refuse_existing([prefix], overwrite)
        self.prefix = prefix
        self._job = Unfinished(prefix, {"a job": "in one go"}, overwrite=overwrite, anew=True)
        super().__init__(self._job, os.path.basename(prefix), dtype, masks_loss=masks_loss)

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, *exception) -> None:
        self._job.__exit__(*exception)

    def commit(self, description: dict) -> None:
        """Makes the files durable and gives them their names. description: JSON-able, becomes
        PREFIX.json together with what `finish` adds."""
        self._job.make_durable()
        self.finish(description)
        self._job.plan_names(self.moves(self.prefix), self.obsolete(self.prefix))
        self._job.give_names()


def refuse_existing(prefixes: list[str], overwrite: bool) -> None:
    """Raises UserError where an output is there already that is not to be replaced."""
    suffixes = (*SUFFIXES, loss_mask.SUFFIX)
    paths = [prefix + suffix for prefix in prefixes for suffix in suffixes]
    existing = [path for path in paths if os.path.exists(path)]
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]} is there already: choose another --output-prefix, or --overwrite"
        )
