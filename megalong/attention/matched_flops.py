"""Patterns that cost as much as another one: how the paper compares kinds of attention (LongNet,
arXiv 2307.02486, section 4.1, "the same computational cost").

The cost of a pattern is the number of (query, key) pairs of one sequence, which the FLOPs of
attention go with. Integers only.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import isqrt

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
