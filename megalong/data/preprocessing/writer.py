"""Writers of Megatron's .bin/.idx format that never show half a file, and what stands beside it.

The same bytes as megatron.core's IndexedDatasetBuilder writes (a test compares them); but this
module needs numpy only, and holds the lengths in a file, not in a list of Python integers.
The format is described in `megalong.data.indexed`, PREFIX.loss in `megalong.data.loss_mask`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from megalong.data import loss_mask
from megalong.data.indexed import DTYPES, HEADER, MAGIC, SUFFIXES, VERSION
from megalong.data.preprocessing.unfinished import Unfinished, disk_errors, write_durably
from megalong.data.text.files import shown
from megalong.utils.errors import UserError

LISTED = 100  # so many inputs or broken documents stand in the sidecar itself
HASHES, SKIPPED, INPUTS = ".hashes", ".skipped.jsonl", ".inputs.jsonl"
TEXTS_AT_ONCE = 1 << 23  # whose hashes are in memory together, when repeats are only counted
# Of every document: the hash of its text, and the text's bytes.
HASHED = np.dtype([("hash", "<u8", 2), ("bytes", "<i8")])
_RECORDS = 1 << 18  # of a file that are read at once
_FULL, _GROWTH = 0.7, 1.4  # of a table of hashes

Names = tuple[list[tuple[str, str]], list[str]]  # for `Unfinished.plan_names`


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
    def num_documents(self) -> int:
        return self._lengths.size // 4

    @property
    def size(self) -> int:
        """Bytes written."""
        masks = 0 if self._loss_mask is None else self._loss_mask.size
        return self._tokens.size + self._lengths.size + masks

    def add(
        self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None
    ) -> None:
        """Append documents of one sequence each.

        Args:
            tokens: (sum(lengths),) of this dtype.
            lengths: integers, tokens per document.
            counts: which tokens count in the loss, bool (sum(lengths),); None: all.
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

    def write_end(self, description: dict) -> None:
        """Write the index, and the description with counts of documents, tokens and lengths."""
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
            "tokens": self._tokens.size // self.dtype.itemsize,
            "longest_document": longest,
            "length_histogram": {
                # From 0, from 1, from 2, from 4, ...: the least length of each bucket.
                str(2**digits // 2): int(count)
                for digits, count in enumerate(histogram)
                if count
            },
        }
        if self._loss_mask is not None:
            counts[loss_mask.KEY] = loss_mask.description(self._loss_mask.path)
        path = self._folder / (self._name + ".json")
        with disk_errors(path):
            write_durably(path, counts | description)

    def names(self, prefix: str) -> Names:
        """Return the moves of the files to PREFIX.loss, .bin, .json and .idx, and the files of an
        earlier output that have no successor."""
        masked = self._loss_mask is not None
        suffixes = [loss_mask.SUFFIX, *SUFFIXES] if masked else SUFFIXES
        moves = [(self._name + suffix, prefix + suffix) for suffix in suffixes]
        return moves, [] if masked else [prefix + loss_mask.SUFFIX]

    def _read_lengths(self) -> Iterator[np.ndarray]:
        return _records(self._lengths.path, np.dtype(np.int32))

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
        for first in range(0, documents + 1, _RECORDS):
            last = min(first + _RECORDS, documents + 1)
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
        """Make the files durable and give them their names. description: JSON-able, becomes
        PREFIX.json together with what is counted."""
        self._job.make_durable()
        self.write_end(description)
        self._job.plan_names(*self.names(self.prefix))
        self._job.give_names()


def refuse_existing(prefixes: list[str], overwrite: bool) -> None:
    """Raise UserError where an output is there already that is not to be replaced."""
    suffixes = (*SUFFIXES, loss_mask.SUFFIX)
    paths = [prefix + suffix for prefix in prefixes for suffix in suffixes]
    existing = [path for path in paths if os.path.exists(path)]
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]} is there already: choose another --output-prefix, or --overwrite"
        )


