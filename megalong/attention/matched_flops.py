"""Patterns that cost as much as another one: how the paper compares kinds of attention (LongNet,
arXiv 2307.02486, section 4.1, "the same computational cost").

The cost of a pattern is the number of (query, key) pairs of one sequence, which the FLOPs of
attention go with. Integers only.
"""

from __future__ import annotations

from bisect import bisect_left

from megalong.attention.local_pattern import LocalPattern
from megalong.attention.sparse_pattern import SparsePattern

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

    best = None
    for size in range(min(block, sequence_length), 0, -1):
        at = bisect_left(range(1, size + 1), pairs, key=lambda c: of(SparsePattern(size, c))) + 1
        for columns in {max(at - 1, 1), min(at, size)}:
            pattern = SparsePattern(size, columns)
            miss = abs(of(pattern) - pairs)
            if best is None or miss < best[0]:
                best = miss, pattern
        if best[0] <= CLOSE * pairs:
            break
    return best[1]
