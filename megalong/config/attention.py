"""The kinds of attention, and the pattern of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any

from megalong.attention import DilatedPattern
from megalong.attention.backends import BACKENDS
from megalong.config.flags import flag, flag_name, shown
from megalong.errors import UserError


@dataclass(frozen=True)
class AttentionKind:
    """What is known of a kind of attention; whoever needs to know asks here.

    pattern: which rows attend to which, from the settings and the length of a sequence; imports no
        torch. Raises ValueError. Asked of it: `at_layer`, `for_heads`, `attention_pairs`, as of
        DilatedPattern, and by the functions below what they want.
    describe: the pattern in words, for logs and model cards.
    Functions, imported when they are first needed, because they need torch:
    attend: (q, k, v, pattern, *, scale, backend) -> out, of a whole sequence, causal; shapes as of
        `megalong.attention.dilated_attention`.
    attend_shard: (q, k, v, pattern, sequence, *, scale, backend) -> out, of a shard of a sequence.
    subgroup_sizes: (pattern, shard_length, ranks) -> numbers of ranks that exchange rows.
    passes: (pattern, sequence, *, scale, backend) -> forward and backward as functions without
        autograd, causal, of a shard or, where sequence is None, of a whole sequence.
    """

    pattern: Callable[[AttentionConfig, int], Any]
    describe: Callable[[Any], str]
    attend: str
    attend_shard: str = "megalong.attention.sequence_parallel:sequence_parallel_attention"
    subgroup_sizes: str = "megalong.attention.sequence_plan:subgroup_sizes"
    passes: str = "megalong.attention.passes:Passes"

    def function(self, name: str) -> Callable:
        """One of the functions, by the name of its field."""
        return resolve_name(getattr(self, name))


def _describe_branches(pattern: DilatedPattern) -> str:
    branches = ", ".join(f"{length}/{rate}" for length, rate in pattern.branches)
    return f"dilated attention, segment length/dilation rate: {branches}"


# To add one: a file beside megalong/attention/dense.py, and its row here, with its flags below.
KINDS = MappingProxyType(
    {
        "dilated": AttentionKind(
            pattern=lambda config, seq_length: config.dilated_pattern(),
            describe=_describe_branches,
            attend="megalong.attention.dilated:dilated_attention",
        ),
        "dense": AttentionKind(
            # One branch that spans the sequence and leaves nothing out.
            pattern=lambda config, seq_length: DilatedPattern((seq_length,), (1,)),
            describe=lambda pattern: "dense attention",
            attend="megalong.attention.dense:attend",
        ),
    }
)


@dataclass(frozen=True)
class AttentionConfig:
    """The attention pattern (LongNet, arXiv 2307.02486, section 3.2)."""

    attention: str = flag("dilated", "kind of attention", choices=tuple(KINDS))
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
    attention_backend: str = flag(
        "auto",
        "what computes it: Triton kernels, PyTorch's operators, or the plain definition; auto takes"
        " the first of the first two that runs",
        choices=("auto", *BACKENDS),
    )

    @property
    def kind(self) -> AttentionKind:
        return KINDS[self.attention]

    def pattern(self, seq_length: int) -> Any:
        """Which rows attend to which in sequences of this length (after `resolve`)."""
        return self.kind.pattern(self, seq_length)

    def description(self, seq_length: int) -> str:
        """The pattern in words."""
        return self.kind.describe(self.pattern(seq_length))

    def dilated_pattern(self) -> DilatedPattern:
        """The dilated pattern that these fields describe (after `resolve`)."""
        assert self.segment_lengths is not None and self.dilation_rates is not None
        return DilatedPattern(self.segment_lengths, self.dilation_rates, self.head_offsets)

    def resolve(self, seq_length: int) -> AttentionConfig:
        """These settings, with branches where none are given. Raises UserError where half of them
        is given."""
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

    def oddities(self, seq_length: int) -> list[str]:
        """What can be computed, and yet is hardly what was meant; a line each (after `resolve`)."""
        assert self.segment_lengths is not None
        longer = [length for length in self.segment_lengths if length > seq_length]
        if self.attention != "dilated" or not longer:
            return []
        return [
            f"--segment-lengths {shown(longer)}: above --seq-length {seq_length}, and"
            " so one segment, the whole sequence"
        ]

    def check(self, heads: int, kv_heads: int, seq_length: int) -> None:
        """Raise UserError where these fields are no pattern for so many heads (after `resolve`).

        The dilated one has to be right whatever the kind is: checkpoints and exports keep it.
        """
        lengths, rates = self.segment_lengths, self.dilation_rates
        assert lengths is not None and rates is not None
        if len(lengths) != len(rates):
            raise UserError(
                f"--segment-lengths has {len(lengths)} values and --dilation-rates {len(rates)}:"
                " a branch is one of each"
            )
        for name in ("segment_lengths", "dilation_rates"):
            values = getattr(self, name)
            if values and min(values) < 1:
                raise UserError(f"{flag_name(name)} {shown(values)}: each must be at least 1")
        for length, rate in zip(lengths, rates, strict=True):
            if rate > min(length, seq_length) > 0:
                what = f"segment length {length}"
                if length > seq_length:
                    what = f"one segment, of --seq-length {seq_length}"
                raise UserError(
                    f"--dilation-rates {rate} is above its {what}, of which one position at most"
                    f" would take part: set {min(length, seq_length)} or less"
                )
        try:
            self.dilated_pattern().offsets(heads, kv_heads)
        except ValueError as error:
            raise UserError(
                f"--segment-lengths, --dilation-rates or --head-offsets: {error}"
            ) from error
        try:
            self.pattern(seq_length).for_heads(heads, kv_heads, 0, heads)
        except ValueError as error:
            raise UserError(f"--attention {self.attention}: {error}") from error


# What a model is made with: checkpoints and exports keep it.
PATTERN_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(AttentionConfig)
    if field.name != "attention_backend"  # all compute the same
)
