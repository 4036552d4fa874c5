"""The stages of a run: the settings that they have in common, and those of each, in one YAML file.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from megalong.config import Config, ModelConfig
from megalong.config.arguments import ONE_START, FileValue, config_from_values, to_yaml
from megalong.config.attention import AttentionConfig
from megalong.config.files import YamlFile
from megalong.config.memory import MemoryConfig
from megalong.config.model import FACTORS, ROPE_FIELDS, fields_of_scaling, lost_fields
from megalong.config.parallel import ParallelConfig
from megalong.utils.errors import UserError, counted


def fields_of(*sections: type) -> tuple[str, ...]:
    """Return the names of the settings of these sections."""
    return tuple(each.name for section in sections for each in dataclasses.fields(section))


# How a stage is computed, which changes nothing of what comes out: on the command line it holds for
# this start, whatever the stages say.
HOW = frozenset([*fields_of(ParallelConfig, MemoryConfig), "micro_batch_size", "attention_backend"])
# What the result of a stage hangs on, and a stage may set.
WHAT = (
    "seq_length", "xpos_scale_base", *ROPE_FIELDS,
    *(name for name in fields_of(AttentionConfig) if name != "attention_backend"),
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
        """Make a UserError inside say of which stage it is, and which line of the file has the
        setting that it names."""
        try:
            yield
        except UserError as error:
            if self.file is None:
                raise
            names = [flag.replace("-", "_") for flag in re.findall(r"--([a-z0-9-]+)", str(error))]
            found = [of[name] for of in (self.own, self.common) for name in names if name in of]
            place = found[0].place if found else self.place
            raise self.file.error(f"stage {self.name}: {error}", *place) from error

    def iterations(self) -> tuple[int, list[str]]:
        """Return its own, and what is to be said of how they were counted. Raises UserError where
        they cannot be, or are too few for what is to happen in them."""
        iterations, notes = 1, []
        if self.tokens is None:
            iterations = self.own["train_iters"].value
        else:
            batch = self.values.get("global_batch_size")
            if batch is None:
                raise UserError(
                    "train_tokens is a number of iterations only where --global-batch-size is set,"
                    " and not left to the number of ranks: set it"
                )
            length = self.values.get("seq_length", ModelConfig.seq_length)
            if min(batch, length) > 0:  # else an error, soon
                iterations = math.ceil(self.tokens / (batch * length))
            if (tokens := iterations * batch * length) > self.tokens:
                notes.append(
                    f"stage {self.name}: train_tokens {self.tokens:,} are rounded up to"
                    f" {tokens:,}, {counted(iterations, 'iteration')} of {batch * length:,}"
                )
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
        return iterations, notes


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
        """The iterations of the stage itself."""
        return self.end - self.begin

    @property
    def tokens(self) -> int:
        """The tokens that it is trained on."""
        batch = self.config.training.global_batch_size
        assert batch is not None
        return self.iterations * batch * self.config.model.seq_length

    def following(self, load: str | None) -> Stage:
        """Return this stage as the process that has done the one before it goes on to it, with the
        checkpoint in the folder `load`: what is about one start was about that."""
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
        """Return this run for what reads no data: with some where a stage has none."""
        stages = (
            dataclasses.replace(stage, values=stage.values | data_to_come(stage.values))
            for stage in self.stages
        )
        return dataclasses.replace(self, stages=tuple(stages))

    def resolve(self, world_size: int) -> tuple[Stage, ...]:
        """Return the stages on so many ranks. Raises UserError where one cannot work."""
        if self.stages[0].name is None:
            settings = self.stages[0]
            given = config_from_values(settings.values)
            config, flags = given.resolve(world_size), to_yaml(given, leave_out="open")
            return (Stage(None, 1, 1, 0, given, config, settings, flags=flags),)
        stages: list[Stage] = []
        begin, last = 0, len(self.stages)
        for number, settings in enumerate(self.stages, 1):
            with settings.errors():
                iterations, notes = settings.iterations()
                values = self._values(settings, begin, iterations, is_last=number == last)
                given = config_from_values(values)
                config = given.resolve(world_size)
                if stages:
                    _check_positions(settings, config, stages[-1])
            stage = Stage(settings.name, number, last, begin, given, config, settings, (*notes,))
            stages.append(stage)
            begin += iterations
        flags = _flags(stages)
        return tuple(dataclasses.replace(stage, flags=flags) for stage in stages)

    def stage(self, name: str | None) -> StageSettings:
        """Return the stage of this name: None in a run without stages. Raises UserError where none
        has it."""
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
        """Return the settings of one of the stages by field name, as those of a run that has no
        other. Raises UserError where its length is none."""
        if stage.name is None:
            return stage.values
        iterations, _ = stage.iterations()
        return self._values(stage, 0, iterations, is_last=False)

    def _values(
        self, stage: StageSettings, begin: int, iterations: int, is_last: bool
    ) -> dict[str, Any]:
        """Return the settings of a stage as those of a run that goes on from iteration `begin`:
        without what is beside the stages for a scaling that others have and it has not."""
        idle = {
            name
            for factor in FACTORS
            if stage.values.get(factor) is None
            and any(other.values.get(factor) is not None for other in self.stages)
            for name in fields_of_scaling(factor)
        }
        values = {n: value for n, value in stage.values.items() if n in stage.own or n not in idle}
        end = begin + iterations
        values |= {"train_iters": end, "lr_begin_iters": begin}
        if values.get("profile"):
            run = config_from_values(values).run
            overlaps = begin < run.profile_step_end - 1
            values["profile"] = overlaps and (run.profile_step_start <= end or is_last)
        return values

    @property
    def fewest_ranks(self) -> int:
        """A number of ranks that the layout of every stage can share."""
        configs = [config_from_values(settings.values) for settings in self.stages]
        return math.lcm(*(max(config.parallel.ranks_per_replica, 1) for config in configs))


def data_to_come(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands in the place of the data to train on, by field name, for what reads none:
    nothing where settings have some."""
    if any(values.get(name) for name in TRAINING_DATA):
        return {}
    divided = not (values.get("valid_data_path") or values.get("test_data_path"))
    return {"data_path" if divided else "train_data_path": [DATA_TO_COME]}


