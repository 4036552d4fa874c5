"""What stands in a checkpoint beside its tensors: how far the run had come, and how it was set."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megalong.checkpoint.manifest import reading
from megalong.checkpoint.progress import Progress
from megalong.config import Config
from megalong.config.arguments import read_yaml, to_yaml

_PROGRESS, _CONFIG = "progress.json", "config.yaml"


def texts_of(progress: Progress, config: Config) -> dict[str, bytes]:
    """The contents of these files by name. config: resolved."""
    texts = {_PROGRESS: json.dumps(dataclasses.asdict(progress)), _CONFIG: to_yaml(config)}
    return {name: text.encode() for name, text in texts.items()}


def read_progress(checkpoint: Path) -> Progress:
    """How far the run had come. Raises DamagedCheckpoint."""
    with reading(checkpoint, _PROGRESS):
        return Progress.from_values(json.loads((checkpoint / _PROGRESS).read_text()))


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The fields of the resolved configuration by name, those that were known when it was written.

    Raises UserError.
    """
    return read_yaml(str(checkpoint / _CONFIG))


def read_config_text(checkpoint: Path) -> str:
    """The resolved configuration as it was written. Raises DamagedCheckpoint."""
    with reading(checkpoint, _CONFIG):
        return (checkpoint / _CONFIG).read_text()
