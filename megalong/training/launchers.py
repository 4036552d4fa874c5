"""The programs that started this rank, torchrun or deepspeed, and whether they are still there.

A launcher that is killed leaves its ranks running. DeepSpeed's is two programs: the `deepspeed`
command, which only waits, and on each node the launcher, which is the parent of the ranks.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

COMMAND = {"deepspeed", "ds", "deepspeed.launcher.runner"}


class Launchers:
    """The launchers of this process, if it has any. To be made early: one that has gone before is
    missed.

    are_deepspeed: whether DeepSpeed's are what started it.
    """

    def __init__(self) -> None:
        self.are_deepspeed = False
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._command: int | None = None
        if "LOCAL_RANK" not in os.environ:
            return
        # A parent that has just died cannot be asked, nor one outside of this container.
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(os.getppid())
            if "deepspeed.launcher.launch" in _words(parent):
                self.are_deepspeed, self._parent = True, parent.pid
                command = parent.parent()
                if command and COMMAND & {*_words(command)}:
                    self._command = command.pid

    @property
    def are_gone(self) -> bool:
        """Whether one of them has ended: what it had started has another parent now."""
        if self._parent is None:
            return False
        if os.getppid() != self._parent:
            return True
        if self._command is None:
            return False
        try:
            return psutil.Process(self._parent).ppid() != self._command
        except psutil.Error:
            return True


def _words(process: psutil.Process) -> list[str]:
    """Its program and the first arguments, without folders."""
    try:
        return [Path(word).name for word in process.cmdline()[:5]]
    except psutil.Error:
        return []
