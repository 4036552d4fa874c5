"""Reader of a command line whose file may have several stages (`megalong.config.stages`)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from megalong.config.arguments import (
    FileValue,
    build_parser,
    given_values,
    settings_in,
    with_preset,
)
from megalong.config.files import YamlFile
from megalong.config.flags import flag_name, whole_number
from megalong.config.run import SamplesConfig, TasksConfig
from megalong.config.stages import HOW, TRAINING_DATA, WHAT, Recipe, StageSettings, fields_of
from megalong.utils.errors import UserError

# The settings that a stage may have; the last ones are about what is watched in it.
OF_A_STAGE = frozenset([
    *HOW, *WHAT, *fields_of(TasksConfig, SamplesConfig),
    "valid_data_path", "test_data_path", "save_interval", "log_interval", "eval_interval",
    "eval_iters", "full_validation", "keep_best_by",
])  # fmt: skip
_LENGTHS = ("train_iters", "train_tokens")
_NO_COMMON = {
    "train_iters": "each stage has its own: set it there",
    "train_tokens": "each stage has its own: set it there",
    "lr_begin_iters": "the schedule of a stage begins with the stage: leave it out",
}
# Keys of a stage that are no settings, and the section that one may stand in.
_OTHERS = {"name": None, "train_tokens": "training"}


def parse_run(arguments: list[str], description: str | None = None) -> Recipe:
    """Return what a command line of pretrain_longnet.py describes.

    Raises UserError as `parse_arguments` does, and for a stage without a name or a length, with the
    name of another, or with what all have to have in common or the command line sets otherwise.
    """
    parser = build_parser(description)
    parser.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="say what the stages are and what they cost, and end; on so many ranks (default: those"
        " of this launch, or as few as the layouts need)",
    )
    given = vars(parser.parse_args(arguments))
    dry_run = given.pop("dry_run", None)
    if dry_run is not None and dry_run < 0:
        raise UserError(f"--dry-run {dry_run}: a number of ranks must be positive")
    return dataclasses.replace(recipe_of(given), dry_run=dry_run)


def recipe_of(given: dict[str, Any]) -> Recipe:
    """Do `parse_run` of what `build_parser`'s parser found, `given`; other flags than the
    configuration's are left out. Raises UserError as that does."""
    file = YamlFile.read(given["config"]) if "config" in given else None
    if file is None or "stages" not in file.content:
        values = given_values(given)
        # No flags.yaml of a run has a null.
        meant = {name for name, value in values.items() if name in given or value is None}
        return Recipe((StageSettings(None, values, meant=frozenset(meant)),))
    entries = file.content["stages"]

    def of(place: tuple[Any, ...]) -> str:
        """Return "stage NAME: " of a place in one that has a name."""
        inside = len(place) > 1 and place[0] == "stages" and isinstance(place[1], int)
        entry = entries[place[1]] if inside else None
        named = isinstance(entry, dict) and entry.get("name") is not None
        return f"stage {entry['name']}: " if named else ""

    file.check_keys(of)
    if not isinstance(entries, list) or not entries:
        raise file.error("stages: a list is expected, each with `name: ...`", "stages")
    return Recipe(tuple(_stages_of(file, given)))