def _check_positions(settings: StageSettings, config: Config, before: Stage) -> None:
    """Raise UserError where a stage, resolved, would forget rotary positions that the one before it
    was trained with: what is about one stage is of no other."""
    for name in lost_fields(config.model, before.config.model, settings.own):
        here, there = (json.dumps(getattr(each.model, name)) for each in (config, before.config))
        raise UserError(
            f"{name}: {there} of the stage before it, {before.name}, is not of this one: set it"
            f" here too, or {name}: {here}, the default, if that is meant"
        )


def _flags(stages: list[Stage]) -> str:
    """Return the YAML text that starts a like run: what the stages have in common as the first has
    it, and of each what it has otherwise."""
    lengths = {"train_iters", "lr_begin_iters"}
    contents = [yaml.safe_load(to_yaml(stage.given)) for stage in stages]
    flat = [{k: v for section in each.values() for k, v in section.items()} for each in contents]
    differing = {
        name
        for name in flat[0].keys() - {*ONE_START, *lengths, "profile"}
        if any(each[name] != flat[0][name] for each in flat)
    }
    content: dict[str, Any] = {
        section: {name: v for name, v in values.items() if name not in differing | lengths}
        for section, values in yaml.safe_load(to_yaml(stages[0].given, leave_out="open")).items()
    }
    content["run"]["profile"] = any(stage.given.run.profile for stage in stages)
    content["stages"] = [
        {"name": stage.name, "train_iters": stage.iterations}
        | {name: value for name, value in each.items() if name in differing}
        for stage, each in zip(stages, flat, strict=True)
    ]
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
