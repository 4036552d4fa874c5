"""The rotary positions of a config.json of Transformers as fields of megalong's configuration."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from megalong.config.flags import flag_name
from megalong.utils.errors import UserError

# What a scaling has in Transformers' file, besides what all have.
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
# Those whose frequencies change with what is read, so that no training has just them.
_CHANGING = {
    "dynamic": "the base grows with the length that is read. Up to its max_position_embeddings it"
    " is the same model without that: take it out of the file, or set --rotary-ntk-factor for"
    " training beyond them",
    "longrope": "there are other frequencies for inputs up to the original length than beyond it."
    " Without the scaling (take it out of the file, or set another) it is another model",
}
# The flag of each kind.
_FACTORS = {
    "linear": "rotary_seq_len_interpolation_factor",
    "llama3": "rope_scaling_factor",
    "yarn": "yarn_rotary_scaling_factor",
}
# What published files have besides, and changes no frequency.
_NOTES = {"finetuned"}


def rotary_values(
    config: dict[str, Any], where: str, instead: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of megalong's configuration, by name, for the rotary positions of a config.json.

    Transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling; either is
    read as Transformers 5 does. where: the file, for errors. instead: factors of scalings, of
    `megalong.config.model.FACTORS`, that take the place of the file's: of one of another kind the
    base alone is read. Raises UserError for positions that megalong has not, and where the factor
    is missing.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check_channels(rope, config, where)
    if _FACTORS.get(kind) in instead:  # which is taken, whatever the file has
        rope.setdefault("factor", 1.0)
    replaced = instead and kind != "default" and _FACTORS.get(kind) not in instead
    if replaced:
        kind = "default"
    else:
        _check_kind(kind, rope, where)
    base = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    values = {"rotary_base": _number(base, "rope_theta", where)}
    if kind == "linear":
        factor = _number(rope["factor"], "factor", where, least=1.0)
        values["rotary_seq_len_interpolation_factor"] = factor
    if kind == "llama3":
        values["rope_scaling_factor"] = _number(rope["factor"], "factor", where, least=1.0)
        values["rope_original_length"] = _original_length(rope, config, where)
        low, high = _turns(
            ("low_freq_factor", rope.get("low_freq_factor", 1)),
            ("high_freq_factor", rope.get("high_freq_factor", 4)),
            where,
        )
        values |= {"rope_low_freq_factor": low, "rope_high_freq_factor": high}
    if kind == "yarn":
        values |= _yarn(rope, config, where)
    return values


def _number(value: Any, name: str, where: str, least: float = 0.0) -> float:
    """A number of the file. Raises UserError where it is none, not positive or below the least."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf and value >= least):
        raise UserError(
            f"{where}: {name} is {value!r}, and has to be a number"
            f" {f'of at least {least:g}' if least else 'above 0'}"
        )
    return float(value)


def _check_channels(rope: dict[str, Any], config: dict[str, Any], where: str) -> None:
    layers = [name for name, value in rope.items() if isinstance(value, dict)]
    if layers:
        raise UserError(
            f"{where}: rotary positions are others in layers of the kinds {', '.join(layers)}, and"
            " megalong has the same in all layers"
        )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor is {partial}; megalong's positions turn all channels"
        )


def _check_kind(kind: Any, rope: dict[str, Any], where: str) -> None:
    if kind not in _KEYS:
        why = _CHANGING.get(
            kind,
            "megalong has those of plain RoPE, linear, llama3 and yarn. Without the scaling (take"
            " it out of the file) it is another model, good up to its original length",
        )
        raise UserError(f"{where}: rotary positions are scaled in the way {kind!r}: {why}")
    if "factor" in _KEYS[kind] and "factor" not in rope:
        raise UserError(
            f"{where}: rotary positions of the kind {kind} have no factor: write it there, or set"
            f" {flag_name(_FACTORS[kind])}"
        )
    given = {name for name, value in rope.items() if value is not None}
    unknown = given - _COMMON - _NOTES - _KEYS[kind]
    if unknown:
        raise UserError(
            f"{where}: rotary positions of the kind {kind} have {', '.join(sorted(unknown))}, which"
            " megalong does not know: take out of the file what is not about frequencies"
        )


def _original_length(rope: dict[str, Any], config: dict[str, Any], where: str) -> int:
    """The length before the scaling, where Transformers looks for it."""
    name = "original_max_position_embeddings"
    length = config.get(name) or rope.get(name) or config["max_position_embeddings"]
    return int(_number(length, name, where, least=1.0))


def _turns(slow: tuple[str, Any], fast: tuple[str, Any], where: str) -> tuple[float, float]:
    """Turns in the original length below and above which pairs of channels are slow and fast. slow,
    fast: their names in the file, and what stands there."""
    values = [_number(value, name, where) for name, value in (slow, fast)]
    if values[1] <= values[0]:
        raise UserError(
            f"{where}: {fast[0]} is {values[1]:g}, and has to be more than {slow[0]}, {values[0]:g}"
        )
    return values[0], values[1]


def _yarn(rope: dict[str, Any], config: dict[str, Any], where: str) -> dict[str, Any]:
    original, factor = _original_length(rope, config, where), rope["factor"]
    if factor is None:  # as Transformers
        factor = config["max_position_embeddings"] / original
    slow, fast = _turns(
        ("beta_slow", rope.get("beta_slow") or 1), ("beta_fast", rope.get("beta_fast") or 32), where
    )
    values = {
        "yarn_rotary_scaling_factor": _number(factor, "factor", where, least=1.0),
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": fast,
        "yarn_beta_slow": slow,
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }
    mscales = {name: rope.get(name) for name in ("mscale", "mscale_all_dim")}
    if rope.get("attention_factor") is not None:
        own = _number(rope["attention_factor"], "attention_factor", where)
        values["yarn_attention_factor"] = own
    elif all(mscales.values()):  # one alone has no effect
        values |= {f"yarn_{name}": _number(x, name, where) for name, x in mscales.items()}
    return values
