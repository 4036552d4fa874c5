"""Stopping on request: a signal to any rank, or the clock, ends a run after the step under way.

Schedulers announce the end of a job by a signal: SLURM sends SIGTERM, and with `--signal` SIGUSR1
some minutes before. It may reach one rank or all of them, at different moments, so the ranks agree
on it after each step, and all of them stop at the same iteration.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
CLOCK, FAILED_SAVE = 1000, 1001  # further reasons, beside the numbers of signals
_NAMES = {CLOCK: "--exit-duration-in-mins", FAILED_SAVE: "a checkpoint that was not written"}


class Stopped(Exception):
    """The run has to end here, on every rank; the message says what asked for it."""


class StopRequest:
    """Whether this run has been asked to stop; a context in which signals are such a request.

    exit_minutes: after which the clock asks, counted from the creation; None is never.
    forwarded_within: a launcher that is told to stop tells its ranks, which may have been told
        already: signals so many seconds after the first are the same request. A later one means
        it, and ends the process at once, even in the middle of a collective that never returns.
    """

    def __init__(self, exit_minutes: float | None = None, forwarded_within: float = 10.0):
        self._deadline = math.inf if exit_minutes is None else time.monotonic() + 60 * exit_minutes
        self._forwarded_within = forwarded_within
        self._reason, self._first, self._stopped = 0, 0.0, False

    def __enter__(self) -> StopRequest:
        # Python runs its signal handlers between two instructions of the main thread, never inside
        # a collective; the wake-up descriptor is written at once, and a thread reads it.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, _handled_by_thread) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._handlers.items():
            # The signal that stopped the others may still be on its way to this one.
            signal.signal(number, signal.SIG_IGN if self._stopped else handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # ends the thread

    def ask(self, reason: int) -> None:
        """Have the run end as if this process had got a signal."""
        if not self._reason:
            self._reason, self._first = reason, time.monotonic()

    def check(self, group: dist.ProcessGroup | None = None) -> None:
        """Raise Stopped on every rank if any of them has been asked.

        Called by every rank of the run at the same point. group: all of them, over gloo, so that
        nobody waits for a GPU; None where gloo is what they talk over anyway.
        """
        reason = self._reason
        if not reason and time.monotonic() >= self._deadline:
            reason = CLOCK
        reasons = torch.tensor(reason)
        dist.all_reduce(reasons, op=dist.ReduceOp.MAX, group=group)
        reason = int(reasons)
        if reason:
            self._stopped = True
            raise Stopped(_NAMES.get(reason) or signal.Signals(reason).name)

    def _listen(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._take(number)

    def _take(self, number: int) -> None:
        if not self._reason:
            self.ask(number)
        elif time.monotonic() - self._first > self._forwarded_within:
            name = signal.Signals(number).name
            message = f"error: {name} again: ending at once, nothing saved"
            print(message, file=sys.stderr, flush=True)
            os._exit(128 + number)


def _handled_by_thread(number: int, frame: object) -> None:
    """Does nothing, but that there is a handler makes Python write to the wake-up descriptor."""
