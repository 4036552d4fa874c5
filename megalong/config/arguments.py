"""The command line and the YAML file, both derived from the dataclasses of `megalong.config`.

The YAML file has the same names as the flags, with or without their sections:

    model:
      num_layers: 12
    lr: 6.0e-4

A flag given on the command line wins over the file, the file over `--preset`, that over the
default.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

from megalong.config import Config, flag_name
from megalong.config.files import YamlFile, over_preset, preset_file, preset_names
from megalong.config.flags import shown, whole_number
from megalong.utils.command_line import ArgumentParser
from megalong.utils.errors import UserError, did_you_mean

# Where one start of a run begins.
ONE_START = ("load", "finetune", "pretrained_checkpoint", "load_optim", "load_rng", "new_data")

# Megatron's flags that we have not, and what to do instead.
INSTEAD = MappingProxyType(
    {
        "--reset-attention-mask": "set --document-attention isolated, which keeps documents apart"
        " without a mask",
        "--reset-position-ids": "leave it out: positions count as distances here, and between"
        " tokens of one document these stay the same; --document-attention isolated keeps the"
        " others apart",
        "--use-rope-scaling": "leave it out: --rope-scaling-factor alone turns that scaling on"
        " (Megatron's factor is 8)",
        "--rotary-scaling-factor": "set --yarn-rotary-scaling-factor for YaRN, or"
        " --rope-scaling-factor for the scaling of Llama 3.1",
        "--muon-no-split-qkv": "set --no-muon-split-qkv",
        "--muon-use-nesterov": "leave it out: it is on, and --no-muon-nesterov turns it off",
        "--muon-tp-mode": "leave it out: a matrix that ranks have slices of is orthogonalized whole"
        " by each of them (Megatron's duplicated)",
    }
)


def parse_arguments(arguments: list[str], description: str | None = None) -> Config:
    """Return the configuration that a command line describes, not yet resolved.

    Raises UserError for an unknown flag, an unreadable file, an unknown key, a value of the wrong
    type, or one that contradicts a preset.
    """
    parser = build_parser(description)
    return config_from_values(given_values(vars(parser.parse_args(arguments))))


def given_values(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a command line gives, by field name, with those of its file and its
    preset.

    given: what `build_parser`'s parser found; other flags than the configuration's are left out.
    Raises UserError as `parse_arguments` does.
    """
    values = read_yaml(given["config"]) if "config" in given else {}
    values.update({name: given[name] for name in _settings() if name in given})
    return with_preset(given.get("preset"), values)


