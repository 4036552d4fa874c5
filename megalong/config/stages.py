"""The stages of a run: what they have in common, and what each has of its own, in one YAML file.

    lr: 6.0e-4                    # the settings of --config FILE.yaml, of all stages
    save: runs/recipe
    stages:
      - name: short               # and over them those of a stage
        seq_length: 2048
        train_tokens: 2.0e9       # or train_iters: of this stage
      - name: long
        seq_length: 32768
        train_iters: 500
        lr: 1.0e-4

Iterations count on over the stages. The learning rate of a stage follows its own schedule, in its
own iterations. The configuration of a stage is that of a run that goes on from the stage before it
until the last iteration of its own (`--train-iters`), and whose schedule begins there
(`--lr-begin-iters`): a run without stages is one stage without a name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from megalong.config import Config, ModelConfig
from megalong.config.arguments import (
    ONE_START,
    FileValue,
    config_from_values,
    to_yaml,
)
from megalong.config.attention import AttentionConfig
from megalong.config.files import YamlFile
from megalong.config.memory import MemoryConfig
from megalong.config.model import FACTORS, ROPE_FIELDS, fields_of_scaling, lost_fields
from megalong.config.parallel import ParallelConfig
from megalong.utils.errors import UserError, counted


def _fields(*sections: type) -> tuple[str, ...]:
    return tuple(each.name for section in sections for each in dataclasses.fields(section))


# How a stage is computed, which changes nothing of what comes out: on the command line it holds for
# this start, whatever the stages say.
HOW = frozenset([*_fields(ParallelConfig, MemoryConfig), "micro_batch_size", "attention_backend"])
# What the result of a stage hangs on, and a stage may set.
WHAT = (
    "seq_length", "xpos_scale_base", *ROPE_FIELDS,
    *(name for name in _fields(AttentionConfig) if name != "attention_backend"),
    "global_batch_size", "train_iters", "lr", "min_lr", "lr_decay_style", "lr_decay_power",
    "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_decay_iters", "lr_warmup_iters", "mask_rate",
    "weight_decay", "z_loss_coeff", "skip_loss_spikes", "loss_spike_window", "clip_grad",
    "data_path", "data_blend", "train_data_path", "sample_mode", "length_upsampling",
    "document_attention", "eod_mask_loss",
)  # fmt: skip
# Three ways to say what is trained on, and what stands for one where it need not be said.
TRAINING_DATA = ("data_path", "data_blend", "train_data_path")
DATA_TO_COME = "to_come"


@dataclass(frozen=True)
class StageSettings:
    """A stage as it was asked for.

    name: None of a run without stages. values: all settings, by field name. own: those of the stage
    itself. tokens: those it is to be trained on, where that is how its length was given. file,
    place: where it stands, if in one; common: what stands there and is of all stages. meant: names
    of what was set for just this one, defaults too: not by a file with the settings of another run.
    """

    name: str | None
    values: dict[str, Any]
    own: Mapping[str, FileValue] = field(default_factory=dict)
    tokens: int | None = None
    file: YamlFile | None = None
    place: tuple[Any, ...] = ()
    common: Mapping[str, FileValue] = field(default_factory=dict)
    meant: frozenset[str] = frozenset()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Inside, a UserError says of which stage it is, and which line of the file has the setting
        that it names."""
        try:
            yield
        except UserError as error:
            if self.file is None:
                raise
            flags = re.findall(r"--([a-z0-9-]+)", str(error))
            names = [flag.replace("-", "_") for flag in flags]
            found = [of[name] for of in (self.own, self.common) for name in names if name in of]
            where = self.file.where(*(found[0].place if found else self.place))
            raise UserError(f"{where}: stage {self.name}: {error}") from error

    def without_idle_scalings(self, scalings: Iterable[str]) -> dict[str, Any]:
        """Its settings, without what all have in common of a scaling that other stages have and it
        has not. scalings: factors of those that some stage has."""
        idle = {
            name
            for factor in scalings
            if self.values.get(factor) is None
            for name in fields_of_scaling(factor)
        }
        return {n: value for n, value in self.values.items() if n in self.own or n not in idle}

    def iterations(self) -> tuple[int, list[str]]:
        """Its own, and what is to be said of how they were counted."""
        if self.tokens is None:
            return self.own["train_iters"].value, []
        batch = self.values.get("global_batch_size")
        if batch is None:
            raise UserError(
                "train_tokens is a number of iterations only where --global-batch-size is set, and"
                " not left to the number of ranks: set it"
            )
        length = self.values.get("seq_length", ModelConfig.seq_length)
        if min(batch, length) < 1:
            return 1, []  # an error, soon
        iterations = math.ceil(self.tokens / (batch * length))
        tokens = iterations * batch * length
        if tokens == self.tokens:
            return iterations, []
        return iterations, [
            f"stage {self.name}: train_tokens {self.tokens:,} are rounded up to {tokens:,},"
            f" {counted(iterations, 'iteration')} of {batch * length:,}"
        ]

    def check_positions(self, config: Config, before: Stage) -> None:
        """Raise UserError where the stage, resolved, would forget rotary positions that the one
        before it was trained with: what is about one stage is of no other."""
        for name in lost_fields(config.model, before.config.model, self.own):
            here, there = (
                json.dumps(getattr(each.model, name)) for each in (config, before.config)
            )
            raise UserError(
                f"{name}: {there} of the stage before it, {before.name}, is not of this one: set"
                f" it here too, or {name}: {here}, the default, if that is meant"
            )

    def check(self, iterations: int) -> None:
        """Raise UserError where so many are too few for what is to happen in them."""
        warmup = self.values.get("lr_warmup_iters", 0)
        if warmup > iterations:
            raise UserError(
                f"--lr-warmup-iters {warmup} is more than the"
                f" {counted(iterations, 'iteration')} of the stage"
            )
        decay = self.values.get("lr_wsd_decay_iters")
        if decay is not None and decay > iterations - warmup:
            raise UserError(
                f"--lr-wsd-decay-iters {decay} is more than the {iterations - warmup} of the"
                f" stage's {counted(iterations, 'iteration')} that its warm-up leaves"
            )


