"""What the sections of the configuration are made of: fields that are flags, and common checks."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import field
from typing import Any

from megalong.utils.errors import UserError


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that knows how to be a command-line flag."""
    return field(default=default, metadata={"help": help, **options})


def flag_name(field_name: str) -> str:
    """The command-line flag of a field: `num_layers` is `--num-layers`."""
    return "--" + field_name.replace("_", "-")


_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def whole_number(text: str) -> int:
    """A whole number as people write it: 1048576, 1_048_576, 2**20, 1Mi.

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
    """A value as the command line has it behind its flag: 1 2 4, a table as JSON, on, off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        nested = any(isinstance(item, tuple | list) for item in value)
        return json.dumps(value) if nested else " ".join(map(str, value))
    return "not set" if value is None else str(value)


def require_positive(section: Any, *names: str) -> None:
    """Raise UserError unless these fields are at least one."""
    for name in names:
        if getattr(section, name) <= 0:
            raise UserError(f"{flag_name(name)} {getattr(section, name)} must be positive")


def require_more_than_zero(section: Any, *names: str) -> None:
    """Raise UserError unless these fields are positive and finite."""
    for name in names:
        if not 0 < getattr(section, name) < math.inf:
            raise UserError(
                f"{flag_name(name)} {getattr(section, name)} must be positive and finite"
            )


def default(value: Any, otherwise: Any) -> Any:
    """The value of a field that was given, or what stands for None."""
    return otherwise if value is None else value


def largest_divisor(value: int, limit: int) -> int:
    """The largest divisor of `value` that is not more than `limit`."""
    return next(size for size in range(min(value, limit), 0, -1) if value % size == 0)
