"""Files of settings: YAML whose lines errors can name, and the presets among them.

A preset is a YAML file in presets/ that can be read and copied. It has the keys of `--config
FILE.yaml`, stands below it and the flags, and is a model: what its weights are made for can not be
set otherwise beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalong.config.flags import flag_name, shown
from megalong.config.model import ROPE_FIELDS, ModelConfig
from megalong.config.training import TrainingConfig
from megalong.utils.errors import UserError
from megalong.utils.files import read_yaml

FOLDER = Path(__file__).parent / "presets"

# Of the model's settings, those that a run may choose beside a preset: lengths, positions beyond
# those of the training, the tokenizer's vocabulary, initial weights, modules.
_FREE = {
    "seq_length", "xpos_scale_base", *ROPE_FIELDS, "init_method_std",
    "make_vocab_size_divisible_by", "padded_vocab_size", "transformer_impl",
}  # fmt: skip
ARCHITECTURE = tuple(
    field.name for field in dataclasses.fields(ModelConfig) if field.name not in _FREE
)
_WITH_ROPE = "a preset with RoPE, longnet-llama-125m say"
_BRANCHES = ("segment_lengths", "dilation_rates")  # one setting in two lists


@dataclass(frozen=True)
class YamlFile:
    """The content of `--config FILE.yaml`, {} where it is empty."""

    path: str
    text: str
    content: dict[Any, Any]

    @staticmethod
    def read(path: str) -> YamlFile:
        """Read a file. Raises UserError naming it, and the line where one is no YAML."""
        text, content = read_yaml(f"--config {path}", path)
        if not isinstance(content, dict | None):
            raise UserError(f"--config {path}: expected `name: value` lines, found {content!r}")
        return YamlFile(path, text, content or {})

    def check_keys(self, of: Callable[[tuple[Hashable, ...]], str]) -> None:
        """Raise UserError where a mapping has a key twice, of which YAML takes the last.

        of: what the error is to say of the place of the mapping, before the key.
        """
        nodes: list[tuple[yaml.Node, tuple[Hashable, ...]]]
        nodes = [(yaml.compose(self.text, yaml.SafeLoader), ())]
        while nodes:
            node, place = nodes.pop()
            if isinstance(node, yaml.MappingNode):
                seen: set[str] = set()
                for key, value in node.value:
                    if key.value in seen:
                        where = f"--config {self.path}, line {key.start_mark.line + 1}"
                        raise UserError(f"{where}: {of(place)}{key.value}: given twice")
                    seen.add(key.value)
                    nodes.append((value, (*place, key.value)))
            elif isinstance(node, yaml.SequenceNode):
                nodes += [(item, (*place, number)) for number, item in enumerate(node.value)]

    def error(self, words: str, *place: Hashable) -> UserError:
        """Make the error on what stands in a place."""
        return UserError(f"{self.where(*place)}: {words}")

    def where(self, *place: Hashable) -> str:
        """Return "--config FILE, line 12" of a place, the keys and list indices that lead to it; of
        one that stands in no line (it was merged in by `<<`), of the innermost around it."""
        node, line = yaml.compose(self.text, yaml.SafeLoader), ""
        for step in place:
            inside = {}
            if isinstance(node, yaml.MappingNode):
                inside = {key.value: (key, value) for key, value in node.value}
            elif isinstance(node, yaml.SequenceNode):
                inside = {str(index): (item, item) for index, item in enumerate(node.value)}
            if str(step) not in inside:
                break
            key, node = inside[str(step)]
            line = f", line {key.start_mark.line + 1}"
        return f"--config {self.path}{line}"


def preset_names() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """Return the YAML file of a preset."""
    return FOLDER / f"{name}.yaml"


def over_preset(name: str, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Put the settings that are given over those of a preset, both by field name.

    A sequence longer than the branches of the preset has the default ones: in the preset's no token
    would see one of another segment. Raises UserError where what is given makes another model, or
    is one half of the branches.
    """
    copy = f"copy {preset_file(name)}, {{}} there, and give the copy with --config in the place of"
    copy += " --preset"
    has_xpos = preset["position_embedding_type"] == "xpos"
    if given.get("objective") == "mlm" and has_xpos:
        raise UserError(
            f"--preset {name} has xPos, which is for causal attention: with --objective mlm take"
            f" {_WITH_ROPE}, or {copy.format('set position_embedding_type: rope')}"
        )
    for field in ARCHITECTURE:
        if field in given and given[field] != preset[field]:
            raise UserError(
                f"{flag_name(field)} is {shown(given[field])}, and of --preset {name}"
                f" {shown(preset[field])}: leave it out, or {copy.format('change it')}"
            )
    if len(there := [field for field in _BRANCHES if field in given]) == 1:
        [missing] = {*_BRANCHES} - {*there}
        pairs = zip(*(preset[field] for field in _BRANCHES), strict=True)
        raise UserError(
            f"{flag_name(there[0])} is given without {flag_name(missing)}, and the branches of"
            f" --preset {name} are pairs, {' '.join(f'{length}/{rate}' for length, rate in pairs)}:"
            " give both, or neither"
        )
    values = preset | given
    if has_xpos:
        scaled = ("position_embedding_type", "seq_length", "xpos_scale_base")
        model = ModelConfig(**{field: values[field] for field in scaled})
        precision = values.get("precision", TrainingConfig.precision)
        model.check_positions(precision, True, f"take {_WITH_ROPE}")
    if given.get("seq_length", 0) > max(preset["segment_lengths"]):
        preset = {field: value for field, value in preset.items() if field not in _BRANCHES}
    return preset | given
