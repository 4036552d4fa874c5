"""Which key rows each query row sees, where that is one range of them: causal masks, sliding
windows, the blocks of a sparse pattern.

Only Python integers live here, as in `pattern`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(frozen=True)
class Band:
    """A range of key rows for every query row; the ends of the range grow with the query.

    Query row t belongs to block i = (first + t) // query_block, and sees the key rows
    [(i - before) * key_block, (i + after) * key_block), of those that there are.

    before, after: None sees all, on that side. Together above zero.
    first: the place of query row 0 among the keys, in rows of queries; not negative.
    text: all of the above as a string, which `from_text` reads.

    Raises ValueError naming the field to change.
    """

    before: int | None = None
    after: int | None = None
    first: int = 0
    query_block: int = 1
    key_block: int = 1
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.query_block < 1 or self.key_block < 1:
            raise ValueError(
                f"query_block ({self.query_block}) and key_block ({self.key_block}) must be at"
                " least 1"
            )
        if self.first < 0:
            raise ValueError(f"first must be at least 0, got {self.first}")
        if None not in (self.before, self.after) and self.before + self.after < 1:
            raise ValueError(
                f"before ({self.before}) and after ({self.after}) leave a query no key: their sum"
                " must be at least 1"
            )
        fields = (self.before, self.after, self.first, self.query_block, self.key_block)
        object.__setattr__(self, "text", json.dumps(fields))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_text(text: str) -> Band:
        """The band with this `text`; the same object for the same text."""
        return Band(*json.loads(text))

    @property
    def sees_all(self) -> bool:
        """Every query row sees every key row, whatever their numbers are."""
        return self.before is None and self.after is None

    def start(self, row: int, keys: int) -> int:
        """The first of so many key rows that a query row sees."""
        return 0 if self.before is None else self._clipped(row, -self.before, keys)

    def stop(self, row: int, keys: int) -> int:
        """The key row after the last that a query row sees."""
        return keys if self.after is None else self._clipped(row, self.after, keys)

    def _clipped(self, row: int, shift: int, keys: int) -> int:
        block = (self.first + row) // self.query_block
        return min(max((block + shift) * self.key_block, 0), keys)

    def pairs(self, queries: int, keys: int) -> int:
        """The number of (query row, key row) pairs."""
        ends = queries * keys if self.after is None else self._sum(self.after, queries, keys)
        return ends - (0 if self.before is None else self._sum(-self.before, queries, keys))

    def _sum(self, shift: int, queries: int, keys: int) -> int:
        """The sum of `_clipped` over all query rows, without a loop over them."""
        if not queries:
            return 0
        size = self.query_block
        first, last = self.first // size, (self.first + queries - 1) // size
        # Blocks begin to see keys at `grows`, and see all of them from `full` on.
        grows, full = -shift, -(-keys // self.key_block) - shift
        low, high = (min(max(x, first), last + 1) for x in (grows, full))
        growing = (high - low) * (low + high - 1 + 2 * shift) // 2 * self.key_block
        whole = size * (growing + (last + 1 - high) * keys)
        missing_before = self.first - first * size
        missing_after = (last + 1) * size - self.first - queries
        return (
            whole
            - missing_before * self._clipped(0, shift, keys)
            - missing_after * self._clipped(queries - 1, shift, keys)
        )


ALL = Band()
