"""What a run does otherwise than that of the checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megalong.checkpoint.texts import read_progress, read_settings
from megalong.config import Config, TrainingConfig, flag_name
from megalong.config.arguments import config_from_values
from megalong.config.attention import PATTERN_FIELDS
from megalong.config.flags import shown
from megalong.config.memory import PIECES
from megalong.training.learning_rate import learning_rate

# What the learning rate of an iteration hangs on.
SCHEDULE = (
    "lr", "min_lr", "lr_decay_style", "lr_decay_power", "lr_decay_iters", "lr_warmup_iters",
)  # fmt: skip
_STEP = (
    "seq_length", "global_batch_size", "precision", "loss_scale", "clip_grad", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum",
)  # fmt: skip


def differences(checkpoint: Path, config: Config, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """The values of these fields that differ, ours and those of the checkpoint.

    Fields that were not known when it was written have their defaults. Raises UserError where it
    cannot be read.
    """
    ours, theirs = _values(config), _values(config_from_values(read_settings(checkpoint)))
    return {
        name: (ours[name], theirs[name])
        for name in names
        if _comparable(name, ours[name]) != _comparable(name, theirs[name])
    }


def other_ways(checkpoint: Path, config: Config) -> list[str]:
    """What a run does otherwise than that of the checkpoint, and may: a line each, to be told.

    config: the run's, its memory path settled.
    """
    iteration, names = read_progress(checkpoint).iteration, list(PATTERN_FIELDS)
    goes_on = iteration > 0 and not config.run.finetune  # an imported model has seen no data
    if goes_on:
        others = {"adam": "sgd_", "sgd": "adam_"}[config.training.optimizer]
        names += ["seed", "split", *(name for name in _STEP if not name.startswith(others))]
        names += ["train_iters", *SCHEDULE]
    found = differences(checkpoint, config, names)
    if found.get("train_iters") == found.get("lr_decay_iters"):
        found.pop("lr_decay_iters", None)  # follows from the other
    lines = [
        f"{flag_name(name)} is {shown(ours)}; the checkpoint was written"
        f" {'without' if theirs is None else f'with {shown(theirs)}'}"
        for name, (ours, theirs) in found.items()
    ]
    if goes_on:
        lines += _learning_rate_change(checkpoint, iteration, config.training)
        lines += _memory_path_change(checkpoint, config)
    return lines


def with_schedule_of(checkpoint: Path, config: Config) -> Config:
    """The configuration with the checkpoint's schedule of the learning rate."""
    theirs = read_settings(checkpoint)
    schedule = {name: theirs[name] for name in SCHEDULE if name in theirs}
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **schedule))


def _learning_rate_change(checkpoint: Path, iteration: int, ours: TrainingConfig) -> list[str]:
    """What the schedule that is set now makes of the learning rate, where it makes another."""
    theirs = config_from_values(read_settings(checkpoint)).training
    rate, kept = (learning_rate(iteration + 1, training) for training in (ours, theirs))
    if rate == kept or iteration >= ours.train_iters:
        return []
    return [
        f"the learning rate goes from {learning_rate(iteration, theirs):.3e} at iteration"
        f" {iteration} to {rate:.3e} at iteration {iteration + 1}; with the checkpoint's schedule"
        f" (--use-checkpoint-opt-param-scheduler) to {kept:.3e}"
    ]


def _memory_path_change(checkpoint: Path, config: Config) -> list[str]:
    theirs = config_from_values(read_settings(checkpoint))
    before, now = _memory_path(theirs), _memory_path(config)
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
    if name in ("data_path", "tokenizer_model") and value is not None:
        return Path(value).name
    return value
