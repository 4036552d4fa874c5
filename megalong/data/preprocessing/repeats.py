"""Which texts have been seen before, by their 128-bit hashes."""

from __future__ import annotations

import hashlib

import numpy as np

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
