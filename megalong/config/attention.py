"""The kinds of attention, and which layers have which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megalong.attention import BACKENDS, DilatedPattern
from megalong.attention.patterns import (
    DensePattern,
    LocalPattern,
    SparsePattern,
    matching_sparse,
    matching_window,
)
from megalong.config.flags import (
    changed_fields,
    flag,
    flag_name,
    refuse_without,
    require_positive,
    shown,
)
from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from megalong.attention.passes import Passes


@dataclass(frozen=True)
class AttentionKind:
    """A kind of attention.

    pattern: makes the pattern, which positions attend to which, of the settings; it has the methods
        of DilatedPattern. Raises ValueError.
    describe: puts the pattern into words, for logs and model cards.
    passes: the class that computes it (`megalong.attention.passes`), which needs torch.
    fields: the settings that the pattern is made of.
    """

    pattern: Callable[[AttentionConfig], Any]
    describe: Callable[[Any], str]
    passes: str
    fields: tuple[str, ...] = ()

    def passes_class(self) -> type[Passes]:
        """Import the class that computes it."""
        return resolve_name(self.passes)


def _describe_branches(pattern: DilatedPattern) -> str:
    branches = ", ".join(f"{length}/{rate}" for length, rate in pattern.branches)
    return f"dilated attention, segment length/dilation rate: {branches}"


# To add one: its pattern in megalong/attention/patterns.py, the file of its passes beside local.py,
# and its row here, with its flags below.
KINDS = MappingProxyType(
    {
        "dilated": AttentionKind(
            pattern=lambda config: DilatedPattern(
                config.segment_lengths, config.dilation_rates, config.head_offsets
            ),
            describe=_describe_branches,
            passes="megalong.attention.dilated:DilatedPasses",
            fields=("segment_lengths", "dilation_rates", "head_offsets"),
        ),
        "dense": AttentionKind(
            pattern=lambda config: DensePattern(),
            describe=lambda pattern: "dense attention",
            passes="megalong.attention.dense:DensePasses",
        ),
        "local": AttentionKind(
            pattern=lambda config: LocalPattern(config.window_size),
            describe=lambda pattern: f"local attention, window {pattern.window}",
            passes="megalong.attention.local:LocalPasses",
            fields=("window_size",),
        ),
        "sparse": AttentionKind(
            pattern=lambda config: SparsePattern(config.sparse_block_size, config.sparse_columns),
            describe=lambda pattern: (
                f"sparse attention, blocks of {pattern.block}, {pattern.columns} columns of each"
            ),
            passes="megalong.attention.sparse:SparsePasses",
            fields=("sparse_block_size", "sparse_columns"),
        ),
    }
)


@dataclass(frozen=True)
class AttentionConfig:
    """Which positions attend to which (LongNet, arXiv 2307.02486, section 3.2)."""

    attention: tuple[str, ...] = flag(
        ("dilated",),
        "kind of attention; several: of one layer after the other, over and over",
        choices=tuple(KINDS),
    )
    segment_lengths: tuple[int, ...] | None = flag(
        None,
        "dilated: segment length of each branch (default: 2048 x 4^k, with dilation rates 4^k)",
    )
    dilation_rates: tuple[int, ...] | None = flag(None, "dilated: dilation rate of each branch")
    head_offsets: str | tuple[tuple[int, ...], ...] = flag(
        "mod",
        "dilated: which positions a head takes in a branch: mod (kv head mod r, the paper's rule),"
        " block (torchscale's), layer (mod, shifted by the kv heads each layer), or a table of"
        " branches x heads as JSON",
        is_json=True,
    )
    window_size: int = flag(2048, "local: positions that a query sees, its own and those before it")
    sparse_block_size: int = flag(2048, "sparse: positions of a block")
    sparse_columns: int = flag(
        32, "sparse: positions at the end of each block that the later blocks see too"
    )
    match_flops: bool = flag(
        False,
        "take the window of local, the columns of sparse attention (or the next smaller block) that"
        " cost as much as the dilated branches",
    )
    attention_backend: str = flag(
        "auto",
        "Triton kernels, PyTorch's operators, or the plain definition; auto: the first that runs,"
        " for dense attention PyTorch's",
        choices=("auto", *BACKENDS),
    )

    def __post_init__(self):
        if isinstance(self.attention, str):  # one for all layers
            object.__setattr__(self, "attention", (self.attention,))

    def name(self, layer: int) -> str:
        """Return the name of the kind of a layer, from 0."""
        return self.attention[layer % len(self.attention)]

    def kind(self, layer: int) -> AttentionKind:
        """Return the kind of a layer, from 0."""
        return KINDS[self.name(layer)]

    def pattern(self, layer: int) -> Any:
        """Return which positions attend to which in a layer, from 0 (after `resolve`)."""
        return self.kind(layer).pattern(self).at_layer(layer)

    @property
    def kinds(self) -> dict[str, AttentionKind]:
        """The kinds that there are, by name, each once."""
        return {name: KINDS[name] for name in self.attention}

    @property
    def patterns(self) -> dict[str, Any]:
        """The pattern of each kind, as its first layer has it (after `resolve`)."""
        return {name: kind.pattern(self) for name, kind in self.kinds.items()}

    @property
    def description(self) -> str:
        """The patterns in words."""
        words = [kind.describe(kind.pattern(self)) for kind in self.kinds.values()]
        if len(words) == 1:
            return words[0]
        return f"layers {' '.join(self.attention)}, and so on: {'; '.join(words)}"

    def resolve(self, seq_length: int) -> AttentionConfig:
        """Fill in branches where none are given. Raises UserError where half of them is."""
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

    def with_matched_flops(
        self, heads: int, kv_heads: int, seq_length: int, causal: bool
    ) -> AttentionConfig:
        """With `match_flops`, take window, columns and block that cost as much as the dilated
        branches (after `check`). Raises UserError where none comes within 2%."""
        if not self.match_flops:
            return self
        dilated = KINDS["dilated"].pattern(self)
        pairs = dilated.attention_pairs(seq_length, heads, kv_heads, causal)
        changed = self
        if "local" in self.attention:
            window = matching_window(pairs, seq_length, heads, causal)
            changed = dataclasses.replace(changed, window_size=window)
        if "sparse" in self.attention:
            found = matching_sparse(
                pairs, seq_length, heads, kv_heads, self.sparse_block_size, causal
            )
            changed = dataclasses.replace(
                changed, sparse_block_size=found.block, sparse_columns=found.columns
            )
        for name in {"local", "sparse"} & {*self.attention}:
            pattern = KINDS[name].pattern(changed)
            there = pattern.attention_pairs(seq_length, heads, kv_heads, causal)
            if abs(there - pairs) > 0.02 * pairs:
                raise UserError(
                    f"--match-flops: {name} attention comes no nearer to the dilated branches than"
                    f" {there / pairs:.2f} times their cost: leave it out, or change the branches"
                )
        return changed

    def changed_by_matching(self, resolved: AttentionConfig) -> list[str]:
        """Say what `match_flops` has changed of these settings, in lines. resolved: what became of
        them."""
        given, block = self.sparse_block_size, resolved.sparse_block_size
        if block == given:
            return []
        return [
            f"--match-flops: sparse attention has blocks of {block}: with --sparse-block-size"
            f" {given} no number of columns comes as near to the cost of the dilated branches"
        ]

    def oddities(self, seq_length: int) -> list[str]:
        """Say what can be computed and yet is hardly meant, a line each (after `resolve`)."""
        assert self.segment_lengths is not None
        lines = []
        longer = [length for length in self.segment_lengths if length > seq_length]
        if "dilated" in self.attention and longer:
            lines.append(
                f"--segment-lengths {shown(longer)}: above --seq-length {seq_length}, and"
                " so one segment, the whole sequence"
            )
        longest = max(self.segment_lengths)
        if {*self.attention} == {"dilated"} and longest < seq_length:
            lines.append(
                f"--segment-lengths {shown(self.segment_lengths)}: the longest is below"
                f" --seq-length {seq_length}, and no token sees beyond its segment of {longest}"
            )
        for kind, name in (("local", "window_size"), ("sparse", "sparse_block_size")):
            size = getattr(self, name)
            if kind in self.attention and size >= seq_length:
                lines.append(
                    f"{flag_name(name)} {size}: the whole of --seq-length {seq_length}, so that"
                    f" {kind} attention is dense"
                )
        for kind in KINDS.keys() - {*self.attention, "dilated"}:  # exports keep those branches
            for name in changed_fields(self, *KINDS[kind].fields):
                lines.append(f"{flag_name(name)} is of {kind} attention, which no layer has")
        return lines

    def check(self, heads: int, kv_heads: int, seq_length: int, num_layers: int) -> None:
        """Raise UserError where these fields are no pattern for so many heads (after `resolve`).

        The dilated one has to be right whatever the kinds are: checkpoints and exports keep it.
        """
        if not self.attention:
            raise UserError("--attention names no kind: set one or more")
        if len(self.attention) > num_layers:
            raise UserError(
                f"--attention has {len(self.attention)} kinds, more than --num-layers {num_layers}"
            )
        lengths, rates = self.segment_lengths, self.dilation_rates
        assert lengths is not None and rates is not None
        if len(lengths) != len(rates):
            raise UserError(
                f"--segment-lengths has {len(lengths)} values and --dilation-rates {len(rates)}:"
                " a branch is one of each"
            )
        for name, values in (("segment_lengths", lengths), ("dilation_rates", rates)):
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
            KINDS["dilated"].pattern(self).offsets(heads, kv_heads)
        except ValueError as error:
            raise UserError(
                f"--segment-lengths, --dilation-rates or --head-offsets: {error}"
            ) from error
        require_positive(self, "window_size", "sparse_block_size", "sparse_columns")
        if not {"local", "sparse"} & {*self.attention}:
            what = "local and sparse attention"
            refuse_without(what, "--attention local, say", self, "match_flops")
        if self.sparse_columns > self.sparse_block_size:
            raise UserError(
                f"--sparse-columns {self.sparse_columns} is above --sparse-block-size"
                f" {self.sparse_block_size}: columns are positions of a block"
            )


# What a model is made with: checkpoints and exports keep it. Every backend computes the same, and
# --match-flops is in what it has chosen.
PATTERN_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(AttentionConfig)
    if field.name not in ("attention_backend", "match_flops")
)
