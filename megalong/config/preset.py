"""Presets: models with what trains them, each a YAML file in presets/ that can be read and copied.

A preset has the keys of `--config FILE.yaml`, stands below it and the flags, and is a model: what
its weights are made for can not be set otherwise beside it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megalong.config.flags import flag_name, shown
from megalong.config.model import ModelConfig
from megalong.config.rope import ROPE_FIELDS
from megalong.config.training import TrainingConfig
from megalong.utils.errors import UserError

FOLDER = Path(__file__).parent / "presets"

# Of the model's settings, those that a run may choose: lengths, positions beyond those of the
# training, the tokenizer's vocabulary, initial weights, modules.
_FREE = {
    "seq_length",
    "xpos_scale_base",
    *ROPE_FIELDS,
    "init_method_std",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
    "transformer_impl",
}
ARCHITECTURE = tuple(
    field.name for field in dataclasses.fields(ModelConfig) if field.name not in _FREE
)

_WITH_ROPE = "a preset with RoPE, longnet-llama-125m say"

# One setting in two lists.
_BRANCHES = ("segment_lengths", "dilation_rates")


def preset_names() -> list[str]:
    """Those that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """The YAML file of a preset."""
    return FOLDER / f"{name}.yaml"


def over_preset(name: str, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a preset, and over them those that are given beside it.

    Both: values by field name. A sequence longer than the branches of the preset has the default
    ones: in the preset's no token would see one of another segment. Raises UserError where what is
    given makes another model, or is one half of the branches.
    """
    if given.get("objective") == "mlm" and preset["position_embedding_type"] == "xpos":
        raise UserError(
            f"--preset {name} has xPos, which is for causal attention: with --objective mlm take"
            f" {_WITH_ROPE}, or {_copy(name, 'set position_embedding_type: rope')}"
        )
    for field in ARCHITECTURE:
        if field in given and given[field] != preset[field]:
            raise UserError(
                f"{flag_name(field)} is {shown(given[field])}, and of --preset {name}"
                f" {shown(preset[field])}: leave it out, or {_copy(name, 'change it')}"
            )
    halves = [field for field in _BRANCHES if field in given]
    if len(halves) == 1:
        other = next(field for field in _BRANCHES if field not in given)
        raise UserError(
            f"{flag_name(halves[0])} is given without {flag_name(other)}, and the branches of"
            f" --preset {name} are pairs, {_shown_branches(preset)}: give both, or neither"
        )
    values = preset | given
    if preset["position_embedding_type"] == "xpos":
        scaled = ("position_embedding_type", "seq_length", "xpos_scale_base")
        model = ModelConfig(**{field: values[field] for field in scaled})
        precision = values.get("precision", TrainingConfig.precision)
        model.check_positions(precision, True, f"take {_WITH_ROPE}")
    if given.get("seq_length", 0) > max(preset["segment_lengths"]):
        preset = {field: value for field, value in preset.items() if field not in _BRANCHES}
    return preset | given


def _copy(name: str, change: str) -> str:
    """What to do for a model that is nearly a preset's."""
    return (
        f"copy {preset_file(name)}, {change} there, and give the copy with --config in the place of"
        " --preset"
    )


def _shown_branches(preset: dict[str, Any]) -> str:
    pairs = zip(*(preset[field] for field in _BRANCHES), strict=True)
    return " ".join(f"{length}/{rate}" for length, rate in pairs)
