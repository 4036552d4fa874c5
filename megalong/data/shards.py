"""Many .bin/.idx pairs as the documents of one source: those of a folder, or of a pattern.

The pairs stand one behind the other, in the order of their names. What is kept of them is where
each document lies; a .bin, or a loss mask, is opened when something is read from it, and at most
OPEN_FILES are open at a time, so that ten thousand pairs need no more file handles, or memory maps,
than a few.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from megalong.data import loss_mask
from megalong.data.indexed import IndexedDocuments, Pair, checked_stop
from megalong.utils.errors import UserError, system_errors_of

OPEN_FILES = 128
_OPENING_THREADS = 8  # a network file system takes milliseconds, and answers several at once


def open_documents(path: str, place: str | None = None) -> IndexedDocuments | ShardedDocuments:
    """Open the pair of a prefix, or the many of a folder or a pattern.

    Args:
        place: the flag, or the file, that names the path, and the path, for errors; None:
            --data-path.

    Raises:
        UserError: there are none, or what is wrong with them.
    """
    return (ShardedDocuments if is_sharded(path) else IndexedDocuments)(path, place)


def is_sharded(path: str) -> bool:
    """Tell whether a path is a folder or a pattern of pairs, and not the prefix of one."""
    if os.path.isfile(path + ".idx"):
        return False
    return os.path.isdir(path) or any(sign in path for sign in "*?[")


class ShardedDocuments:
    """The documents of all .bin/.idx pairs of a folder, or whose prefixes fit a pattern (of which
    .bin or .idx may be the end). `megalong.data.stream.Documents`; prefix: the folder or pattern.

    max_token_id is the largest of all pairs, where all know theirs. A pair may be empty.
    place: as for `megalong.data.indexed.IndexedDocuments`.
    Raises UserError that names the pair and what is wrong with it, also where two were made with
    different tokenizers.
    """

    def __init__(self, path: str, place: str | None = None) -> None:
        self.prefix = str(path)
        self._place = place = f"--data-path {path}" if place is None else place
        prefixes = pair_prefixes(self.prefix, place)
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            pairs = list(threads.map(lambda prefix: _open(prefix, place), prefixes))
        lengths = [pair.index.document_lengths() for pair in pairs]
        self.lengths = np.concatenate(lengths)
        if not self.num_tokens:
            raise UserError(f"{place}: the {len(pairs)} pairs of .bin and .idx hold no tokens")
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
    """As of `megalong.data.stream.Documents`; the file is one of those that the pairs name."""
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
