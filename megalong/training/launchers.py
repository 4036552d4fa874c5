"""The programs that started this rank, torchrun or deepspeed, and whether they are still there.

A launcher that is killed leaves its ranks running. DeepSpeed's is two programs: the `deepspeed`
command, which only waits, and on each node the launcher, which is the parent of the ranks.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

COMMAND = {"deepspeed", "ds", "deepspeed.launcher.runner"}


class Launchers:
    """The launchers of this process, if it has any. Made before they can have gone.

    are_deepspeed: whether DeepSpeed's are what started it.
    """

    def __init__(self) -> None:
        parent = psutil.Process(os.getppid())
        self.are_deepspeed = "deepspeed.launcher.launch" in _words(parent)
        is_launched = self.are_deepspeed or "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = parent if is_launched else None
        command = parent.parent() if self.are_deepspeed else None
        self._command = command if command and COMMAND & {*_words(command)} else None

    @property
    def are_gone(self) -> bool:
        """Whether one of them has ended: what it had started has another parent now."""
        if self._parent is None:
            return False
        if os.getppid() != self._parent.pid:
            return True
        try:
            return self._command is not None and self._parent.ppid() != self._command.pid
        except psutil.Error:
            return True


def _words(process: psutil.Process) -> list[str]:
    """Its program and the first arguments, without folders."""
    try:
        return [Path(word).name for word in process.cmdline()[:5]]
    except psutil.Error:
        return []
