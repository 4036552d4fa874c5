"""The file of a run of several stages, read and checked (`megalong.config.stages`)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Iterator
from types import MappingProxyType
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
from megalong.config.stages import HOW, TRAINING_DATA, WHAT, Recipe, StageSettings
from megalong.utils.errors import UserError

# What a stage may set besides.
_WATCHED = (
    "valid_data_path", "test_data_path", "save_interval", "log_interval", "eval_interval",
    "eval_iters", "full_validation", "keep_best_by",
    *(each.name for each in dataclasses.fields(TasksConfig)),
    *(each.name for each in dataclasses.fields(SamplesConfig)),
)  # fmt: skip
OF_A_STAGE = frozenset([*HOW, *WHAT, *_WATCHED])
_LENGTHS = ("train_iters", "train_tokens")
_NO_COMMON = {
    "train_iters": "each stage has its own: set it there",
    "train_tokens": "each stage has its own: set it there",
    "lr_begin_iters": "the schedule of a stage begins with the stage: leave it out",
}
_OTHERS = MappingProxyType({"name": None, "train_tokens": "training"})
_NOT_HERE = ("config", "preset")  # read already, and to be laid under each stage


def parse_run(arguments: list[str], description: str | None = None) -> Recipe:
    """What a command line of pretrain_longnet.py describes.

    Raises UserError as `parse_arguments` does, and where the stages of its file are none: one
    without a name or a length, two of one name, one that sets what all have to have in common, or
    what the command line sets otherwise.
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
    """`parse_run` of what `build_parser`'s parser found, `given`; other flags than the
    configuration's are left out. Raises UserError as that does."""
    file = YamlFile.read(given["config"]) if "config" in given else None
    if file is None or "stages" not in file.content:
        values = given_values(given)
        # No flags.yaml of a run has a null.
        meant = {name for name, value in values.items() if name in given or value is None}
        return Recipe((StageSettings(None, values, meant=frozenset(meant)),))
    file.check_keys(lambda place: _stage_at(file, place))
    return Recipe(tuple(_stages_of(file, given)))


def _stage_at(file: YamlFile, place: tuple[Any, ...]) -> str:
    """ "stage NAME: " of a place in one that has a name."""
    match place:
        case ("stages", int(number), *_):
            entry = file.content["stages"][number]
            if isinstance(entry, dict) and entry.get("name") is not None:
                return f"stage {entry['name']}: "
    return ""


def _stages_of(file: YamlFile, given: dict[str, Any]) -> Iterator[StageSettings]:
    """The stages of a file. given: what the parser found on the command line."""
    common = settings_in(
        file,
        {key: value for key, value in file.content.items() if key != "stages"},
        others={"train_tokens": "training"},
    )
    flags = given_values({name: value for name, value in given.items() if name not in _NOT_HERE})
    for name, why in _NO_COMMON.items():
        if name in common:
            raise UserError(f"{file.where(*common[name].place)}: {name} beside `stages:`: {why}")
        if name in flags:
            raise UserError(f"{flag_name(name)} beside stages: {why}")
    shared = {name: found.value for name, found in common.items()} | flags
    if shared.get("save") is None:
        raise UserError(
            f"{file.where('stages')}: stages: each goes on from the checkpoint that the one before"
            " it has left: set --save"
        )
    if shared.get("use_checkpoint_opt_param_scheduler"):
        raise UserError(
            "--use-checkpoint-opt-param-scheduler keeps the schedule of a checkpoint, and each"
            " stage has its own: leave it out"
        )
    names: dict[str, int] = {}
    for number, (name, own, place) in enumerate(_own_settings(file)):
        if name in names:
            raise UserError(
                f"{file.where(*own['name'].place)}: stages: {name} is the name of another stage"
                f" already, of number {names[name] + 1}: choose another"
            )
        names[name] = number
        _check_own(file, name, own, flags, number)
        values = _over(shared, {key: found.value for key, found in own.items()})
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


def _own_settings(
    file: YamlFile,
) -> Iterator[tuple[str, dict[str, FileValue], tuple[Any, ...]]]:
    """Name, settings and place of each stage."""
    entries = file.content["stages"]
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{file.where('stages')}: stages: a list is expected, each with `name: ...`"
        )
    for number, entry in enumerate(entries):
        place = ("stages", number)
        if not isinstance(entry, dict):
            raise UserError(
                f"{file.where(*place)}: stages: expected `name: ...` and settings, found {entry!r}"
            )
        name = entry.get("name")
        if name is None or name == "" or str(name).isspace():
            raise UserError(f"{file.where(*place)}: stages: one without a name: set `name: ...`")
        if not isinstance(name, str | int) or isinstance(name, bool):
            where = file.where(*place, "name")
            raise UserError(f"{where}: stages: a name is text, found {name!r}: put it in quotes")
        name = str(name).strip()
        yield name, settings_in(file, entry, place, _OTHERS, f"stage {name}: "), place


def _check_own(
    file: YamlFile, name: str, own: dict[str, FileValue], flags: dict[str, Any], number: int
) -> None:
    """Raise UserError where a stage sets what it may not, or nothing of its length, or what the
    command line sets, too."""
    for key, found in own.items():
        where = f"{file.where(*found.place)}: stage {name}: {key}"
        if key == "pretrained_checkpoint":
            if number > 0 and found.value is not None:
                raise UserError(
                    f"{where}: only the first stage begins with another model: the others go on"
                    " from the stage before them"
                )
        elif key in _NO_COMMON and key not in _LENGTHS:
            raise UserError(f"{where}: {_NO_COMMON[key]}")
        elif key not in _OTHERS and key not in OF_A_STAGE:
            raise UserError(f"{where}: is the same in all stages: set it beside `stages:`")
        same = TRAINING_DATA if key in TRAINING_DATA else (key,)
        for flag in same:
            if flag in flags and key not in HOW:
                raise UserError(
                    f"{flag_name(flag)} holds for all stages, and {name} has {key} of its own"
                    f" ({file.where(*found.place)}): leave one of the two out"
                )
    lengths = [key for key in _LENGTHS if key in own]
    if not lengths:
        place = own["name"].place
        raise UserError(
            f"{file.where(*place)}: stage {name} has no length: set train_iters, or train_tokens"
        )
    if len(lengths) > 1:
        where = file.where(*own["train_tokens"].place)
        raise UserError(f"{where}: stage {name} has train_iters and train_tokens: keep one of them")
    [length] = lengths
    found = own[length]
    value = _whole(found.value)
    if value is None or value < 1:
        where = file.where(*found.place)
        raise UserError(
            f"{where}: stage {name}: {length}: expected a positive whole number, found"
            f" {found.value!r}"
        )
    own[length] = FileValue(value, found.place)


def _whole(value: Any) -> int | None:
    """The whole number that stands in a file, as 2000000000 or 2.0e9, or as 2e9, 2**31 or 2Gi,
    which YAML takes for text; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return whole_number(value)
    with contextlib.suppress(ValueError):
        number = float(value)
        if math.isfinite(number) and number == int(number):
            return int(value) if isinstance(value, int) else int(number)
    return None


def _over(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A stage's own settings over those of all; its data in the place of theirs, whichever of the
    ways to say it both take."""
    if any(name in own for name in TRAINING_DATA):
        shared = {name: value for name, value in shared.items() if name not in TRAINING_DATA}
    return shared | own
