"""Rotary positions beyond the length of the first training: which scaling there is, and its check.

The fields are ModelConfig's; `megalong.model.rope_scaling` computes what they say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from megalong.config.flags import flag_name, require_more_than_zero, require_positive
from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from megalong.config.model import ModelConfig

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
    """The factor of a scaling, one of `FACTORS`, and what has an effect together with it alone."""
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
    """The fields of rotary positions that are the default's here, have another value there, and are
    missing: what is given is not, and neither is what is of a scaling where that is turned off, or
    another is set in its place. given: names of fields that were set here, to whatever value."""
    default = {field.name: field.default for field in dataclasses.fields(ours)}
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
        for name in ROPE_FIELDS
        if name not in {*free, *given}
        and getattr(ours, name) == default[name] != getattr(theirs, name)
    ]


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """The rotary positions as Transformers writes them, `rope_parameters`; model: resolved."""
    base = model.rotary_base
    if model.rotary_ntk_factor is not None:
        # The slowest pair becomes slower by the factor, the fastest stays: another base does that.
        base *= model.rotary_ntk_factor ** (model.kv_channels / (model.kv_channels - 2))
    if model.rotary_seq_len_interpolation_factor is not None:
        scaling = {"rope_type": "linear", "factor": model.rotary_seq_len_interpolation_factor}
    elif model.rope_scaling_factor is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_length,
        }
    elif _has_yarn(model):
        scaling = {
            "rope_type": "yarn",
            "factor": model.yarn_rotary_scaling_factor,
            "original_max_position_embeddings": model.yarn_original_max_position_embeddings,
            "beta_fast": model.yarn_beta_fast,
            "beta_slow": model.yarn_beta_slow,
            "attention_factor": model.yarn_attention_factor,
            "mscale": model.yarn_mscale,
            "mscale_all_dim": model.yarn_mscale_all_dim,
            "truncate": model.yarn_correction_range_round_to_int,
        }
        scaling = {name: value for name, value in scaling.items() if value is not None}
    else:
        scaling = {"rope_type": "default"}
    return {"rope_theta": base, **scaling}


def scaling_oddities(model: ModelConfig) -> list[str]:
    """What is told of a scaling that fits the sequence badly, a line each; model: resolved."""
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


def check_rope(model: ModelConfig) -> None:
    """Raise UserError where the rotary positions are none that there are; model: resolved."""
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
            " set one of them (what is not among the flags stands in the file of --config: take it"
            " out there)"
        )
    if model.rotary_ntk_factor is not None and model.kv_channels == 2:
        raise UserError(
            "--rotary-ntk-factor slows the pairs of channels but the first, and a head of 2"
            " channels has no others: set a larger --kv-channels, or"
            " --rotary-seq-len-interpolation-factor"
        )
    if model.rope_scaling_factor is None:
        _check_none_of(LLAMA3, model, "rope_scaling_factor", "Llama 3.1's scaling")
    _check_turns(model, "rope_low_freq_factor", "rope_high_freq_factor")
    if model.yarn_rotary_scaling_factor is None:
        _check_none_of(YARN, model, "yarn_rotary_scaling_factor", "YaRN")
    elif _has_yarn(model):
        _check_yarn(model)


def _check_none_of(fields: Collection[str], model: ModelConfig, factor: str, scaling: str) -> None:
    for name in fields:
        if getattr(model, name) != getattr(type(model), name):
            raise UserError(
                f"{flag_name(name)} is about {scaling}, which {flag_name(factor)} turns on: set"
                " that too, or leave it out"
            )


def _check_turns(model: ModelConfig, slow: str, fast: str) -> None:
    require_more_than_zero(model, slow, fast)
    if getattr(model, fast) <= getattr(model, slow):
        raise UserError(
            f"{flag_name(fast)} {getattr(model, fast)} must be more than {flag_name(slow)}"
            f" {getattr(model, slow)}: turns in the original length above which a pair of channels"
            " stays, and below which it is slowed down"
        )


def _check_yarn(model: ModelConfig) -> None:
    if model.yarn_original_max_position_embeddings is None:
        raise UserError(
            f"--yarn-rotary-scaling-factor {model.yarn_rotary_scaling_factor} scales positions from"
            " the length of an earlier training: set --yarn-original-max-position-embeddings to"
            " that"
        )
    require_positive(model, "yarn_original_max_position_embeddings")
    for name in ("yarn_attention_factor", "yarn_mscale", "yarn_mscale_all_dim"):
        if getattr(model, name) is not None:
            require_more_than_zero(model, name)
    _check_turns(model, "yarn_beta_slow", "yarn_beta_fast")
    if model.rotary_base <= 1:
        raise UserError(f"--rotary-base {model.rotary_base} must be more than 1 with YaRN")
    if (model.yarn_mscale is None) != (model.yarn_mscale_all_dim is None):
        raise UserError(
            "--yarn-mscale and --yarn-mscale-all-dim are two halves of a ratio: set both, or"
            " neither"
        )
    if model.yarn_mscale is not None and model.yarn_attention_factor is not None:
        raise UserError(
            "--yarn-attention-factor says what --yarn-mscale and --yarn-mscale-all-dim would: set"
            " it, or these two"
        )