class Problem(NamedTuple):
    """A document that was left out because it is broken. key: the one that it is left out of; None:
    of all of them."""

    file: str
    line: int | None
    reason: str
    key: str | None = None

    def __str__(self) -> str:
        place = shown(self.file) if self.line is None else f"{shown(self.file)}:{self.line}"
        return f"{place}: {self.reason}"


@dataclass
class KeyResult:
    """The documents of one key in a batch: tokens back to back, and for each the number of its
    tokens, and the hash and the bytes of its text (HASHED; None: not known, and taken for new).
    counts: which of the tokens count in the loss, bool; None: all. empty, short: left out."""

    tokens: np.ndarray
    lengths: np.ndarray
    texts: np.ndarray | None
    counts: np.ndarray | None = None
    empty: int = 0
    short: int = 0


@dataclass
class KeySummary:
    """Counts of what was written for one key. bytes: UTF-8 bytes of the texts.

    broken, empty, short: documents left out. repeats, repeated_tokens: documents whose text has
    come before, and their tokens; left out too where `deduplicate`. listed: the first broken ones.
    """

    prefix: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    broken: int = 0
    empty: int = 0
    short: int = 0
    repeats: int = 0
    repeated_tokens: int = 0
    deduplicate: bool = False
    max_token_id: int = -1
    longest: int = 0
    listed: list[dict] = field(default_factory=list)