@dataclass(frozen=True)
class Stage:
    """A stage as it runs, on so many ranks.

    name: None of a run without stages. number: from 1, of `count`. begin: iterations of the run
    before it. given: its configuration before it was resolved, config: resolved. notes: what is to
    be said of it, in lines. flags: of the whole run, what was given: YAML that starts a like one.
    """

    name: str | None
    number: int
    count: int
    begin: int
    given: Config
    config: Config
    settings: StageSettings
    notes: tuple[str, ...] = ()
    flags: str = ""

    @property
    def end(self) -> int:
        """The last iteration of the stage."""
        return self.config.training.train_iters

    @property
    def iterations(self) -> int:
        """Its own."""
        return self.end - self.begin

    @property
    def tokens(self) -> int:
        """That it is trained on."""
        batch = self.config.training.global_batch_size
        assert batch is not None
        return self.iterations * batch * self.config.model.seq_length

    def following(self, load: str | None) -> Stage:
        """This stage where the process that has done the one before it goes on to it, with what
        stands in the folder `load`: what is about one start was about that."""
        run = dataclasses.replace(
            self.config.run, load=load, load_optim=True, load_rng=True, new_data=False
        )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, run=run))


@dataclass(frozen=True)
class Recipe:
    """A run as it was asked for: one stage without a name, or several.

    dry_run: ranks of a launch whose costs are to be told instead of running it; 0: as many as there
    are, or as are needed; None: it is to run.
    """

    stages: tuple[StageSettings, ...]
    dry_run: int | None = None

    def with_data_to_come(self) -> Recipe:
        """This one for what reads no data: with some where a stage has none."""
        return dataclasses.replace(self, stages=tuple(map(_with_data_to_come, self.stages)))

    def resolve(self, world_size: int) -> tuple[Stage, ...]:
        """The stages on so many ranks. Raises UserError where one cannot work."""
        stages: list[Stage] = []
        scalings = self._scalings()
        begin, last = 0, len(self.stages)
        for number, settings in enumerate(self.stages, 1):
            if settings.name is None:
                given = config_from_values(settings.values)
                only = Stage(None, 1, 1, 0, given, given.resolve(world_size), settings)
                return (dataclasses.replace(only, flags=to_yaml(given, leave_out="open")),)
            with settings.errors():
                iterations, notes = settings.iterations()
                settings.check(iterations)
                given = config_from_values(
                    _of_the_run(
                        settings.without_idle_scalings(scalings), begin, iterations, number == last
                    )
                )
                config = given.resolve(world_size)
                if stages:
                    settings.check_positions(config, stages[-1])
            stage = Stage(settings.name, number, last, begin, given, config, settings, (*notes,))
            stages.append(stage)
            begin += iterations
        flags = _flags(stages)
        return tuple(dataclasses.replace(stage, flags=flags) for stage in stages)

    def stage(self, name: str | None) -> StageSettings:
        """That of this name: None in a run without stages. Raises UserError where none has it."""
        names = [settings.name for settings in self.stages]
        if name in names:
            return self.stages[names.index(name)]
        if names == [None]:
            raise UserError(f"the run has no stages: leave --stage {name} out")
        there = ", ".join(map(str, names))
        if name is None:
            raise UserError(f"the file of --config has stages: set --stage to one of {there}")
        raise UserError(f"--stage {name}: no such stage: set one of {there}")

    def alone(self, stage: StageSettings) -> dict[str, Any]:
        """The settings of one of the stages by field name, as those of a run that has no other.
        Raises UserError where its length is none."""
        if stage.name is None:
            return stage.values
        iterations, _ = stage.iterations()
        stage.check(iterations)
        values = stage.without_idle_scalings(self._scalings())
        return _of_the_run(values, 0, iterations, is_last=False)

    def _scalings(self) -> list[str]:
        """The factors of those of rotary positions that some stage has."""
        return [
            factor
            for factor in FACTORS
            if any(settings.values.get(factor) is not None for settings in self.stages)
        ]

    @property
    def fewest_ranks(self) -> int:
        """A number of ranks that the layout of every stage can share."""
        configs = [config_from_values(settings.values) for settings in self.stages]
        return math.lcm(*(max(config.parallel.ranks_per_replica, 1) for config in configs))


