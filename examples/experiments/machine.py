"""What a cell ran on: processor, device, versions, commit."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megalong.utils.command_line import REPOSITORY

_PACKAGES = ("torch", "triton", "deepspeed", "megatron-core")


def machine(gpu: bool) -> dict[str, Any]:
    """For JSON. gpu: whether one is used, where there is one.

    commit: with "+" behind it where tracked files were changed, None outside of a clone of git.
    """
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), **_of_this_process(gpu)}


@cache
def _of_this_process(gpu: bool) -> dict[str, Any]:
    return {
        "machine": {
            "processor": _processor(),
            "processors": processors(),
            "device": _gpu() if gpu else None,
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def _gpu() -> str | None:
    """The first that may be used."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    return (
        _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").partition("\n")[0]
        or None
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _commit() -> str | None:
    commit = _output("git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    status = ["status", "--porcelain", "--untracked-files=no"]
    return commit + ("+" if _output("git", "-C", str(REPOSITORY), *status) else "")


def _output(*command: str) -> str:
    """What it prints; empty where it cannot run."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            return done.stdout.strip()
    return ""