class Output(GrowingDocuments):
    """The files of one key in the folder of an unfinished job; goes on with what is there. The
    hashes of all texts are in memory where repeated ones are left out, and else on the disk alone.

    summary: of what is there. keep_hashes: with the file PREFIX.hashes, for a merge.
    """

    def __init__(
        self,
        job: Unfinished,
        summary: KeySummary,
        dtype: np.dtype,
        *,
        keep_hashes: bool,
        masks_loss: bool,
    ) -> None:
        name = os.path.basename(summary.prefix)
        super().__init__(job, name, dtype, masks_loss=masks_loss)
        self.summary, self._keep_hashes = summary, keep_hashes
        self._hashes = job.file(name + HASHES)
        self._skipped = job.file(name + SKIPPED)
        self._seen = SeenTexts() if summary.deduplicate else None
        if self._seen is not None:
            for texts in _records(self._hashes.path, HASHED):
                self._seen.add(texts["hash"])

    @property
    def size(self) -> int:
        """Bytes written."""
        return super().size + self._hashes.size + self._skipped.size

    def add_part(self, part: KeyResult) -> None:
        """Append documents, but for those whose text has come before where these are left out."""
        summary, tokens, lengths, texts = self.summary, part.tokens, part.lengths, part.texts
        counts = part.counts
        if texts is not None and self._seen is not None:
            new = self._seen.add(texts["hash"])
            if not new.all():
                summary.repeats += int((~new).sum())
                summary.repeated_tokens += int(lengths[~new].sum())
                kept = np.repeat(new, lengths)
                tokens, lengths, texts = tokens[kept], lengths[new], texts[new]
                counts = None if counts is None else counts[kept]
        self.add(tokens, lengths, counts)
        summary.documents += len(lengths)
        summary.tokens += len(tokens)
        if texts is not None:
            self._hashes.write(texts)
            summary.bytes += int(texts["bytes"].sum())
        summary.empty += part.empty
        summary.short += part.short
        if len(tokens):
            summary.max_token_id = max(summary.max_token_id, int(tokens.max()))
            summary.longest = max(summary.longest, int(lengths.max()))

    def skip(self, problem: dict) -> None:
        """Note a broken document: "file", "line", "reason"."""
        self.summary.broken += 1
        if len(self.summary.listed) < LISTED:
            self.summary.listed.append(problem)
        self._skipped.write(json.dumps(problem).encode() + b"\n")

    def count_repeats(self) -> None:
        """Count the documents whose text has come before, where all hashes are known and none was
        left out for it: in several passes over the files, each for a share of the hashes."""
        summary = self.summary
        if summary.deduplicate or self._hashes.size != summary.documents * HASHED.itemsize:
            return
        summary.repeats = summary.repeated_tokens = 0
        passes = -(-summary.documents // TEXTS_AT_ONCE)
        for number in range(passes):
            seen, hashes = SeenTexts(), _records(self._hashes.path, HASHED)
            for texts, lengths in zip(hashes, self._read_lengths(), strict=True):
                # Not by the half that decides about places in the table.
                here = texts["hash"][:, 1] % np.uint64(passes) == number
                new = seen.add(texts["hash"][here])
                summary.repeats += int((~new).sum())
                summary.repeated_tokens += int(lengths[here][~new].sum())

    def finish(self, description: dict, inputs: Path) -> Names:
        """Write what comes at the end; return what `Unfinished.plan_names` is to do.

        Args:
            description: for the sidecar, besides what is counted here.
            inputs: JSON lines of them.
        """
        summary, files, listed = self.summary, 0, []
        path = self._folder / (self._name + INPUTS)
        with disk_errors(path), open(inputs, "rb") as source, open(path, "wb") as copy:
            for line in source:
                files += 1
                copy.write(line)
                if files <= LISTED:
                    listed.append(json.loads(line))
            copy.flush()
            os.fsync(copy.fileno())
        left_out = {"broken": summary.broken, "empty": summary.empty, "short": summary.short}
        left_out["repeated"] = summary.repeats if summary.deduplicate else 0
        self.write_end(
            {
                "bytes": summary.bytes,
                "max_token_id": summary.max_token_id,
                "repeats": {"documents": summary.repeats, "tokens": summary.repeated_tokens},
                "left_out": left_out,
            }
            | description
            | {"inputs": listed, "inputs_in_all": files, "skipped": summary.listed}
        )
        kept = {
            INPUTS: files > LISTED,
            SKIPPED: summary.broken > LISTED,
            HASHES: self._keep_hashes,
        }
        prefix = summary.prefix
        moves, obsolete = self.names(prefix)
        more = [(self._name + suffix, prefix + suffix) for suffix in kept if kept[suffix]]
        return more + moves, [prefix + suffix for suffix in kept if not kept[suffix]] + obsolete


def _records(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the records of a file, some at a time: (n,) of this dtype."""
    with open(path, "rb") as file:
        while len(records := np.fromfile(file, dtype, _RECORDS)):
            yield records


def text_hashes(texts: list[bytes]) -> np.ndarray:
    """Hash texts: uint64 (len(texts), 2)."""
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


class SeenTexts:
    """A set of hashes: a table with open addressing, 23 to 32 bytes a text, and with the old one
    53 for the moment in which it grows. (A Python set would take 120.)"""

    def __init__(self) -> None:
        self._table = np.zeros((1 << 12, 2), np.uint64)  # zeros: a free slot
        self._count = 0

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes, uint64 (n, 2). Returns bool (n,): those that are new, and of several equal
        ones the first."""
        needed = self._count + len(hashes)
        if needed > _FULL * len(self._table):
            size = int(max(_GROWTH * len(self._table), 1.2 * needed / _FULL))
            old, self._table = self._table, np.zeros((size, 2), np.uint64)
            for begin in range(0, len(old), _RECORDS):
                chunk = old[begin : begin + _RECORDS]
                self._insert(chunk[chunk.any(axis=1)])
        new = self._insert(hashes)
        self._count += int(new.sum())
        return new

    def _insert(self, hashes: np.ndarray) -> np.ndarray:
        new = np.zeros(len(hashes), bool)
        size = np.uint64(len(self._table))
        pending = np.arange(len(hashes))
        slots = hashes[:, 0] % size
        while len(pending):
            wanted, there = hashes[pending], self._table[slots]
            free = ~there.any(axis=1)
            done = (there == wanted).all(axis=1)
            # A free slot goes to the first that asks for it; the others look at it once more.
            winners = np.flatnonzero(free)[np.unique(slots[free], return_index=True)[1]]
            self._table[slots[winners]] = wanted[winners]
            new[pending[winners]] = True
            done[winners] = True
            slots = np.where(free, slots, (slots + np.uint64(1)) % size)[~done]
            pending = pending[~done]
        return new
