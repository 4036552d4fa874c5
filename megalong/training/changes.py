"""What a run does otherwise than that of the checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megalong.checkpoint.texts import read_progress, read_settings
from megalong.config import Config, TrainingConfig, flag_name
from megalong.config.arguments import config_from_values
from megalong.config.attention import PATTERN_FIELDS
from megalong.config.flags import shown
from megalong.config.memory import PIECES
from megalong.config.model import ROPE_FIELDS
from megalong.data.sources import sources_of_flag
from megalong.model.optimizers import optimizer_of
from megalong.training.learning_rate import learning_rate

# What the learning rate of an iteration hangs on.
SCHEDULE = (
    "lr", "min_lr", "lr_decay_style", "lr_decay_power", "lr_decay_iters", "lr_warmup_iters",
    "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_begin_iters",
)  # fmt: skip
_DATA = (
    "split", "valid_data_path", "test_data_path", "sample_mode", "length_upsampling",
)  # fmt: skip
_STEP = (
    "seq_length", "global_batch_size", "precision", "loss_scale", "clip_grad", "weight_decay",
    "z_loss_coeff", "skip_loss_spikes", "loss_spike_window",
)  # fmt: skip
# What moves the loss of a batch from one step to the next; and so do other sources.
_MOVES_THE_LOSS = (
    "objective", "mask_rate", "eod_mask_loss", "document_attention", "seq_length", "split",
    "sample_mode", "length_upsampling", "xpos_scale_base", *PATTERN_FIELDS, *ROPE_FIELDS,
)  # fmt: skip


def config_of(checkpoint: Path) -> Config:
    """The configuration that a checkpoint was written with.

    Fields that were not known then have their defaults. Raises UserError where it cannot be read.
    """
    return config_from_values(read_settings(checkpoint))


def differences(ours: Config, theirs: Config, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """The values of these fields that differ, in two configurations."""
    here, there = _values(ours), _values(theirs)
    return {
        name: (here[name], there[name])
        for name in names
        if _comparable(name, here[name]) != _comparable(name, there[name])
    }


def comparable_settings(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """The values of these fields, in the form in which they are compared: for what names the data
    to train on there is "sources", a list of their names and how much there is of each."""
    values = _values(config)
    data = ("data_path", "data_blend", "train_data_path")
    found = {name: _comparable(name, values[name]) for name in names if name not in data}
    sources = config.data.training_sources()
    return found | {"sources": [[each.name, str(each.amount), each.unit] for each in sources]}


def other_ways(checkpoint: Path, config: Config, new_stage: bool = False) -> list[str]:
    """What a run does otherwise than that of the checkpoint, and may: a line each, to be told.

    config: the run's, its memory path settled. new_stage: whether a stage begins, with iterations
    and a schedule of its own.
    """
    theirs, iteration = config_of(checkpoint), read_progress(checkpoint).iteration
    names = ["objective", *PATTERN_FIELDS, *ROPE_FIELDS, "xpos_scale_base", "document_attention"]
    goes_on = iteration > 0 and not config.run.finetune  # an imported model has seen no data
    if goes_on:
        of_optimizer = optimizer_of(config.training).flags
        names += ["mask_rate", "eod_mask_loss", "seed", "optimizer", *_DATA, *_STEP]
        names += [name for name in vars(config.training) if name.startswith(of_optimizer)]
        names += [] if new_stage else ["train_iters", *SCHEDULE]
    found = differences(config, theirs, names)
    if found.get("train_iters") == found.get("lr_decay_iters"):
        found.pop("lr_decay_iters", None)  # follows from the other
    lines = [
        f"{flag_name(name)} is {shown(now)}; the checkpoint was written"
        f" {'without' if before is None else f'with {shown(before)}'}"
        for name, (now, before) in found.items()
    ]
    if goes_on:
        if not new_stage:
            lines += _learning_rate_change(iteration, config.training, theirs.training)
        lines += _memory_path_change(config, theirs)
    return lines


def moves_the_loss(checkpoint: Path, config: Config) -> bool:
    """Whether a run that goes on from the checkpoint has other losses from its first step on: the
    weights are as they were, but not what they are asked. Of its sources `Blend.continued` tells.
    """
    return bool(differences(config, config_of(checkpoint), [*_MOVES_THE_LOSS]))


def with_schedule_of(checkpoint: Path, config: Config) -> Config:
    """The configuration with the checkpoint's schedule of the learning rate."""
    theirs = read_settings(checkpoint)
    schedule = {name: theirs[name] for name in SCHEDULE if name in theirs}
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **schedule))


def _learning_rate_change(
    iteration: int, ours: TrainingConfig, theirs: TrainingConfig
) -> list[str]:
    """What the schedule that is set now makes of the learning rate, where it makes another."""
    rate, kept = (learning_rate(iteration + 1, training) for training in (ours, theirs))
    if rate == kept or iteration >= ours.train_iters:
        return []
    return [
        f"the learning rate goes from {learning_rate(iteration, theirs):.3e} at iteration"
        f" {iteration} to {rate:.3e} at iteration {iteration + 1}; with the checkpoint's schedule"
        f" (--use-checkpoint-opt-param-scheduler) to {kept:.3e}"
    ]


def _memory_path_change(ours: Config, theirs: Config) -> list[str]:
    before, now = _memory_path(theirs), _memory_path(ours)
    if theirs.memory.memory_path == "auto" or before == now:
        return []
    return [f"the memory path is {now}; that of the checkpoint's run was {before}"]


def _memory_path(config: Config) -> str:
    flags = [flag_name(piece) for piece in PIECES if getattr(config.memory, piece)]
    if config.parallel.recompute_granularity is not None:
        flags.append(f"--recompute-granularity {config.parallel.recompute_granularity}")
    return " ".join(flags) or "off"


def _values(config: Config) -> dict[str, Any]:
    sections = (config.model, config.attention, config.training, config.data)
    return {name: value for section in sections for name, value in vars(section).items()}


def _comparable(name: str, value: Any) -> Any:
    """Data and tokenizers may have moved to another folder since."""
    if value is None:
        return None
    if name.endswith("data_path"):
        return [source.name for source in sources_of_flag(value, flag_name(name))]
    return Path(value).name if name == "tokenizer_model" else value
