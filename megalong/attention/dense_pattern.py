"""Dense attention, that of a vanilla Transformer: every pair of positions.

Only Python integers live here, as in `pattern`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalong.attention.band import Band


@dataclass(frozen=True)
class DensePattern:
    """The same in every layer and for every head."""

    def at_layer(self, layer: int) -> DensePattern:
        return self

    def for_heads(self, heads: int, kv_heads: int, start: int, stop: int) -> DensePattern:
        return self

    def band(self, causal: bool) -> Band:
        return Band(after=1 if causal else None)

    def partial_rows(self, ranks: int) -> float:
        """As of DilatedPattern: on the sequence axis, what has been swapped and what travels."""
        return 11.0 if ranks > 1 else 0.0

    def cached_rows(self, sequence_length: int, heads: int, kv_heads: int) -> int:
        """As of DilatedPattern: all."""
        return kv_heads * sequence_length

    def attention_pairs(self, sequence_length: int, heads: int, kv_heads: int, causal: bool) -> int:
        """The exact number of (query, key) pairs, summed over heads, of one sequence."""
        return heads * self.band(causal).pairs(sequence_length, sequence_length)
