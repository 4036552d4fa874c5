"""The Transformer, and the scalings of its rotary positions beyond their first training's length.

`megalong.model.rotary` and `megalong.model.rope_scaling` compute what the settings say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from megalong.config.flags import (
    changed_fields,
    default,
    flag,
    flag_name,
    refuse_without,
    require_more_than_zero,
    require_positive,
)
from megalong.utils.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer: what the weights are."""

    num_layers: int = flag(12, "number of Transformer layers")
    hidden_size: int = flag(768, "width of the residual stream")
    ffn_hidden_size: int | None = flag(
        None, "width of the MLP (default: 4 x hidden size; 8/3 x, a multiple of 64, with SwiGLU)"
    )
    num_attention_heads: int = flag(12, "number of query heads")
    num_query_groups: int | None = flag(
        None, "number of key/value heads, GQA (default: as many as query heads)"
    )
    kv_channels: int | None = flag(None, "head dimension (default: hidden size / heads)")
    seq_length: int = flag(8192, "tokens in one training sequence")
    normalization: str = flag("RMSNorm", "norm module", choices=("RMSNorm", "LayerNorm"))
    norm_epsilon: float = flag(1e-5, "epsilon of the norm")
    swiglu: bool = flag(True, "SwiGLU MLP; --no-swiglu gives GELU")
    add_bias_linear: bool = flag(False, "biases in the linear layers")
    add_qkv_bias: bool = flag(
        False, "biases in the query, key and value projections, also without --add-bias-linear"
    )
    qk_layernorm: bool = flag(False, "a norm of each head's queries and keys")
    sub_layer_norm: bool = flag(
        False, "a norm before each matrix that writes to the residual stream, too (MAGNETO)"
    )
    position_embedding_type: str = flag(
        "rope", "position encoding", choices=("rope", "xpos", "none")
    )
    xpos_scale_base: int = flag(
        512, "with xpos: positions over which scores decay; a larger base has room for more"
    )
    rotary_base: float = flag(10000.0, "base of the rotary frequencies")
    rotary_ntk_factor: float | None = flag(
        None,
        "the slowest rotary frequency becomes slower by this factor: NTK scaling (default: no)",
    )
    rotary_seq_len_interpolation_factor: float | None = flag(
        None, "all rotary frequencies become slower by this factor: linear scaling (default: no)"
    )
    rope_scaling_factor: float | None = flag(
        None, "slow rotary frequencies become slower by this factor, as in Llama 3.1 (default: no)"
    )
    rope_original_length: int = flag(
        8192, "with --rope-scaling-factor: tokens in a sequence before the scaling"
    )
    rope_low_freq_factor: float = flag(
        1.0, "with --rope-scaling-factor: fewer turns in that length are slower by the whole factor"
    )
    rope_high_freq_factor: float = flag(
        4.0, "with --rope-scaling-factor: more turns in that length keep their frequency"
    )
    yarn_rotary_scaling_factor: float | None = flag(
        None, "YaRN: slow frequencies become slower by this factor, scores sharper (default: no)"
    )
    yarn_original_max_position_embeddings: int | None = flag(
        None, "YaRN: tokens in a sequence before the scaling"
    )
    yarn_beta_fast: float = flag(
        32.0, "YaRN: what makes more turns in the original length keeps its frequency"
    )
    yarn_beta_slow: float = flag(
        1.0, "YaRN: what makes fewer turns in the original length is slower by the whole factor"
    )
    yarn_attention_factor: float | None = flag(
        None, "YaRN: factor of cosines and sines (default: 0.1 ln(factor) + 1)"
    )
    yarn_mscale: float | None = flag(
        None, "YaRN: weight of the logarithm in the attention factor, with --yarn-mscale-all-dim"
    )
    yarn_mscale_all_dim: float | None = flag(
        None, "YaRN: weight of the logarithm in what the attention factor is divided by"
    )
    yarn_correction_range_round_to_int: bool = flag(
        True, "YaRN: the ramp from fast to slow frequencies begins and ends at whole pairs"
    )
    untie_embeddings_and_output_weights: bool = flag(
        False, "separate weights for the embedding and the output layer"
    )
    init_method_std: float = flag(
        0.02,
        "standard deviation of the initial weights (over sqrt(2 x layers) where they write to the"
        " residual stream); with --sub-layer-norm of the embedding alone",
    )
    make_vocab_size_divisible_by: int = flag(128, "pad the vocabulary to a multiple of this")
    padded_vocab_size: int | None = flag(
        None, "rows of an imported model's vocabulary (default: the tokenizer's ids, padded)"
    )
    transformer_impl: str = flag(
        "local",
        "layer modules; auto: Transformer Engine's where it is installed and there is a GPU",
        choices=("local", "transformer_engine", "auto"),
    )

    def resolve(self) -> ModelConfig:
        """Derive the sizes that are open from the others. Raises UserError where one cannot be."""
        require_positive(self, "num_layers", "hidden_size", "num_attention_heads", "seq_length")
        ffn_hidden_size, kv_channels = self.ffn_hidden_size, self.kv_channels
        if ffn_hidden_size is None:
            # A gated MLP has three matrices instead of two: 8/3 of the width keeps the parameters.
            third = math.ceil(8 * self.hidden_size / 3 / 64) * 64
            ffn_hidden_size = third if self.swiglu else 4 * self.hidden_size
        if kv_channels is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"--hidden-size {self.hidden_size} does not divide by --num-attention-heads"
                    f" {self.num_attention_heads}: change one of them, or set --kv-channels"
                )
            kv_channels = self.hidden_size // self.num_attention_heads
        return dataclasses.replace(
            self,
            ffn_hidden_size=ffn_hidden_size,
            kv_channels=kv_channels,
            num_query_groups=default(self.num_query_groups, self.num_attention_heads),
        )

    @property
    def has_rotary_positions(self) -> bool:
        """Whether queries and keys are turned by their positions."""
        return self.position_embedding_type in ("rope", "xpos")

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The rotary positions as Transformers writes them (after `resolve`)."""
        base = self.rotary_base
        if self.rotary_ntk_factor is not None:
            # The slowest pair becomes slower by the factor, the fastest stays: as of another base.
            base *= self.rotary_ntk_factor ** (self.kv_channels / (self.kv_channels - 2))
        if self.rotary_seq_len_interpolation_factor is not None:
            scaling = {"rope_type": "linear", "factor": self.rotary_seq_len_interpolation_factor}
        elif self.rope_scaling_factor is not None:
            scaling = {
                "rope_type": "llama3",
                "factor": self.rope_scaling_factor,
                "low_freq_factor": self.rope_low_freq_factor,
                "high_freq_factor": self.rope_high_freq_factor,
                "original_max_position_embeddings": self.rope_original_length,
            }
        elif _has_yarn(self):
            scaling = {
                "rope_type": "yarn",
                "factor": self.yarn_rotary_scaling_factor,
                "original_max_position_embeddings": self.yarn_original_max_position_embeddings,
                "beta_fast": self.yarn_beta_fast,
                "beta_slow": self.yarn_beta_slow,
                "attention_factor": self.yarn_attention_factor,
                "mscale": self.yarn_mscale,
                "mscale_all_dim": self.yarn_mscale_all_dim,
                "truncate": self.yarn_correction_range_round_to_int,
            }
            scaling = {name: value for name, value in scaling.items() if value is not None}
        else:
            scaling = {"rope_type": "default"}
        return {"rope_theta": base, **scaling}

    def vocabulary_rows(self, ids: int) -> int:
        """Return the rows of the embedding for so many ids of a tokenizer. Raises UserError where
        they are too few."""
        if self.padded_vocab_size is None:
            multiple = self.make_vocab_size_divisible_by
            return math.ceil(ids / multiple) * multiple
        if self.padded_vocab_size < ids:
            raise UserError(
                f"--padded-vocab-size {self.padded_vocab_size} is less than the {ids} ids of the"
                " tokenizer: leave it out, or choose the model's own tokenizer"
            )
        return self.padded_vocab_size

    def check(self) -> None:
        """Raise UserError where these sizes make no model (after `resolve`)."""
        assert self.num_query_groups is not None and self.kv_channels is not None
        require_positive(
            self, "ffn_hidden_size", "kv_channels", "num_query_groups",
            "make_vocab_size_divisible_by", "xpos_scale_base",
        )  # fmt: skip
        require_more_than_zero(self, "norm_epsilon", "init_method_std")
        _check_scaling(self)
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"--num-attention-heads {self.num_attention_heads} does not divide by"
                f" --num-query-groups {self.num_query_groups}: change one of them"
            )
        if self.has_rotary_positions and self.kv_channels % 2:
            raise UserError(
                f"rotary positions turn pairs of channels, and the head dimension is"
                f" {self.kv_channels}: set an even --kv-channels, or --position-embedding-type none"
            )

    def check_positions(
        self, precision: str, causal: bool, other: str = "--position-embedding-type rope"
    ) -> None:
        """Raise UserError where the scales of xPos leave the numbers of such a training too little
        room, or scores would grow with the distance (after `check`). other: what to set for a model
        without xPos."""
        if self.position_embedding_type != "xpos":
            return
        if not causal:
            raise UserError(
                "--position-embedding-type xpos is for causal attention, as scores decay backwards"
                " only: with --objective mlm set --position-embedding-type rope"
            )
        longest = math.floor(longest_xpos(precision, self.xpos_scale_base))
        if self.seq_length > longest:
            base = math.ceil(self.seq_length / longest_xpos(precision, 1.0))
            raise UserError(
                f"--seq-length {self.seq_length} is beyond what xPos can scale in {precision}, of"
                f" whose exponents it would take more than half: set --seq-length {longest}, or"
                f" --xpos-scale-base {base}, or {other}"
            )


# The factor that turns each scaling on: at most one of these.
FACTORS = (
    "rotary_ntk_factor",
    "rotary_seq_len_interpolation_factor",
    "rope_scaling_factor",
    "yarn_rotary_scaling_factor",
)
# What Llama 3.1's scaling has besides, and YaRN.
LLAMA3 = ("rope_original_length", "rope_low_freq_factor", "rope_high_freq_factor")
YARN = (
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_attention_factor",
    "yarn_mscale",
    "yarn_mscale_all_dim",
    "yarn_correction_range_round_to_int",
)
# All fields of rotary positions: none is about the shape of a weight.
ROPE_FIELDS = ("rotary_base", *FACTORS, *LLAMA3, *YARN)


def fields_of_scaling(factor: str) -> tuple[str, ...]:
    """Return the factor of a scaling, one of `FACTORS`, and what has an effect with it alone."""
    others = {"rope_scaling_factor": LLAMA3, "yarn_rotary_scaling_factor": YARN}
    return factor, *others.get(factor, ())


def _is_on(model: ModelConfig, factor: str) -> bool:
    """Whether it is set, to another value than 1, which stretches nothing."""
    if factor == "yarn_rotary_scaling_factor" and model.yarn_attention_factor is not None:
        return getattr(model, factor) is not None  # it changes the scores besides
    return getattr(model, factor) not in (None, 1)


def _has_yarn(model: ModelConfig) -> bool:
    """Whether there is all of it, if with a factor of 1, or there should be."""
    given = model.yarn_rotary_scaling_factor is not None
    whole = given and model.yarn_original_max_position_embeddings is not None
    return whole or _is_on(model, "yarn_rotary_scaling_factor")


def lost_fields(ours: ModelConfig, theirs: ModelConfig, given: Collection[str]) -> list[str]:
    """Return the fields of rotary positions that have their default here, another value there, and
    are missing: not those of a scaling that is turned off here, or has another in its place.

    given: names of fields that were set here, to whatever value, which are not missing.
    """
    scaled = any(_is_on(ours, factor) for factor in FACTORS)
    free = {
        name
        for factor in FACTORS
        if not _is_on(theirs, factor)
        or (not _is_on(ours, factor) and (scaled or factor in given or getattr(ours, factor)))
        for name in fields_of_scaling(factor)
    }
    return [
        name
        for name in changed_fields(theirs, *ROPE_FIELDS)
        if name not in {*free, *given, *changed_fields(ours, name)}
    ]


def scaling_oddities(model: ModelConfig) -> list[str]:
    """Say where a scaling fits the sequence badly, a line each; model: resolved."""
    if not model.has_rotary_positions:
        return []
    lengths = {
        "rope_scaling_factor": "rope_original_length",
        "yarn_rotary_scaling_factor": "yarn_original_max_position_embeddings",
    }
    lines = []
    for factor, original in lengths.items():
        if not _is_on(model, factor):
            continue
        times, length = getattr(model, factor), getattr(model, original)
        set_to = f"{flag_name(factor)} {times:g} with {flag_name(original)} {length}"
        if length >= model.seq_length:
            lines.append(f"{set_to}: --seq-length {model.seq_length} is not beyond that length")
        elif times * length < model.seq_length:
            lines.append(
                f"{set_to}: --seq-length {model.seq_length} is beyond"
                f" {times * length:g}, as far as that stretches the positions"
            )
    return lines


def _check_scaling(model: ModelConfig) -> None:
    require_positive(model, "rope_original_length")
    require_more_than_zero(model, "rotary_base")
    given = [name for name in FACTORS if getattr(model, name) is not None]
    for name in given:
        value = getattr(model, name)
        if model.position_embedding_type != "rope":
            raise UserError(
                f"{flag_name(name)} {value} is about rotary positions: set"
                " --position-embedding-type rope, or leave it out"
            )
        if not 1 <= value < math.inf:
            raise UserError(f"{flag_name(name)} {value} must be at least 1")
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(map(flag_name, given))} are different scalings of the rotary positions:"
            " set one of them, in the file of --config, too"
        )
    if model.rotary_ntk_factor is not None and model.kv_channels == 2:
        raise UserError(
            "--rotary-ntk-factor slows all pairs of channels but the first, the only one here: set"
            " --kv-channels 4 or more, or --rotary-seq-len-interpolation-factor"
        )
    if model.rope_scaling_factor is None:
        refuse_without("Llama 3.1's scaling", "--rope-scaling-factor too", model, *LLAMA3)
    _check_turns(model, "rope_low_freq_factor", "rope_high_freq_factor")
    if model.yarn_rotary_scaling_factor is None:
        refuse_without("YaRN", "--yarn-rotary-scaling-factor too", model, *YARN)
    elif _has_yarn(model):
        _check_yarn(model)


def _check_turns(model: ModelConfig, slow: str, fast: str) -> None:
    require_more_than_zero(model, slow, fast)
    if getattr(model, fast) <= getattr(model, slow):
        raise UserError(
            f"{flag_name(fast)} {getattr(model, fast)} must be more than {flag_name(slow)}"
            f" {getattr(model, slow)}"
        )


def _check_yarn(model: ModelConfig) -> None:
    if model.yarn_original_max_position_embeddings is None:
        raise UserError(
            f"--yarn-rotary-scaling-factor {model.yarn_rotary_scaling_factor} scales the length of"
            " an earlier training: set --yarn-original-max-position-embeddings to that"
        )
    require_positive(model, "yarn_original_max_position_embeddings")
    require_more_than_zero(model, "yarn_attention_factor", "yarn_mscale", "yarn_mscale_all_dim")
    _check_turns(model, "yarn_beta_slow", "yarn_beta_fast")
    if model.rotary_base <= 1:
        raise UserError(f"--rotary-base {model.rotary_base} must be more than 1 with YaRN")
    if (model.yarn_mscale is None) != (model.yarn_mscale_all_dim is None):
        raise UserError(
            "--yarn-mscale and --yarn-mscale-all-dim make a ratio: set both, or neither"
        )
    if model.yarn_mscale is not None and model.yarn_attention_factor is not None:
        raise UserError(
            "--yarn-attention-factor stands for --yarn-mscale and --yarn-mscale-all-dim: set one"
        )


# xPos (arXiv 2212.10554): pair j of the d / 2 of a head decays by ((2 j / d + G) / (1 + G)) in
# --xpos-scale-base positions.
XPOS_GAMMA = 0.4
# The exponent of the smallest number that a format has in full precision; the largest is about as
# far from 1.
SMALLEST_EXPONENT = {"fp32": -126, "bf16": -126, "fp16": -14}


def longest_xpos(precision: str, scale_base: float) -> float:
    """Return the longest sequence that xPos can scale, in proportion to its base.

    Positions count from the middle of the sequence, so that queries and keys at its ends are
    scaled by (1 + 1 / G) ^ +-(length / 2 / scale_base), in the pair that decays fastest. That may
    take half of the format's exponents. The other half is for the values themselves and for their
    gradients: in bf16 and fp32 those down to 2^-63, 1e-19, keep their precision. The scores that
    queries see are of common sizes. Those that a causal mask hides grow with the distance, at the
    limit by 2^126 in bf16 and fp32, and may overflow in float32: a mask has to put another number
    in their place, as those of megalong.attention do, and not to add one to them.
    """
    bits = -SMALLEST_EXPONENT[precision] / 2
    return 2 * scale_base * bits / math.log2(1 + 1 / XPOS_GAMMA)
