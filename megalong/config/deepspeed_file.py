"""The user's own DeepSpeed file (`--deepspeed-config`): what others than DeepSpeed read of it.

What may stand in it, and how it is merged with our settings: `megalong.training.deepspeed_config`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalong.utils.errors import UserError


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Its content; UserError where it cannot be read, or is no JSON object."""
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--deepspeed-config {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed-config {path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--deepspeed-config {path}: expected a JSON object")
    return settings


def keeps_optimizer_on_host(path: str | None) -> bool:
    """Whether the file asks for ZeRO-Offload: master weights and moments in the host's memory, or
    on its disks, and the update on its processors. None is no file."""
    zero = read_deepspeed_file(path).get("zero_optimization") if path is not None else None
    if not isinstance(zero, dict):
        return False
    offload = zero.get("offload_optimizer")
    here = isinstance(offload, dict) and offload.get("device", "none") != "none"
    return here or bool(zero.get("cpu_offload"))  # its name of old, which DeepSpeed still takes
