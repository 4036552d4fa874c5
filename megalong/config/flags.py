"""Fields that are flags, and the checks that the sections of the configuration share."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import field
from typing import Any

from megalong.utils.errors import UserError

_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def flag(default: Any, help: str, **options: Any) -> Any:
    """Make a dataclass field that knows how to be a command-line flag."""
    return field(default=default, metadata={"help": help, **options})


def flag_name(field_name: str) -> str:
    """Return the command-line flag of a field: `num_layers` is `--num-layers`."""
    return "--" + field_name.replace("_", "-")


def whole_number(text: str) -> int:
    """Read a whole number as people write it: 1048576, 1_048_576, 2**20, 1Mi.

    The `type` of a flag: raises argparse.ArgumentTypeError for anything else.
    """
    match = re.fullmatch(r"([+-]?\d[\d_]*)(?:\*\*(\d{1,3})|(Ki|Mi|Gi|Ti))?", text.strip())
    try:
        return int(match[1]) ** int(match[2] or 1) * _UNITS[match[3] or ""]
    except (TypeError, ValueError):  # no match, or 1__0
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number, such as 1048576, 2**20 or 1Mi"
        ) from None


def shown(value: Any) -> str:
    """Return a value as the command line has it behind its flag: 1 2 4, a table as JSON, on."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        nested = any(isinstance(item, tuple | list) for item in value)
        return json.dumps(value) if nested else " ".join(map(str, value))
    return "not set" if value is None else str(value)


def require_positive(section: Any, *names: str) -> None:
    """Raise UserError unless these fields are at least one, or open."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= 0:
            raise UserError(f"{flag_name(name)} {value} must be positive")


def require_more_than_zero(section: Any, *names: str) -> None:
    """Raise UserError unless these fields are positive and finite, or open."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag_name(name)} {value} must be positive and finite")


def require_not_negative(section: Any, *names: str) -> None:
    """Raise UserError unless these fields are zero, or positive and finite."""
    for name in names:
        value = getattr(section, name)
        if not 0 <= value < math.inf:
            raise UserError(f"{flag_name(name)} {value} must be a number and not negative")


def changed_fields(section: Any, *names: str) -> list[str]:
    """Return those of these fields that do not have their default."""
    return [name for name in names if getattr(section, name) != getattr(type(section), name)]


def refuse_without(what: str, missing: str, section: Any, *names: str) -> None:
    """Raise UserError where one of these fields is set, as `missing`, which turns it on, is not.

    what: the fields are about, in words.
    """
    for name in changed_fields(section, *names):
        value = getattr(section, name)
        words = flag_name(name) if value is True else f"{flag_name(name)} {shown(value)}"
        words = f"--no-{flag_name(name)[2:]}" if value is False else words
        raise UserError(f"{words} is about {what}: set {missing}, or leave it out")


def default(value: Any, otherwise: Any) -> Any:
    """Return the value of a field that was given, or what stands for None."""
    return otherwise if value is None else value


def largest_divisor(value: int, limit: int) -> int:
    """Return the largest divisor of `value` that is not more than `limit`."""
    return next(size for size in range(min(value, limit), 0, -1) if value % size == 0)
