"""A YAML grid as cells: one training each, and what it is asked afterwards.

A grid has, beside title and question,

    measure   which table and plots it becomes (`report.py`)
    equal     "tokens" or "flops": what is the same in all cells with the same budget
    common    settings of all cells
    axes      by name of an axis its values, and of each the settings that make it
    scales    for cpu and gpu: seeds, minutes (the bound of a cell), and again common and axes,
              which win over the others; an axis that stands there too has its values from there

Settings are flags of pretrain_longnet.py (`num_layers: 4`), and

    budget     training tokens, or executed FLOPs, whichever `equal` says
    data       "corpus", or recall tasks: flags of tools/make_task_data.py, and "lengths": by each
               length the tasks that have samples of it; all lengths have as many tokens
    start      settings of a training that this one starts from, beside those of `common` but for
               stages; its budget is in tokens, and it may have a start, too. Cells with the same
               one share it. Of the corpus it reads other texts first than what starts from it
    stages     those of the training, if it has several: settings of each, and "share", of the
               budget
    evaluate   flags of tools/evaluate.py

A cell has one value of every axis, and a seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from table import MEASURES

from megalong.config import Config
from megalong.utils.errors import UserError, did_you_mean

KEYS = {"title", "question", "measure", "equal", "common", "axes", "scales"}
SCALE_KEYS = {"seeds", "minutes", "common", "axes"}
OTHER_SETTINGS = ("budget", "data", "evaluate")
EQUAL = ("tokens", "flops")
SEEDS_OF_STARTS = 1000  # apart from those of the cells, where both read the corpus
FLAGS = tuple(  # of pretrain_longnet.py, by the names of their fields
    flag.name for section in get_type_hints(Config).values() for flag in dataclasses.fields(section)
)


@dataclass(frozen=True)
class Cell:
    """values: of each axis the name. flags: of pretrain_longnet.py, by the names of fields.
    stages: settings of each besides, of which none is in the flags too; empty where there is one.
    start: the training that it starts from.
    data: None for the corpus, else flags of tools/make_task_data.py. evaluate: flags of
    tools/evaluate.py; none of what another starts from. budget: tokens or FLOPs."""

    name: str
    values: dict[str, str]
    seed: int
    flags: dict[str, Any]
    budget: float
    data: dict[str, Any] | None
    evaluate: dict[str, Any]
    start: Cell | None = None
    stages: tuple[dict[str, Any], ...] = ()

    @property
    def needs_corpus(self) -> bool:
        """For its texts, or for its tokenizer, which is the corpus' where no flag says another."""
        return self.data is None or "tokenizer_type" not in self.flags


@dataclass(frozen=True)
class Grid:
    """An experiment at a scale. minutes: the bound of a cell."""

    experiment: str
    scale: str
    title: str
    question: str
    measure: str
    equal: str
    axes: dict[str, list[str]]
    minutes: float
    cells: list[Cell]

    def chosen(self, patterns: list[str]) -> list[Cell]:
        """Those whose names, without the seed, have all words of one of the patterns, as in
        "dense 512". Raises UserError where a pattern is that of none."""
        for pattern in patterns:
            if not any(_matches(cell, pattern) for cell in self.cells):
                axes = "; ".join(f"{axis} {', '.join(names)}" for axis, names in self.axes.items())
                raise UserError(f"--cells {pattern}: no cell has that; there are {axes}")
        return [cell for cell in self.cells if any(_matches(cell, pattern) for pattern in patterns)]


