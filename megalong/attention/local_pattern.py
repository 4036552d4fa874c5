"""A window that slides with the query.

A query sees `window` positions, its own and those before it; without a causal mask as many on the
other side.

Only Python integers live here, as in `pattern`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalong.attention.band import Band


@dataclass(frozen=True)
class LocalPattern:
    """window: positions that a query sees, with its own. Raises ValueError where it is below 1."""

    window: int

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    def at_layer(self, layer: int) -> LocalPattern:
        """The same in every layer."""
        return self

    def for_heads(self, heads: int, kv_heads: int, start: int, stop: int) -> LocalPattern:
        """The same for every head."""
        return self

    def band(self, causal: bool) -> Band:
        return Band(before=self.window - 1, after=1 if causal else self.window)

    def partial_rows(self, ranks: int) -> float:
        """As of DilatedPattern: the gradients, before they are rounded."""
        return 3.2

    def cached_rows(self, sequence_length: int, heads: int, kv_heads: int) -> int:
        """As of DilatedPattern: the window."""
        return kv_heads * min(self.window, sequence_length)

    def attention_pairs(self, sequence_length: int, heads: int, kv_heads: int, causal: bool) -> int:
        """The exact number of (query, key) pairs, summed over heads, of one sequence."""
        return heads * self.band(causal).pairs(sequence_length, sequence_length)
