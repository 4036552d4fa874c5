"""Which rows attend to which: segment lengths, dilation rates and head offsets.

A pattern is a list of branches. Branch (w, r) cuts the sequence into segments of w positions;
inside a segment a head with offset o keeps the rows o, o + r, o + 2r, ... and those rows attend
to each other densely. Paper: LongNet (arXiv 2307.02486), section 2.2 (one branch, eq. 2-8), 2.3
(several branches, eq. 9-12) and 2.4 (heads shifted against each other, eq. 13-15).

Only Python integers live here: importing this module costs nothing and builds no tensor. The file
travels with exported models (megalong/hf), and needs nothing but Python.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import index

OFFSET_RULES = ("mod", "block", "layer")


@dataclass(frozen=True)
class DilatedPattern:
    """The branches of dilated attention. Immutable and hashable.

    segment_lengths: positions per segment w, one per branch. Any w >= 1: it need not divide the
        sequence (the last segment is shorter) and may exceed it (one segment).
    dilation_rates: stride r between the kept rows, one per branch. Any r >= 1.
    head_offsets: the first kept row o of each head, 0 <= o < r:
        "mod"    kv_head mod r: the paper's rule (section 2.4) where heads == kv_heads; with
                 grouped queries the heads of one group share their rows.
        "block"  head // ceil(heads / r): what torchscale's code does.
        "layer"  (kv_head + layer * kv_heads) mod r: depth walks through all the residues.
        or a table of integers, branches x heads.
    layer: index of the layer, from 0; only the "layer" rule looks at it.
    text: all of the above as a string, which `from_text` reads: PyTorch's operators take strings,
        but no objects.

    Raises ValueError naming the field to change.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: str | tuple[tuple[int, ...], ...] = "mod"
    layer: int = 0
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        def set_field(name, value):  # the way to write in a frozen dataclass
            object.__setattr__(self, name, value)

        set_field("segment_lengths", _integers("segment_lengths", self.segment_lengths))
        set_field("dilation_rates", _integers("dilation_rates", self.dilation_rates))
        set_field("layer", _integers("layer", [self.layer])[0])
        if not self.segment_lengths:
            raise ValueError("segment_lengths is empty: give at least one branch, such as (2048,)")
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                f"segment_lengths has {len(self.segment_lengths)} entries and dilation_rates has "
                f"{len(self.dilation_rates)}: give one of each per branch"
            )
        for name in ("segment_lengths", "dilation_rates"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must all be at least 1, got {getattr(self, name)}")
        if self.layer < 0:
            raise ValueError(f"layer must be at least 0, got {self.layer}")
        if isinstance(self.head_offsets, str):
            if self.head_offsets not in OFFSET_RULES:
                raise ValueError(
                    f"head_offsets must be one of {', '.join(OFFSET_RULES)} or a table of "
                    f"integers (branches x heads), got {self.head_offsets!r}"
                )
        else:
            set_field("head_offsets", self._checked_table())
        fields = (self.segment_lengths, self.dilation_rates, self.head_offsets, self.layer)
        set_field("text", json.dumps(fields))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_text(text: str) -> DilatedPattern:
        """The pattern with this `text`; the same object for the same text."""
        return DilatedPattern(*json.loads(text))

    def _checked_table(self) -> tuple[tuple[int, ...], ...]:
        table = tuple(_integers("head_offsets", row) for row in self.head_offsets)
        if len(table) != len(self.dilation_rates) or len({len(row) for row in table}) != 1:
            raise ValueError(
                f"head_offsets must hold one row per branch ({len(self.dilation_rates)}) and in "
                f"each one integer per head, got rows of lengths {[len(row) for row in table]}"
            )
        for branch, (row, rate) in enumerate(zip(table, self.dilation_rates, strict=True)):
            if any(not 0 <= offset < rate for offset in row):
                raise ValueError(
                    f"head_offsets of branch {branch} must lie in [0, {rate}), its dilation "
                    f"rate, got {list(row)}"
                )
        return table

    @classmethod
    def geometric(
        cls, sequence_length: int, first_segment_length: int = 2048, ratio: int = 4, **fields
    ) -> DilatedPattern:
        """The default ladder: w_k = w_0 * ratio^k and r_k = ratio^k.

        It ends with the first branch that spans the sequence, its w clipped to sequence_length.
        Each branch then costs 1/ratio of the one before (eq. 16: 2 N d w / r^2), so the total
        stays below 2 a/(a-1) w_0 N d with a = ratio (eq. 17-18): linear in N, however long the
        ladder, while any two tokens are O(log N) layers apart (eq. 19-20).

        fields: head_offsets and layer, passed on.
        """
        if sequence_length < 1 or first_segment_length < 1:
            raise ValueError(
                "sequence_length and first_segment_length must be at least 1, got "
                f"{sequence_length} and {first_segment_length}"
            )
        if ratio < 2:
            raise ValueError(f"ratio must be at least 2 for the ladder to grow, got {ratio}")
        lengths, rates = [first_segment_length], [1]
        while lengths[-1] < sequence_length:
            lengths.append(lengths[-1] * ratio)
            rates.append(rates[-1] * ratio)
        lengths[-1] = min(lengths[-1], sequence_length)
        return cls(tuple(lengths), tuple(rates), **fields)

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """The (segment length, dilation rate) pairs."""
        return tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))

    def at_layer(self, layer: int) -> DilatedPattern:
        """The pattern as layer number `layer` (from 0) uses it."""
        return replace(self, layer=layer)

    def for_heads(self, heads: int, kv_heads: int, start: int, stop: int) -> DilatedPattern:
        """The pattern of the query heads [start, stop) of a model with `heads` heads.

        A tensor-parallel rank holds a slice of the heads; their offsets are those of the whole
        model, so the slice is frozen into a table. Call at_layer first: a table has no layer.
        """
        if not 0 <= start < stop <= heads:
            raise ValueError(f"head slice [{start}, {stop}) must lie inside [0, {heads})")
        table = tuple(row[start:stop] for row in self.offsets(heads, kv_heads))
        return replace(self, head_offsets=table, layer=0)  # equal slices of all layers are equal

    def offsets(self, heads: int, kv_heads: int) -> tuple[tuple[int, ...], ...]:
        """The offset of every query head in every branch: branches x heads integers."""
        check_heads(heads, kv_heads)
        if not isinstance(self.head_offsets, str):
            if len(self.head_offsets[0]) != heads:
                raise ValueError(
                    f"head_offsets is a table for {len(self.head_offsets[0])} heads, but the "
                    f"queries have {heads}"
                )
            return self.head_offsets
        group = heads // kv_heads
        rule = {
            "mod": lambda head, rate: (head // group) % rate,
            "block": lambda head, rate: head // -(-heads // rate),
            "layer": lambda head, rate: (head // group + self.layer * kv_heads) % rate,
        }[self.head_offsets]
        return tuple(
            tuple(rule(head, rate) for head in range(heads)) for rate in self.dilation_rates
        )

    def segments(self, branch: int, sequence_length: int) -> Iterator[tuple[int, int]]:
        """The [start, stop) of a branch's segments, in order."""
        length = self.segment_lengths[branch]
        for start in range(0, sequence_length, length):
            yield start, min(start + length, sequence_length)

    def sparse_rows(self, branch: int, segment: tuple[int, int], offset: int) -> range:
        """The positions that take part in a branch, inside the segment [start, stop)."""
        return range(segment[0] + offset, segment[1], self.dilation_rates[branch])

    def partial_rows(self, ranks: int) -> float:
        """Float32 rows of a head that a backward pass holds for each position of one of so many
        ranks, besides its results: here the gradients of two that the sparse branches hand to the
        dense one. An estimate."""
        return sum(2 / rate for rate in self.dilation_rates if rate > 1)

    def attention_pairs(self, sequence_length: int, heads: int, kv_heads: int, causal: bool) -> int:
        """The exact number of (query, key) pairs, summed over heads and branches, of one sequence.

        A pair that two branches offer counts twice, as it does in the softmax.
        """
        pairs = 0
        for (length, rate), row in zip(self.branches, self.offsets(heads, kv_heads), strict=True):
            segments = ((length, sequence_length // length), (sequence_length % length, 1))
            for segment, segment_count in segments:
                for offset, head_count in Counter(row).items():
                    n = len(range(offset, segment, rate))
                    pairs += segment_count * head_count * (n * (n + 1) // 2 if causal else n * n)
        return pairs

    def cached_rows(self, sequence_length: int, heads: int, kv_heads: int) -> int:
        """The most rows of keys, over the kv heads, that decoding keeps of one sequence: in each
        branch those of a segment, once for the heads of a group that share them."""
        group = heads // kv_heads
        rows = 0
        for (width, rate), offsets in zip(
            self.branches, self.offsets(heads, kv_heads), strict=True
        ):
            shared = all(offsets[head] == offsets[head - head % group] for head in range(heads))
            rows += (kv_heads if shared else heads) * -(-min(width, sequence_length) // rate)
        return rows

    def attention_flops(
        self, sequence_length: int, heads: int, kv_heads: int, head_dim: int, causal: bool = True
    ) -> int:
        """Floating-point operations of one forward pass over one sequence: 4 head_dim per pair.

        Two products (q k and p v), each head_dim multiplications and additions; eq. 16 counts a
        multiplication with its addition as one. A backward pass counts 2.5 times as much: the four
        products of the gradients, and one that recomputes the scores.
        """
        return 4 * head_dim * self.attention_pairs(sequence_length, heads, kv_heads, causal)


def column_starts(block: int, columns: int, kv_heads: int) -> tuple[int, ...]:
    """Where in a block the columns of each kv head begin that sum the block up: kv head 0 has the
    last ones, kv head 1 those before them, and so on round (`patterns.SparsePattern`)."""
    places = block // columns
    return tuple(block - columns * (1 + head % places) for head in range(kv_heads))


def check_heads(heads: int, kv_heads: int) -> None:
    """Raise ValueError unless the query heads share the key and value heads evenly."""
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"heads ({heads}) must be a multiple of kv_heads ({kv_heads}), both at least 1"
        )


def _integers(name: str, values) -> tuple[int, ...]:
    try:
        return tuple(index(value) for value in values)
    except TypeError:
        raise ValueError(f"{name} must hold integers, got {values!r}") from None
