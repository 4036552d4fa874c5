"""Reading the documents of a .bin/.idx pair.

The format is checked here first, since megatron.core answers a damaged pair with a bare assert or
a numpy error, or not at all; then its IndexedDataset maps the files into memory.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megalong.data import loss_mask
from megalong.data.preprocessing.writer import DTYPES, HEADER, MAGIC, VERSION
from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


class IndexedDocuments:
    """The documents of PREFIX.bin and PREFIX.idx, written by megalong or by Megatron, and of
    PREFIX.loss where there is one (`megalong.data.loss_mask`).

    lengths: int64 (num_documents,), tokens in each document.
    max_token_id, vocab_size, prepend_bos: the largest id, the number of ids of the tokenizer, and
        whether the documents begin with a token for that; from PREFIX.json, None where there is no
        such file.
    made_with: of the same file, what it says of the tokenizer: "tokenizer_sha256" (of its content,
        `Tokenizer.fingerprint`) and "tokenizer_model"; empty where it says nothing.
    masks_loss: whether some tokens may not count in the loss.
    place: the flag, or the file, that the prefix is from, and the prefix; None: --data-path's.
    Raises UserError that names the file and what is wrong with it.
    """

    def __init__(self, prefix: str, place: str | None = None) -> None:
        self.prefix = str(prefix)
        place = f"--data-path {self.prefix}" if place is None else place
        pair = Pair.open(self.prefix, place)
        index, description = pair.index, pair.description
        # A document is one or more whole sequences; files of megalong have one in each.
        self._first_sequence = index.first_sequence
        self._sequence_lengths = index.sequence_lengths
        self.lengths = index.document_lengths()
        self.max_token_id: int | None = description.get("max_token_id")
        self.vocab_size: int | None = description.get("vocab_size")
        self.prepend_bos: bool | None = description.get("prepend_bos")
        keys = ("tokenizer_sha256", "tokenizer_model")
        self.made_with = {key: description[key] for key in keys if description.get(key)}
        if not self.num_tokens:
            raise UserError(f"{place}: {self.prefix}.bin holds no tokens")
        self._dataset = _open_with_megatron_core(self.prefix)
        self.masks_loss = pair.masks_loss
        if self.masks_loss:
            self._loss_mask = np.memmap(self.prefix + loss_mask.SUFFIX, np.uint8, mode="r")
            # Documents lie one behind the other, whatever sequences they are made of.
            self._starts = np.cumsum(self.lengths) - self.lengths

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def place(self, document: int) -> str:
        """Which document that is, in words."""
        return f"document {document} of {self.prefix}"

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document; stop None: to its end.

        Returns (stop - start,) in the data type of the file, a copy.
        Raises IndexError for a range outside the document.
        """
        stop = checked_stop(self.lengths, document, start, stop)
        parts = [np.zeros(0, dtype=self._dataset.index.dtype)]
        begin = 0  # where the sequence begins in the document
        for sequence in range(self._first_sequence[document], self._first_sequence[document + 1]):
            size = int(self._sequence_lengths[sequence])
            low, high = max(start - begin, 0), min(stop - begin, size)
            if low < high:
                parts.append(self._dataset.get(sequence, low, high - low))
            begin += size
        # A copy, since the dataset closes its mapping under views when it is collected.
        return np.concatenate(parts)

    def loss_mask(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of the tokens [start, stop) of a document count in the loss, bool (stop - start,),
        a copy; stop None: to its end. Raises IndexError for a range outside the document."""
        stop = checked_stop(self.lengths, document, start, stop)
        if not self.masks_loss:
            return np.ones(stop - start, bool)
        begin = int(self._starts[document])
        return self._loss_mask[begin + start : begin + stop] != 0


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
    from megatron.core import __version__ as megatron_core

    dataset = _open_with_megatron_core(prefix)
    tokens = np.memmap(prefix + ".bin", index.dtype, mode="r")
    ends = np.cumsum(index.sequence_lengths, dtype=np.int64)
    for i in {*range(min(3, len(ends))), *range(max(len(ends) - 3, 0), len(ends))}:
        begin = ends[i] - index.sequence_lengths[i]
        if not np.array_equal(dataset[i], tokens[begin : ends[i]]):
            raise UserError(f"{prefix}: Megatron-core {megatron_core} reads sequence {i} otherwise")
    return megatron_core


def _open_with_megatron_core(prefix: str) -> IndexedDataset:
    # Imported here: it takes seconds, and indices alone are read without it.
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    with warnings.catch_warnings():
        # It logs, for which it wants to know its rank; this need not be a distributed run.
        warnings.filterwarnings("ignore", "Could not determine rank")
        return IndexedDataset(prefix, mmap=True)


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