def read_grid(path: Path, scale: str, seeds: list[int] | None = None) -> Grid:
    """seeds: instead of those in the file. Raises UserError for what is missing, unknown or
    contradicts itself."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    _check_keys(path, content, KEYS, KEYS - {"common"})
    if scale not in content["scales"]:
        have = ", ".join(content["scales"])
        raise UserError(f"--scale {scale}: {path.name} has {have}")
    here = content["scales"][scale]
    _check_keys(path, here, SCALE_KEYS, {"seeds", "minutes"}, f"scales.{scale}.")
    if content["equal"] not in EQUAL:
        raise UserError(f"{path}: equal: {content['equal']}: must be one of {', '.join(EQUAL)}")
    if content["measure"] not in MEASURES:
        hint = did_you_mean(str(content["measure"]), list(MEASURES))
        raise UserError(
            f"{path}: measure: {content['measure']}: must be one of {', '.join(MEASURES)}{hint}"
        )
    axes = {**content["axes"], **here.get("axes", {})}
    common = [content.get("common", {}), here.get("common", {})]
    cells = [
        _cell(path, common, dict(zip(axes, names, strict=True)), axes, seed)
        for names in itertools.product(*axes.values())
        for seed in seeds or here["seeds"]
    ]
    return Grid(
        experiment=path.stem,
        scale=scale,
        title=content["title"],
        question=" ".join(content["question"].split()),
        measure=content["measure"],
        equal=content["equal"],
        axes={axis: list(map(str, values)) for axis, values in axes.items()},
        minutes=here["minutes"],
        cells=cells,
    )


def as_flags(settings: dict[str, Any]) -> list[str]:
    """{"num_layers": 4, "swiglu": False, "attention": ["local", "dense"]} as words of a command."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{flag}", *map(str, values)]
    return words


def _cell(
    path: Path, common: list[dict], names: dict[str, Any], axes: dict[str, dict], seed: int
) -> Cell:
    values = {axis: str(name) for axis, name in names.items()}
    name = "-".join([*values.values(), f"seed{seed}"])
    of_axes = [axes[axis][name] for axis, name in names.items()]
    return _cell_of(path, name, values, seed, _merged([*common, *of_axes]), _merged(common))


def _cell_of(
    path: Path, name: str, values: dict[str, str], seed: int, settings: dict, common: dict
) -> Cell:
    """common: what the settings of a start are beside."""
    _check_settings(path, name, settings)
    settings = dict(settings)
    data, start = settings.pop("data"), settings.pop("start", None)
    stages = tuple(settings.pop("stages", ()))
    if start is not None:
        if "evaluate" in start:
            raise UserError(f"{path}: evaluate: {name} starts from what is not evaluated")
        beside = {key: value for key, value in common.items() if key not in ("start", "stages")}
        start = _merged([{**beside, "evaluate": {}}, start])
        # The order of the texts hangs on the seed: what starts from this shall not read them again.
        other = seed + SEEDS_OF_STARTS if start.get("data") == data == "corpus" else seed
        start = _cell_of(path, f"the start of {name}", values, other, start, beside)
    return Cell(
        name=name,
        values=values,
        seed=seed,
        budget=float(settings.pop("budget")),
        data=None if data == "corpus" else data,
        evaluate=settings.pop("evaluate"),
        start=start,
        stages=stages,
        flags={**settings, "seed": seed},
    )


def _check_settings(path: Path, name: str, settings: dict[str, Any]) -> None:
    """Raises UserError where settings are missing, unknown, or none of their kind."""
    if missing := [key for key in OTHER_SETTINGS if key not in settings]:
        raise UserError(f"{path}: {', '.join(missing)}: cell {name} has none")
    known = {*FLAGS, *OTHER_SETTINGS, "start", "stages"}
    for key in settings:
        if key not in known:
            raise UserError(f"{path}: {key}: no such setting{did_you_mean(key, known)}")
    if not isinstance(settings.get("start", {}), dict):
        raise UserError(f"{path}: start: {name} starts from settings: give a mapping")
    stages = settings.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{path}: stages: {name} has stages: give a list of mappings")
    shares = [stage.get("share", 0) for stage in stages]
    if stages and (min(shares) <= 0 or not math.isclose(sum(shares), 1)):
        raise UserError(f"{path}: stages: {name}: each needs a share above 0, which sum to 1")


def _merged(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings where later layers win; those that have settings of their own are merged as well,
    but for lengths, which are taken as a whole."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            there = merged.get(key)
            both = isinstance(there, dict) and isinstance(value, dict) and key != "lengths"
            merged[key] = _merged([there, value]) if both else value
    return merged


def _matches(cell: Cell, pattern: str) -> bool:
    return set(pattern.split()) <= set(cell.values.values())


def _check_keys(
    path: Path, content: dict, known: set[str], needed: set[str], where: str = ""
) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{path}: {where}{key}: no such key{did_you_mean(key, known)}")
    if missing := sorted(needed - content.keys()):
        raise UserError(f"{path}: {where}{missing[0]} is missing")
