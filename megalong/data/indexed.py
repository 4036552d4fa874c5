"""Megatron's .bin/.idx format, and reading the documents of one pair or of many as one.

.bin: the tokens of all sequences, back to back, nothing else.
.idx: magic, version, data type, number of sequences S, number of documents plus one, then
    int32 (S,) tokens per sequence, int64 (S,) byte offset of each sequence in the .bin,
    int64 (documents + 1,) the first sequence of each document, and S at the end.

Pairs are checked first, since megatron.core answers a damaged one with a bare assert or a numpy
error, or not at all.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import struct
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalong.data import loss_mask
from megalong.utils.errors import UserError, system_errors_of

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


def checked_stop(lengths: np.ndarray, document: int, start: int, stop: int | None) -> int:
    """`stop`, or where that is None the end of the document. lengths: of all documents. Raises
    IndexError where there is no such document, or [start, stop) is not inside it."""
    if not 0 <= document < len(lengths):
        raise IndexError(f"document {document} of {len(lengths)}")
    length = int(lengths[document])
    stop = length if stop is None else stop
    if not 0 <= start <= stop <= length:
        raise IndexError(f"tokens [{start}, {stop}) of document {document}, {length} long")
    return stop


@dataclass(frozen=True)
class Index:
    """What a .idx says.

    sequence_lengths, pointers: tokens of each sequence, int32, and its first byte in the .bin,
    int64, both (sequences,). first_sequence: of each document, and the number of sequences, int64
    (documents + 1,). dtype: of the tokens. The arrays are parts of the file, mapped into memory.
    """

    sequence_lengths: np.ndarray
    pointers: np.ndarray
    first_sequence: np.ndarray
    dtype: np.dtype

    def document_lengths(self) -> np.ndarray:
        """Tokens in each document, int64 (documents,)."""
        ends = np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])
        return np.diff(ends[self.first_sequence])

    def in_memory(self) -> Index:
        """A copy that maps no file."""
        arrays = (self.sequence_lengths, self.pointers, self.first_sequence)
        return Index(*map(np.array, arrays), self.dtype)


@dataclass(frozen=True)
class Pair:
    """One .bin/.idx pair: what its index says, the content of its .json, or {}, and whether there
    is a loss mask beside it."""

    prefix: str
    index: Index
    description: dict[str, Any]
    masks_loss: bool

    @classmethod
    def open(cls, prefix: str, place: str) -> Pair:
        """Raises UserError that names the file and what is wrong with it. place: of
        `IndexedDocuments`."""
        check_files_exist(prefix, place)
        index = read_index(prefix)
        tokens = int(index.sequence_lengths.sum(dtype=np.int64))
        described = read_description(prefix, len(index.first_sequence) - 1, tokens)
        masks_loss = loss_mask.has_loss_mask(prefix, tokens, described)
        return cls(prefix, index, described, masks_loss)

    @property
    def bytes(self) -> int:
        """Of the .bin."""
        return os.path.getsize(self.prefix + ".bin")

    @property
    def mask_path(self) -> str:
        """Of the loss mask, if there is one."""
        return self.prefix + loss_mask.SUFFIX


def check_megatron_core(prefix: str, index: Index) -> str:
    """The version of Megatron-core, which reads what we do, where tried: the first and the last
    sequences of a pair. Raises UserError where it does not."""
    from megatron.core import __version__ as megatron_core  # here: it takes seconds
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    with warnings.catch_warnings():
        # It logs, for which it wants to know its rank; this need not be a distributed run.
        warnings.filterwarnings("ignore", "Could not determine rank")
        dataset = IndexedDataset(prefix, mmap=True)
    tokens = np.memmap(prefix + ".bin", index.dtype, mode="r")
    ends = np.cumsum(index.sequence_lengths, dtype=np.int64)
    for i in {*range(min(3, len(ends))), *range(max(len(ends) - 3, 0), len(ends))}:
        begin = ends[i] - index.sequence_lengths[i]
        if not np.array_equal(dataset[i], tokens[begin : ends[i]]):
            raise UserError(f"{prefix}: Megatron-core {megatron_core} reads sequence {i} otherwise")
    return megatron_core


def check_files_exist(prefix: str, place: str) -> None:
    """Raise UserError where there is no such pair. place: of `IndexedDocuments`."""
    missing = [
        prefix + suffix for suffix in (".idx", ".bin") if not os.path.isfile(prefix + suffix)
    ]
    if not missing:
        return
    hint = ""
    stem, suffix = os.path.splitext(prefix)
    if suffix in (".bin", ".idx"):
        hint = f"; give the prefix without {suffix}: {stem}"
    elif len(missing) == 1:
        hint = "; its pair is there: an interrupted copy?"
    elif not os.path.isdir(os.path.dirname(prefix) or "."):
        hint = f"; there is no folder {os.path.dirname(prefix)}"
    else:
        hint = "; give what tools/preprocess_data.py printed, PREFIX_KEY_document"
    raise UserError(f"{place}: no file {' and no file '.join(missing)}{hint}")


def read_index(prefix: str) -> Index:
    """Reads and checks the index against itself and against the size of the .bin. Raises
    UserError."""
    path = prefix + ".idx"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if not header.startswith(MAGIC[: len(header)]) or len(header) < len(MAGIC):
        raise UserError(f"{path}: not an index file (it does not begin with {MAGIC[:7].decode()})")
    if len(header) < HEADER.size:
        raise UserError(f"{path}: cut short, {size} bytes do not hold the header")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{path}: format version {version}, only {VERSION} is known")
    if code not in DTYPES or DTYPES[code].kind == "f":
        raise UserError(f"{path}: data type code {code} is not one of token ids")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size < expected:
        raise UserError(
            f"{path}: cut short, {size:,} bytes, but {sequences:,} sequences need {expected:,}"
        )
    if documents == 0:
        raise UserError(f"{path}: no document boundaries, at least one is expected")

    content = np.memmap(path, mode="r", offset=HEADER.size, shape=(expected - HEADER.size,))
    lengths = np.frombuffer(content, np.int32, sequences)
    pointers = np.frombuffer(content, np.int64, sequences, 4 * sequences)
    first_sequence = np.frombuffer(content, np.int64, documents, 12 * sequences)
    if sequences and lengths.min() < 0:
        raise UserError(f"{path}: damaged, a sequence of {lengths.min()} tokens")
    if (
        first_sequence[0] != 0
        or first_sequence[-1] != sequences
        or (np.diff(first_sequence) < 0).any()
    ):
        raise UserError(f"{path}: damaged, document boundaries do not run from 0 to {sequences:,}")
    if sequences:
        _check_bin(prefix, lengths, pointers, DTYPES[code].itemsize)
    return Index(lengths, pointers, first_sequence, DTYPES[code])


def _check_bin(prefix: str, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> None:
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    # Sequences lie one behind the other; so all writers write them.
    wrong = np.flatnonzero(pointers != np.concatenate([[0], ends[:-1]]))
    if len(wrong):
        i = int(wrong[0])
        begin = int(ends[i - 1]) if i else 0
        raise UserError(
            f"{prefix}.idx: damaged, sequence {i} is to begin at byte {int(pointers[i]):,} of the"
            f" .bin, and the one before ends at {begin:,}"
        )
    size, needed = os.path.getsize(prefix + ".bin"), int(ends[-1])
    if size != needed:
        what = "cut short" if size < needed else "too long"
        raise UserError(
            f"{prefix}.bin: {size:,} bytes, but {prefix}.idx describes {needed:,}: {what}, or the"
            " two files are not of one run"
        )


def read_description(prefix: str, documents: int, tokens: int) -> dict:
    """The content of PREFIX.json, or {} where there is none. Raises UserError where it describes
    other files."""
    path = prefix + ".json"
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            sidecar = json.load(file)
        counts = sidecar["documents"], sidecar["tokens"]
        known = {name: sidecar.get(name) for name in ("max_token_id", "vocab_size")}
        for name, value in {"documents": counts[0], "tokens": counts[1], **known}.items():
            if not isinstance(value, int) and (name not in known or value is not None):
                raise ValueError(f"{name} is {value!r}, and no number")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a description of tools/preprocess_data.py ({error})"
        ) from error
    if counts != (documents, tokens):
        raise UserError(
            f"{path}: describes {counts[0]:,} documents and {counts[1]:,} tokens, but {prefix}.idx "
            f"has {documents:,} and {tokens:,}: the files are not of one run"
        )
    return sidecar


OPEN_FILES = 128
_OPENING_THREADS = 8  # a network file system takes milliseconds, and answers several at once


def is_sharded(path: str) -> bool:
    """Tell whether a path is a folder or a pattern of pairs, and not the prefix of one."""
    if os.path.isfile(path + ".idx"):
        return False
    return os.path.isdir(path) or any(sign in path for sign in "*?[")


class IndexedDocuments:
    """The documents of a .bin/.idx pair, written by megalong or by Megatron, or of all pairs of a
    folder or a pattern of prefixes (of which .bin or .idx may be the end).

    The pairs stand one behind the other, in the order of their names. At most OPEN_FILES files are
    open at a time, so that ten thousand pairs need no more file handles than a few.

    prefix: as it was given. lengths: int64 (num_documents,), tokens in each document.
    max_token_id, vocab_size, prepend_bos: the largest id, the number of ids of the tokenizer, and
        whether the documents begin with a token for that; None where a PREFIX.json is missing.
    made_with: what these say of the tokenizer: "tokenizer_sha256" (`Tokenizer.fingerprint`) and
        "tokenizer_model"; empty where they say nothing.
    masks_loss: whether some tokens may not count in the loss (`megalong.data.loss_mask`).
    place: the flag, or the file, that the path is from, and the path; None: --data-path's.
    Raises UserError that names the pair and what is wrong with it, also where two were made with
    different tokenizers.
    """

    def __init__(self, path: str, place: str | None = None) -> None:
        self.prefix = str(path)
        self._place = place = f"--data-path {path}" if place is None else place
        many = is_sharded(self.prefix)
        prefixes = pair_prefixes(self.prefix, place) if many else [self.prefix]
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            pairs = list(threads.map(lambda prefix: _open(prefix, place), prefixes))
        lengths = [pair.index.document_lengths() for pair in pairs]
        self.lengths = np.concatenate(lengths)
        if not self.num_tokens:
            what = (
                f"the {len(pairs)} pairs of .bin and .idx hold"
                if many
                else f"{self.prefix}.bin holds"
            )
            raise UserError(f"{place}: {what} no tokens")
        self._prefixes = prefixes
        self._dtypes = [pair.index.dtype for pair in pairs]
        self._masked = [pair.masks_loss for pair in pairs]
        self.masks_loss = any(self._masked)
        # The first token of each document in its .bin, where they lie one behind the other.
        self._starts = np.concatenate([np.cumsum(of_pair) - of_pair for of_pair in lengths])
        # The first document of each pair, and the number of documents.
        self._first = np.cumsum([0, *map(len, lengths)], dtype=np.int64)
        ids = [pair.description.get("max_token_id") for pair in pairs]
        self.max_token_id: int | None = None if None in ids else max(ids)
        self.vocab_size: int | None = _agreed(pairs, "vocab_size", place)
        self.prepend_bos: bool | None = _agreed(pairs, "prepend_bos", place)
        self.made_with = _made_with(pairs, place)
        self._files: OrderedDict[str, int] = OrderedDict()  # path -> file descriptor, newest last
        self._lock = threading.Lock()

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def place(self, document: int) -> str:
        """Which document that is, in words."""
        shard = self._shard(document)
        return f"document {document - int(self._first[shard])} of {self._prefixes[shard]}"

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document; stop None: to its end.

        Returns (stop - start,) in the data type of its file, a copy. Safe among threads.
        Raises IndexError for a range outside the document, UserError where its file has gone.
        """
        stop = checked_stop(self.lengths, document, start, stop)
        shard = self._shard(document)
        path = f"{self._prefixes[shard]}.bin"
        return self._read(path, self._dtypes[shard], document, start, stop)

    def loss_mask(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of the tokens [start, stop) of a document count in the loss, bool (stop - start,);
        stop None: to its end. All do of a pair without a mask. Raises as `read`."""
        stop = checked_stop(self.lengths, document, start, stop)
        shard = self._shard(document)
        if not self._masked[shard]:
            return np.ones(stop - start, bool)
        path = self._prefixes[shard] + loss_mask.SUFFIX
        return self._read(path, np.dtype(np.uint8), document, start, stop) != 0

    def _read(self, path: str, dtype: np.dtype, document: int, start: int, stop: int) -> np.ndarray:
        """What a file that has one element a token has of these tokens."""
        found = np.empty(stop - start, dtype)
        into = memoryview(found).cast("B")
        offset = (int(self._starts[document]) + start) * dtype.itemsize
        with self._lock, system_errors_of(f"{self._place}:", path):
            file = self._file(path)
            while into:  # the system reads 2 GiB at most at a time
                count = os.preadv(file, [into], offset)
                if not count:
                    raise UserError(f"{path}: has become shorter since it was opened")
                into, offset = into[count:], offset + count
        return found

    def _shard(self, document: int) -> int:
        return int(np.searchsorted(self._first, document, side="right")) - 1

    def _file(self, path: str) -> int:
        """The descriptor of a file; the one that was not used for longest is closed."""
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        file = os.open(path, os.O_RDONLY)
        self._files[path] = file
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def pair_prefixes(path: str, place: str) -> list[str]:
    """The prefixes of the pairs of a folder or a pattern, by name. Raises UserError where there are
    none."""
    if os.path.isdir(path):
        pattern, where = os.path.join(glob.escape(path), "*.idx"), "in the folder"
    else:
        stem, suffix = os.path.splitext(path)
        pattern, where = (stem if suffix in (".bin", ".idx") else path) + ".idx", "of that name"
    found = sorted(name.removesuffix(".idx") for name in glob.glob(pattern))
    if not found:
        raise UserError(f"{place}: no .bin/.idx pair {where}")
    return found


def _open(prefix: str, place: str) -> Pair:
    """A pair that maps no file: there may be more of them than a process may map."""
    with system_errors_of(f"{place}:", prefix):
        pair = Pair.open(prefix, place)
    return dataclasses.replace(pair, index=pair.index.in_memory())


def _made_with(pairs: list[Pair], place: str) -> dict[str, str]:
    """As of `IndexedDocuments`; the file is one of those that the pairs name."""
    hashed = _agreed(pairs, "tokenizer_sha256", place)
    if hashed is None:
        return {}
    known = {"tokenizer_sha256": hashed}
    files = [pair.description.get("tokenizer_model") for pair in pairs]
    file = next(filter(None, files), None)
    return known if file is None else known | {"tokenizer_model": file}


def _agreed(pairs: list[Pair], key: str, place: str) -> Any:
    """What the descriptions say, those that say something; None where none does."""
    known: dict[int, str] = {}
    for pair in pairs:
        value = pair.description.get(key)
        if value is not None:
            known.setdefault(value, pair.prefix)
    if len(known) > 1:
        (one, its), (other, others), *_ = known.items()
        what = {
            "vocab_size": "the tokenizer's ids", "prepend_bos": "--prepend-bos",
            "tokenizer_sha256": "sha256 of the tokenizer",
        }[key]  # fmt: skip
        raise UserError(
            f"{place}: made with different tokenizers: {what}: {one} in {its}, {other} in {others}"
        )
    return next(iter(known), None)
