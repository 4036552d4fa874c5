"""The text of a YAML file and what it says, or a line on why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalong.errors import UserError


def read_yaml(flag: str, path: str) -> tuple[str, Any]:
    """Text and content. Raises UserError naming flag and file, and the line that is no YAML."""
    import yaml  # not for --help

    place = f"{flag} {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
        return text, yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not YAML: {error}") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{place}{where}: not YAML: {problem or error}") from error
