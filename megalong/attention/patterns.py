"""The patterns of dense, local and sparse attention, and the bands that they are made of.

Only Python integers live here, as in `pattern`.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import isqrt

from megalong.attention.pattern import DilatedPattern, column_starts


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


class BandPattern:
    """Base class of patterns that are one band, the same in every layer and for every head."""

    def band(self, causal: bool) -> Band:
        raise NotImplementedError

    def at_layer(self, layer: int) -> BandPattern:
        return self

    def for_heads(self, heads: int, kv_heads: int, start: int, stop: int) -> BandPattern:
        return self

    def attention_pairs(self, sequence_length: int, heads: int, kv_heads: int, causal: bool) -> int:
        """The exact number of (query, key) pairs, summed over heads, of one sequence."""
        return heads * self.band(causal).pairs(sequence_length, sequence_length)


@dataclass(frozen=True)
class DensePattern(BandPattern):
    """Every pair of positions, as in a vanilla Transformer."""

    def band(self, causal: bool) -> Band:
        return Band(after=1 if causal else None)

    def partial_rows(self, ranks: int) -> float:
        """As of DilatedPattern: on the sequence axis, what has been swapped and what travels."""
        return 11.0 if ranks > 1 else 0.0

    def cached_rows(self, sequence_length: int, heads: int, kv_heads: int) -> int:
        """As of DilatedPattern: all."""
        return kv_heads * sequence_length


@dataclass(frozen=True)
class LocalPattern(BandPattern):
    """A window that slides with the query.

    window: positions that a query sees, its own and those before it; without a causal mask as many
        on the other side. Raises ValueError where it is below 1.
    """

    window: int

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    def band(self, causal: bool) -> Band:
        return Band(before=self.window - 1, after=1 if causal else self.window)

    def partial_rows(self, ranks: int) -> float:
        """As of DilatedPattern: the gradients, before they are rounded."""
        return 3.2

    def cached_rows(self, sequence_length: int, heads: int, kv_heads: int) -> int:
        """As of DilatedPattern: the window."""
        return kv_heads * min(self.window, sequence_length)


@dataclass(frozen=True)
class SparsePattern:
    """The fixed pattern of the Sparse Transformer (Child et al., arXiv 1904.10509, section 4.3).

    A query sees its own block, and of each block before it some columns at its end, which sum that
    block up; without a causal mask those of the later blocks too. kv head 0 takes the last columns
    of a block, kv head 1 those before them, and so on (section 5.1 there). A block that the
    sequence ends in has no columns.

    block: positions of a block. columns: of these, how many sum it up. starts: the first of them
    for each kv head; None is the rule above. Raises ValueError naming the field to change.
    """

    block: int
    columns: int
    starts: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        if not 1 <= self.columns <= self.block:
            raise ValueError(f"columns must lie in [1, {self.block}], got {self.columns}")

    def at_layer(self, layer: int) -> SparsePattern:
        """The same in every layer."""
        return self

    def for_heads(self, heads: int, kv_heads: int, start: int, stop: int) -> SparsePattern:
        """The pattern of the query heads [start, stop): whole groups of a model with `heads`."""
        group = heads // kv_heads
        return replace(self, starts=self.first_columns(kv_heads)[start // group : stop // group])

    def first_columns(self, kv_heads: int) -> tuple[int, ...]:
        """Where in a block the columns of each kv head begin."""
        if self.starts is not None:
            return self.starts
        return column_starts(self.block, self.columns, kv_heads)

    @property
    def own_block(self) -> DilatedPattern:
        """What a query sees of its own block."""
        return DilatedPattern((self.block,), (1,))

    def bands(self, first: int, causal: bool) -> tuple[Band, ...]:
        """What queries from position `first` on see of all columns, block after block."""
        common = {"first": first, "query_block": self.block, "key_block": self.columns}
        earlier, later = Band(after=0, **common), Band(before=-1, **common)
        return (earlier,) if causal else (earlier, later)

    def partial_rows(self, ranks: int) -> float:
        """As of DilatedPattern: the gradients of block and columns, before they are rounded."""
        return 7.0

    def cached_rows(self, sequence_length: int, heads: int, kv_heads: int) -> int:
        """As of DilatedPattern: a block, and the columns of all that have begun."""
        columns = -(-sequence_length // self.block) * self.columns
        return kv_heads * (min(self.block, sequence_length) + columns)

    def attention_pairs(self, sequence_length: int, heads: int, kv_heads: int, causal: bool) -> int:
        """The exact number of (query, key) pairs, summed over heads, of one sequence."""
        keys = sequence_length // self.block * self.columns
        others = sum(band.pairs(sequence_length, keys) for band in self.bands(0, causal))
        own = self.own_block.attention_pairs(sequence_length, heads, kv_heads, causal)
        return own + heads * others


CLOSE = 0.01  # relative


def matching_window(pairs: int, sequence_length: int, heads: int, causal: bool = True) -> int:
    """The window of local attention whose number of pairs comes nearest, at most the sequence."""

    def of(window: int) -> int:
        return LocalPattern(window).attention_pairs(sequence_length, heads, heads, causal)

    above = min(bisect_left(range(1, sequence_length + 1), pairs, key=of) + 1, sequence_length)
    return min((max(above - 1, 1), above), key=lambda window: abs(of(window) - pairs))


def matching_sparse(
    pairs: int, sequence_length: int, heads: int, kv_heads: int, block: int, causal: bool = True
) -> SparsePattern:
    """The fixed sparse pattern whose number of pairs comes nearest: with blocks of `block`, or, as
    long as that misses by more than 1%, the next smaller one."""

    def of(pattern: SparsePattern) -> int:
        return pattern.attention_pairs(sequence_length, heads, kv_heads, causal)

    best, largest = None, min(block, sequence_length)
    smallest = isqrt(sequence_length)  # above, the cost with one column grows with the block
    if smallest < largest and of(SparsePattern(largest, 1)) > pairs:
        sizes = range(smallest, largest + 1)
        fitting = bisect_right(sizes, pairs, key=lambda size: of(SparsePattern(size, 1)))
        largest = sizes[max(fitting - 1, 0)]
    for size in range(largest, 0, -1):
        at = bisect_left(range(1, size + 1), pairs, key=lambda c: of(SparsePattern(size, c))) + 1
        for columns in {max(at - 1, 1), min(at, size)}:
            pattern = SparsePattern(size, columns)
            miss = abs(of(pattern) - pairs)
            if best is None or miss < best[0]:
                best = miss, pattern
        if best[0] <= CLOSE * pairs:
            break
    return best[1]
