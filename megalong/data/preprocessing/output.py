"""What preprocessing writes for one key of the texts: tokens, and what is to be known of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalong.data.preprocessing.unfinished import Unfinished, disk_errors
from megalong.data.preprocessing.writer import GrowingDocuments
from megalong.data.text.files import shown

_FULL, _GROWTH = 0.7, 1.4
_CHUNK = 1 << 18


def text_hashes(texts: list[bytes]) -> np.ndarray:
    """uint64 (len(texts), 2): a hash of each."""
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


class SeenTexts:
    """A set of hashes: a table with open addressing, 23 to 32 bytes a text, and with the old one
    53 for the moment in which it grows. (A Python set would take 120.)"""

    def __init__(self) -> None:
        self._table = np.zeros((1 << 12, 2), np.uint64)  # zeros: a free slot
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Adds hashes, uint64 (n, 2). Returns bool (n,): those that are new, and of several equal
        ones the first."""
        needed = self._count + len(hashes)
        if needed > _FULL * len(self._table):
            self._grow(int(max(_GROWTH * len(self._table), 1.2 * needed / _FULL)))
        new = self._insert(hashes)
        self._count += int(new.sum())
        return new

    def _grow(self, size: int) -> None:
        old, self._table = self._table, np.zeros((size, 2), np.uint64)
        for begin in range(0, len(old), _CHUNK):
            chunk = old[begin : begin + _CHUNK]
            self._insert(chunk[chunk.any(axis=1)])

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


LISTED = 100  # so many inputs or broken documents stand in the sidecar itself
HASHES, SKIPPED, INPUTS = ".hashes", ".skipped.jsonl", ".inputs.jsonl"
TEXTS_AT_ONCE = 1 << 23  # whose hashes are in memory together, when repeats are only counted
# Of every document: the hash of its text, and the text's bytes.
HASHED = np.dtype([("hash", "<u8", 2), ("bytes", "<i8")])


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
    """What was written for one key. bytes: UTF-8 bytes of the texts.

    broken, empty, short: documents left out. repeats, repeated_tokens: documents whose text has
    come before, and their tokens; left out too where `deduplicate`.
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
    listed: list[dict] = field(default_factory=list)  # of the broken ones, the first

    def add_problem(self, problem: dict) -> None:
        self.broken += 1
        if len(self.listed) < LISTED:
            self.listed.append(problem)

    def left_out(self) -> dict[str, int]:
        repeated = self.repeats if self.deduplicate else 0
        counts = {"broken": self.broken, "empty": self.empty, "short": self.short}
        return counts | {"repeated": repeated}


class Output:
    """The files of one key in the folder of an unfinished job; goes on with what is there. The
    hashes of all texts are in memory where repeated ones are left out, and else on the disk alone.

    summary: of what is there. keep_hashes: with the file PREFIX.hashes, for a merge. masks_loss:
    with a loss mask.
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
        self.summary, self._job, self._keep_hashes = summary, job, keep_hashes
        self._name = os.path.basename(summary.prefix)
        self._documents = GrowingDocuments(job, self._name, dtype, masks_loss=masks_loss)
        self._hashes = job.file(self._name + HASHES)
        self._skipped = job.file(self._name + SKIPPED)
        self._seen = SeenTexts() if summary.deduplicate else None
        if self._seen is not None:
            for texts in _records(self._hashes.path, HASHED):
                self._seen.add(texts["hash"])

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._documents.size + self._hashes.size + self._skipped.size

    def add(self, part: KeyResult) -> None:
        """Appends documents, but for those whose text has come before where these are left out."""
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
        self._documents.add(tokens, lengths, counts)
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
        """Notes a broken document: "file", "line", "reason"."""
        self.summary.add_problem(problem)
        self._skipped.write(json.dumps(problem).encode() + b"\n")

    def count_repeats(self) -> None:
        """Counts the documents whose text has come before, where all hashes are known and none was
        left out for it: in several passes over the files, each for a share of the hashes."""
        summary = self.summary
        if summary.deduplicate or self._hashes.size != summary.documents * HASHED.itemsize:
            return
        summary.repeats = summary.repeated_tokens = 0
        passes = -(-summary.documents // TEXTS_AT_ONCE)
        for number in range(passes):
            seen = SeenTexts()
            lengths_of = _records(self._documents.lengths_path, np.dtype(np.int32))
            for texts, lengths in zip(_records(self._hashes.path, HASHED), lengths_of, strict=True):
                # Not by the half that decides about places in the table.
                here = texts["hash"][:, 1] % np.uint64(passes) == number
                new = seen.add(texts["hash"][here])
                summary.repeats += int((~new).sum())
                summary.repeated_tokens += int(lengths[here][~new].sum())

    def finish(self, description: dict, inputs: Path) -> tuple[list[tuple[str, str]], list[str]]:
        """Writes what comes at the end; gives what `Unfinished.give_names` is to do.

        description: for the sidecar, besides what is counted here. inputs: JSON lines of them.
        """
        summary = self.summary
        moves, obsolete = [], []

        def keep(suffix: str, keeps: bool) -> None:
            if keeps:
                moves.append((self._name + suffix, summary.prefix + suffix))
            else:
                obsolete.append(summary.prefix + suffix)

        files, listed = 0, []
        path = self._job.folder / (self._name + INPUTS)
        with disk_errors(path), open(inputs, "rb") as source, open(path, "wb") as copy:
            for line in source:
                files += 1
                copy.write(line)
                if files <= LISTED:
                    listed.append(json.loads(line))
            copy.flush()
            os.fsync(copy.fileno())
        keep(INPUTS, files > LISTED)
        keep(SKIPPED, summary.broken > LISTED)
        keep(HASHES, self._keep_hashes)
        self._documents.finish(
            {
                "bytes": summary.bytes,
                "max_token_id": summary.max_token_id,
                "repeats": {"documents": summary.repeats, "tokens": summary.repeated_tokens},
                "left_out": summary.left_out(),
            }
            | description
            | {
                "inputs": listed,
                "inputs_in_all": files,
                "skipped": summary.listed,
            }
        )
        prefix = summary.prefix
        obsolete += self._documents.obsolete(prefix)
        return moves + self._documents.moves(prefix), obsolete


def _records(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The records of a file, some at a time: (n,) of this dtype."""
    with open(path, "rb") as file:
        while len(records := np.fromfile(file, dtype, 1 << 18)):
            yield records
