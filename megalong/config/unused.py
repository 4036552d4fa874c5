"""What was set, and does nothing beside the other settings. That is said, not refused: presets and
files for several runs may have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from megalong.config import Config, flag_name
from megalong.config.flags import shown

# Of each optimizer that has settings of its own, who uses them: Muon steps the rest with AdamW.
_USERS = {"adam": ("adam", "muon"), "sgd": ("sgd",), "muon": ("muon",)}


def unused(given: Config) -> Iterator[str]:
    """A line each. given: as it was set, before it was resolved."""
    training, model, run = given.training, given.model, given.run
    for optimizer, users in _USERS.items():
        names = [name for name in vars(training) if name.startswith(f"{optimizer}_")]
        if training.optimizer not in users:
            yield from _lines(training, names, f"--optimizer is {training.optimizer}")
    style = f"--lr-decay-style is {training.lr_decay_style}"
    if training.lr_decay_style == "constant":
        yield from _lines(training, ("min_lr", "lr_decay_iters"), style)
    if training.lr_decay_style != "polynomial":
        yield from _lines(training, ("lr_decay_power",), style)
    if training.precision != "fp16":
        names = ("loss_scale", "initial_loss_scale")
        yield from _lines(training, names, f"--precision is {training.precision}")
    positions = f"--position-embedding-type is {model.position_embedding_type}"
    if model.position_embedding_type != "xpos":
        yield from _lines(model, ("xpos_scale_base",), positions)
    if model.position_embedding_type == "none":
        yield from _lines(model, ("rotary_base",), positions)
    if run.load is None and run.pretrained_checkpoint is None:
        why = "there is no --load"
        yield from _lines(training, ("use_checkpoint_opt_param_scheduler",), why)
        yield from _lines(run, ("load_fallback",), why)


def _lines(section: Any, names: Iterable[str], why: str) -> Iterator[str]:
    """Those of these settings that are not the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    for name in names:
        value = getattr(section, name)
        if value != defaults[name]:
            words = "" if value is True else f" {shown(value)}"
            yield f"{flag_name(name)}{words} is not used: {why}"