def _with_data_to_come(settings: StageSettings) -> StageSettings:
    return dataclasses.replace(settings, values=settings.values | data_to_come(settings.values))


def data_to_come(values: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the place of the data to train on, by field name, for what reads none: nothing
    where settings have some."""
    if any(values.get(name) for name in TRAINING_DATA):
        return {}
    divided = not (values.get("valid_data_path") or values.get("test_data_path"))
    return {"data_path" if divided else "train_data_path": [DATA_TO_COME]}


def _of_the_run(
    values: dict[str, Any], begin: int, iterations: int, is_last: bool
) -> dict[str, Any]:
    """The settings of a stage as those of a run that goes on from iteration `begin`."""
    end = begin + iterations
    values = values | {"train_iters": end, "lr_begin_iters": begin}
    if values.get("profile"):
        run = config_from_values(values).run
        overlaps = begin < run.profile_step_end - 1
        values["profile"] = overlaps and (run.profile_step_start <= end or is_last)
    return values


def _flags(stages: list[Stage]) -> str:
    """The YAML text that starts a like run: what the stages have in common as the first has it, and
    of each what it has otherwise."""
    lengths = {"train_iters", "lr_begin_iters"}
    skipped = {*ONE_START, *lengths, "profile"}
    contents = [yaml.safe_load(to_yaml(stage.given)) for stage in stages]
    flat = [{k: v for section in each.values() for k, v in section.items()} for each in contents]
    differing = {
        name
        for name in flat[0]
        if name not in skipped and any(each[name] != flat[0][name] for each in flat)
    }
    left_out = differing | lengths
    common = yaml.safe_load(to_yaml(stages[0].given, leave_out="open"))
    content: dict[str, Any] = {
        section: {name: value for name, value in values.items() if name not in left_out}
        for section, values in common.items()
    }
    content["run"]["profile"] = any(stage.given.run.profile for stage in stages)
    content["stages"] = [
        {
            "name": stage.name,
            "train_iters": stage.iterations,
            **{name: each[name] for name in each if name in differing},
        }
        for stage, each in zip(stages, flat, strict=True)
    ]
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
