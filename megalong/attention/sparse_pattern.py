"""The fixed pattern of the Sparse Transformer (Child et al., arXiv 1904.10509, section 4.3).

The sequence is cut into blocks. A query sees its own block, and of each block before it some
columns at its end, which sum that block up: both parts of "fixed" attention in one softmax. Heads
take different columns (section 5.1 there): kv head 0 the last ones of a block, kv head 1 those
before them, and so on. Without a causal mask a query sees the columns of the later blocks too. A
block that the sequence ends in has no columns.

Only Python integers live here, as in `pattern`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megalong.attention.band import Band
from megalong.attention.pattern import DilatedPattern, column_starts


@dataclass(frozen=True)
class SparsePattern:
    """block: positions of a block. columns: of these, how many sum it up. starts: the first of them
    for each kv head; None is the rule above. Raises ValueError naming the field to change."""

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
