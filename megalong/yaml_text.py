"""The text of a YAML file and what it says, or a line on why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalong.errors import UserError


def read_yaml(place: str, path: str | Path, loader: type | None = None) -> tuple[str, Any]:
    """Text and content.

    place: how messages begin, the flag with the file. loader: of PyYAML, default its safe one.
    Raises UserError, with the line that is no YAML.
    """
    import yaml  # not for --help

    try:
        text = Path(path).read_text(encoding="utf-8")
        return text, yaml.load(text, loader or yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not YAML: {error}") from error
    except yaml.YAMLError as error:
        problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        if problem == "could not find expected ':'":  # is found behind the key that has none
            problem, mark = "a colon is missing", error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{place}{where}: not YAML: {problem or error}") from error
