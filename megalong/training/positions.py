"""Buckets of positions in the context."""

from __future__ import annotations


def position_edges(seq_length: int) -> list[int]:
    """Edges of the buckets of positions: 0, 4, 6, 8, 12, 16, 24, ... up to the sequence length.

    Two buckets an octave: what a model gains from context it gains over orders of magnitude.
    """
    edges, power = [0], 4
    while power < seq_length:
        edges += [power, power + power // 2]
        power *= 2
    return [edge for edge in edges if edge < seq_length] + [seq_length]
