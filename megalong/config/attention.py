"""The attention pattern."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from megalong.attention import DilatedPattern
from megalong.attention.backends import BACKEND_VARIABLE, BACKENDS
from megalong.config.flags import flag
from megalong.errors import UserError


@dataclass(frozen=True)
class AttentionConfig:
    """The attention pattern (LongNet, arXiv 2307.02486, section 3.2)."""

    attention: str = flag("dilated", "kind of attention", choices=("dilated", "dense"))
    segment_lengths: tuple[int, ...] | None = flag(
        None,
        "segment length of each branch (default: a ladder 2048 x 4^k up to the sequence length,"
        " with dilation rates 4^k)",
        item=int,
    )
    dilation_rates: tuple[int, ...] | None = flag(None, "dilation rate of each branch", item=int)
    head_offsets: str | tuple[tuple[int, ...], ...] = flag(
        "mod",
        "which positions a head takes in a branch: mod (kv head mod r, the paper's rule), block"
        " (torchscale's), layer (mod, shifted by the kv heads each layer), or a table of branches"
        " x heads as JSON",
        is_json=True,
    )

    def pattern(self) -> DilatedPattern:
        """The dilated pattern that these fields describe (after `resolve`)."""
        assert self.segment_lengths is not None and self.dilation_rates is not None
        return DilatedPattern(self.segment_lengths, self.dilation_rates, self.head_offsets)

    def resolve(self, seq_length: int) -> AttentionConfig:
        """The same with its branches filled in. Raises UserError where half of them is given."""
        lengths, rates = self.segment_lengths, self.dilation_rates
        if (lengths is None) != (rates is None):
            names = ("--segment-lengths", "--dilation-rates")
            given, missing = names[:: 1 if rates is None else -1]
            raise UserError(f"{given} is given without {missing}: give both, or neither")
        if lengths is None:
            ladder = DilatedPattern.geometric(seq_length)
            lengths, rates = ladder.segment_lengths, ladder.dilation_rates
        return dataclasses.replace(
            self, segment_lengths=tuple(lengths), dilation_rates=tuple(rates)
        )

    def check(self, heads: int, kv_heads: int) -> None:
        """Raise UserError where these fields are no pattern for so many heads (after
        `resolve`)."""
        lengths, rates = self.segment_lengths, self.dilation_rates
        assert lengths is not None and rates is not None
        if len(lengths) != len(rates):
            raise UserError(
                f"--segment-lengths has {len(lengths)} values and --dilation-rates {len(rates)}:"
                " a branch is one of each"
            )
        backend = os.environ.get(BACKEND_VARIABLE) or "auto"
        if backend != "auto" and backend not in BACKENDS:
            raise UserError(f"{BACKEND_VARIABLE}={backend}: choose auto, {', '.join(BACKENDS)}")
        try:
            self.pattern().offsets(heads, kv_heads)
        except ValueError as error:
            raise UserError(
                f"--segment-lengths, --dilation-rates or --head-offsets: {error}"
            ) from error