def with_preset(preset: str | None, values: dict[str, Any]) -> dict[str, Any]:
    """Put these settings over those of the preset of this name, if any. Raises UserError where they
    contradict it."""
    if preset is None:
        return values
    return over_preset(preset, read_yaml(str(preset_file(preset))), values)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Make the parser: one group of flags per section; a flag that is not given leaves no trace."""
    parser = ArgumentParser(
        description, INSTEAD, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="settings by flag name; flags given beside it win"
    )
    presets = preset_names()
    parser.add_argument(
        "--preset",
        type=_reader(functools.partial(_one_of, presets)),
        metavar="NAME",
        help=f"a model, and what trains it; other settings win over its own: {', '.join(presets)}",
    )
    # The deepspeed launcher adds this one; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    groups = {
        section: parser.add_argument_group(section, section_type.__doc__)
        for section, section_type in _sections().items()
    }
    for setting in _settings().values():
        _add_flag(groups[setting.section], setting)
    return parser


def _add_flag(group: Any, setting: _Setting) -> None:
    options: dict[str, Any] = {"dest": setting.name, "help": setting.help.replace("%", "%%")}
    kind = setting.item or setting.kind
    options["type"] = whole_number if kind is int else kind
    if setting.item is not None:
        options |= {"nargs": "+", "metavar": kind.__name__.upper()}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
        del options["type"]
    elif setting.is_json:
        options |= {"type": _json_or_word, "metavar": "RULE"}
    elif setting.choices is not None and kind is str:
        options["type"] = _reader(setting.known)
        options["metavar"] = f"{{{','.join(setting.choices)}}}"
        if setting.item is not None:
            options["metavar"] = "KIND"
            options["help"] += f": {', '.join(setting.choices)}"
    else:
        options["choices"] = setting.choices
    group.add_argument(flag_name(setting.name), **options)


def _reader(check: Callable[[str], str]) -> Callable[[str], str]:
    """Make the `type` of a flag of what checks its words with UserErrors."""

    def read(word: str) -> str:
        try:
            return check(word)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _json_or_word(text: str) -> Any:
    if not text.lstrip().startswith("["):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not a JSON table: {error}") from error


def read_yaml(path: str) -> dict[str, Any]:
    """Return the settings of a YAML file as one flat dict by field name.

    Raises UserError naming the file, and the key and its line where one is unknown or out of place.
    """
    file = YamlFile.read(path)
    if "stages" in file.content:
        words = "stages: a run of several is for pretrain_longnet.py and tools/plan_run.py"
        raise file.error(f"{words}: give the settings of one of them", "stages")
    # `stages` is no setting, and yet what a misspelt key may have meant.
    found = settings_in(file, others={"stages": None})
    return {name: value.value for name, value in found.items()}


@dataclass(frozen=True)
class FileValue:
    """The value of a setting, and where it stands in its file (`YamlFile.where`)."""

    value: Any
    place: tuple[Any, ...]


def settings_in(
    file: YamlFile,
    content: dict[Any, Any] | None = None,
    place: tuple[Any, ...] = (),
    others: Mapping[str, str | None] = MappingProxyType({}),
    of: str = "",
) -> dict[str, FileValue]:
    """Return the settings in a part of a YAML file, by field name, in sections or not.

    content: of the part; by default all of it. place: where that stands. others: further names that
    there may be, whose values are not checked here, and the section that each may stand in. of:
    what an error begins with. Raises UserError as `read_yaml` does.
    """
    sections = _sections()
    values: dict[str, FileValue] = {}

    def take(key: Any, value: Any, section: str | None) -> None:
        here = (*place, key) if section is None else (*place, section, key)
        name = str(key).replace("-", "_")
        try:
            if name in values:
                raise UserError("given twice")
            if name not in others or section not in (None, others[name]):
                value = _setting_of(name, section, others).checked(value)
            values[name] = FileValue(value, here)
        except UserError as error:
            words = f"{section}.{key}" if section else key
            raise file.error(f"{of}{words}: {error}", *here) from None

    for key, value in (file.content if content is None else content).items():
        if key in sections and isinstance(value, dict | None):
            for inner, inner_value in (value or {}).items():
                take(inner, inner_value, key)
        elif key in sections and key not in _settings():
            raise file.error(f"{of}{key} is a section, found {value!r}", *place, key)
        else:
            take(key, value, None)
    return values


def _setting_of(name: str, section: str | None, others: Iterable[str]) -> _Setting:
    """Return the setting that a key of a file names. section: the one that it stands in, if any.
    others: names that may have been meant. Raises UserError."""
    settings = _settings()
    if flag_name(name) in INSTEAD:
        raise UserError(INSTEAD[flag_name(name)])
    if name not in settings:
        raise UserError(f"unknown key{did_you_mean(name, [*settings, *others])}")
    if section not in (None, settings[name].section):
        raise UserError(f"belongs to the section {settings[name].section}")
    return settings[name]


def config_from_values(values: dict[str, Any]) -> Config:
    """Return the configuration with these fields set, by name, and the defaults for the others."""
    sections: dict[str, dict[str, Any]] = {section: {} for section in _sections()}
    settings = _settings()
    for name, value in values.items():
        one_word = isinstance(value, str) and settings[name].item is str  # a list of one
        sections[settings[name].section][name] = _freeze([value] if one_word else value)
    return Config(**{name: kind(**sections[name]) for name, kind in _sections().items()})


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def to_yaml(config: Config, leave_out: str | None = None) -> str:
    """Return the configuration as text that `--config` reads back to the same configuration.

    leave_out: "open" leaves out what has no value yet, and what belongs to one start, `load` say:
        text that starts a like run; "defaults" all that has its default value.
    """

    def wanted(name: str, value: Any) -> bool:
        if leave_out == "open":
            return value is not None and name not in ONE_START
        return leave_out is None or value != _settings()[name].default

    content: dict[str, dict[str, Any]] = {}
    for section in _sections():
        for name, value in vars(getattr(config, section)).items():
            if wanted(name, value):
                content.setdefault(section, {})[name] = _thaw(value)
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)


def _thaw(value: Any) -> Any:
    return list(map(_thaw, value)) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class _Setting:
    """A field of a section, as the command line and YAML need to know it.

    kind: the type of its value, `int` for `int | None`; item: the type of a list's items; aliases:
    other words for its choices, which only the reader of flags and files gets to see.
    """

    section: str
    name: str
    kind: Any
    default: Any
    help: str
    choices: tuple | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    item: type | None = None
    is_json: bool = False

    def checked(self, value: Any) -> Any:
        """Return a value from YAML in the setting's own type. Raises UserError where it is of
        another."""
        if value is None:
            if self.default is not None:
                raise UserError("has no value")
            return None
        if self.is_json:
            if not isinstance(value, str | list):
                raise UserError(f"expected a word or a table, found {value!r}")
            return value  # DilatedPattern looks at what is in it
        if self.item is None:
            found, value = value, self._typed(self.kind, value)
            if type(value) is not self.kind:
                raise UserError(f"expected {self.kind.__name__}, found {found!r}")
            return self.known(value)
        values = [value] if self.item is str and not isinstance(value, list) else value
        if isinstance(values, list):
            values = [self._typed(self.item, item) for item in values]
        if not isinstance(values, list) or any(type(item) is not self.item for item in values):
            raise UserError(f"expected a list of {self.item.__name__}, found {value!r}")
        return [self.known(item) for item in values]

    def _typed(self, kind: type, value: Any) -> Any:
        """Convert what YAML takes for another type: 6e-4, without a point, 2**20 and 1Mi for text;
        a weight in a list of words for a number. Anything else stays as it is."""
        if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return float(value)
        if kind is int and isinstance(value, str):
            with contextlib.suppress(argparse.ArgumentTypeError):
                return whole_number(value)
        if self.item is str and type(value) in (int, float):
            return str(value)
        return value

    def known(self, value: Any) -> Any:
        """Return the choice that a value, or an alias, is. Raises UserError where it is none."""
        value = self.aliases.get(value, value)
        return value if self.choices is None else _one_of(self.choices, value)


def _one_of(choices: Iterable[Any], value: Any) -> Any:
    if value not in choices:
        words = [str(choice) for choice in choices]
        raise UserError(
            f"{value!r} is not one of {', '.join(words)}{did_you_mean(str(value), words)}"
        )
    return value


def _sections() -> dict[str, Any]:
    return {section.name: section.default_factory for section in dataclasses.fields(Config)}


@functools.cache
def _settings() -> dict[str, _Setting]:
    settings = {}
    for section, section_type in _sections().items():
        hints = typing.get_type_hints(section_type)
        for field in dataclasses.fields(section_type):
            kind = hints[field.name]
            if isinstance(kind, types.UnionType):
                kind = next(k for k in kind.__args__ if k is not type(None))
            options = dict(field.metadata)
            if typing.get_origin(kind) is tuple:
                options["item"] = kind.__args__[0]
            if field.default is not None:
                options["help"] += f" (default: {shown(field.default)})"
            settings[field.name] = _Setting(section, field.name, kind, field.default, **options)
    return settings