def _stages_of(file: YamlFile, given: dict[str, Any]) -> Iterator[StageSettings]:
    """Read the stages of a file. given: what the parser found on the command line."""
    common = settings_in(
        file,
        {key: value for key, value in file.content.items() if key != "stages"},
        others={"train_tokens": "training"},
    )
    # The file is read already, and the preset is to be laid under each stage.
    flags = {name: value for name, value in given.items() if name not in ("config", "preset")}
    flags = given_values(flags)
    for name, why in _NO_COMMON.items():
        if name in common:
            raise file.error(f"{name} beside `stages:`: {why}", *common[name].place)
        if name in flags:
            raise UserError(f"{flag_name(name)} beside stages: {why}")
    shared = {name: found.value for name, found in common.items()} | flags
    if shared.get("save") is None:
        words = "each goes on from the checkpoint that the one before it has left: set --save"
        raise file.error(f"stages: {words}", "stages")
    if shared.get("use_checkpoint_opt_param_scheduler"):
        raise UserError(
            "--use-checkpoint-opt-param-scheduler keeps the schedule of a checkpoint, and each"
            " stage has its own: leave it out"
        )
    names: list[str] = []
    for number, entry in enumerate(file.content["stages"]):
        place = ("stages", number)
        name = _name(file, entry, place)
        own = settings_in(file, entry, place, _OTHERS, f"stage {name}: ")
        if name in names:
            words = f"stages: {name} is the name of another stage already, of number"
            words += f" {names.index(name) + 1}: choose another"
            raise file.error(words, *own["name"].place)
        names.append(name)
        own |= _length(file, name, own)
        _check_own(file, name, own, flags, is_first=number == 0)
        values = dict(shared)
        if any(key in own for key in TRAINING_DATA):  # one way to say it replaces the others
            values = {key: value for key, value in shared.items() if key not in TRAINING_DATA}
        values |= {key: found.value for key, found in own.items()}
        values |= {key: value for key, value in flags.items() if key in HOW}
        if number > 0:
            values |= {"finetune": False, "pretrained_checkpoint": None}
        tokens = values.pop("train_tokens", None)
        del values["name"]
        in_file = {key: found for key, found in common.items() if key not in flags}
        nulls = [key for key, found in in_file.items() if found.value is None]
        meant = frozenset([*own, *flags, *nulls])
        settings = StageSettings(name, values, own, tokens, file, place, in_file, meant)
        with settings.errors():
            values = with_preset(given.get("preset"), values)
        yield dataclasses.replace(settings, values=values)


def _name(file: YamlFile, entry: Any, place: tuple[Any, ...]) -> str:
    """Return the name of a stage, an entry of the list in the file."""
    if not isinstance(entry, dict):
        words = f"stages: expected `name: ...` and settings, found {entry!r}"
        raise file.error(words, *place)
    name = entry.get("name")
    if name is None or name == "" or str(name).isspace():
        raise file.error("stages: one without a name: set `name: ...`", *place)
    if not isinstance(name, str | int) or isinstance(name, bool):
        words = f"stages: a name is text, found {name!r}: put it in quotes"
        raise file.error(words, *place, "name")
    return str(name).strip()


def _length(file: YamlFile, name: str, own: dict[str, FileValue]) -> dict[str, FileValue]:
    """Return the length of a stage, of its own settings, as a whole number: 2000000000 or 2.0e9 in
    the file, or 2e9, 2**31 or 2Gi, which YAML takes for text."""
    lengths = [key for key in _LENGTHS if key in own]
    if not lengths:
        words = f"stage {name} has no length: set train_iters, or train_tokens"
        raise file.error(words, *own["name"].place)
    if len(lengths) > 1:
        words = f"stage {name} has train_iters and train_tokens: keep one of them"
        raise file.error(words, *own["train_tokens"].place)
    [length] = lengths
    found, value = own[length], 0
    with contextlib.suppress(ValueError, OverflowError):
        number = float(str(found.value))
        value = int(number) if number == int(number) else 0
    with contextlib.suppress(argparse.ArgumentTypeError):
        value = whole_number(str(found.value))
    if value < 1:
        words = f"{length}: expected a positive whole number, found {found.value!r}"
        raise file.error(f"stage {name}: {words}", *found.place)
    return {length: FileValue(value, found.place)}


def _check_own(
    file: YamlFile, name: str, own: dict[str, FileValue], flags: dict[str, Any], is_first: bool
) -> None:
    """Raise UserError where a stage sets what it may not, or what the command line sets, too."""
    for key, found in own.items():
        why = None
        if key == "pretrained_checkpoint":
            if not is_first and found.value is not None:
                why = "only the first stage begins with another model: the others go on from the"
                why += " stage before them"
        elif key in _NO_COMMON and key not in _LENGTHS:
            why = _NO_COMMON[key]
        elif key not in _OTHERS and key not in OF_A_STAGE:
            why = "is the same in all stages: set it beside `stages:`"
        if why is not None:
            raise file.error(f"stage {name}: {key}: {why}", *found.place)
        for flag in TRAINING_DATA if key in TRAINING_DATA else (key,):
            if flag in flags and key not in HOW:
                raise UserError(
                    f"{flag_name(flag)} holds for all stages, and {name} has {key} of its own"
                    f" ({file.where(*found.place)}): leave one of the two out"
                )
