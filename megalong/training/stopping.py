"""Stop a run on request: a signal to any rank, or the clock, ends it after the step under way.

SLURM sends SIGTERM at the end of a job, and with `--signal` SIGUSR1 some minutes before; a user
presses Ctrl-C, or kills the launcher. That may reach one rank or all, at different moments, so the
ranks agree on it after each step, and all of them stop at the same iteration.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Launchers:
    """The programs that started this rank, torchrun or deepspeed, if any did. To be made early: one
    that has gone before is missed.

    A launcher that is killed leaves its ranks running. DeepSpeed's is two programs: the `deepspeed`
    command, which only waits, and on each node the launcher, the parent of the ranks.
    """

    def __init__(self) -> None:
        torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.are_deepspeed = "CROSS_RANK" in os.environ and not torchrun
        self._parent = os.getppid() if torchrun or self.are_deepspeed else None
        self._command = _parent_of(self._parent) if self.are_deepspeed else None

    @property
    def are_gone(self) -> bool:
        """Whether one of them has ended: what it had started has another parent now."""
        if self._parent is None:
            return False
        if os.getppid() != self._parent:
            return True
        return self._command is not None and _parent_of(self._parent) != self._command


def _parent_of(process: int) -> int | None:
    """The parent of a process; None where it is gone or outside of this container."""
    try:
        return psutil.Process(process).ppid() or None
    except psutil.Error:
        return None


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CLOCK, FAILED_SAVE, LAUNCHER = 1000, 1001, 1002  # further reasons, beside the numbers of signals
_NAMES = {
    CLOCK: "--exit-duration-in-mins",
    FAILED_SAVE: "a checkpoint that was not written",
    LAUNCHER: "the end of its launcher",
}
TWICE = 1.0  # seconds within which a terminal and a launcher may both deliver one Ctrl-C


class Stopped(Exception):
    """The run has to end here, on every rank; the message says what asked for it."""


class StopRequest:
    """Whether this run has been asked to stop; a context in which signals are such a request, as is
    the end of the launcher, and which `Stopped` does not leave.

    exit_minutes: after which the clock asks, counted from the creation; None is never.
    asked: signals that came before. launchers: those of this process, from as early as can be.
    forwarded_within: a launcher that is told to stop tells its ranks, which may have been told
        already: signals so many seconds after the first are the same request. A later one means
        it, and ends the process at once, even in the middle of a collective that never returns.
    """

    def __init__(
        self,
        exit_minutes: float | None = None,
        asked: Sequence[int] = (),
        forwarded_within: float = 10.0,
        launchers: Launchers | None = None,
    ):
        self._deadline = math.inf if exit_minutes is None else time.monotonic() + 60 * exit_minutes
        self._forwarded_within = forwarded_within
        self._launchers = launchers or Launchers()
        self._reason, self._first, self._stopped = 0, 0.0, False
        self._asked, self._signals = asked, set[int]()
        self._over = threading.Event()

    def __enter__(self) -> StopRequest:
        # Python runs its signal handlers between two instructions of the main thread, never inside
        # a collective; the wake-up descriptor is written at once, and a thread reads it.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {
            number: signal.signal(number, _handled_by_thread)
            for number in SIGNALS
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
        }
        for number in self._asked:  # none of them comes any more
            self.ask(number)
        threading.Thread(target=self._watch, name="launchers", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self._over.set()
        for number, handler in self._handlers.items():
            # The signal that stopped the others may still be on its way to this one.
            signal.signal(number, signal.SIG_IGN if self._stopped else handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # ends the thread
        return isinstance(error, Stopped)

    def ask(self, reason: int) -> None:
        """Have the run end as if this process had got a signal."""
        if not self._reason:
            self._reason, self._first = reason, time.monotonic()

    def check(self, group: ProcessGroup | None = None) -> None:
        """Raise Stopped on every rank if any of them has been asked.

        Called by every rank of the run at the same point. group: all of them, over gloo, so that
        nobody waits for a GPU; None where gloo is what they talk over anyway.
        """
        import torch  # not before the flags are parsed: Launchers is made before that
        import torch.distributed as dist

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
        name = signal.Signals(number).name
        self._signals.add(number)
        if not self._reason:
            self.ask(number)
            if os.environ.get("RANK", "0") == "0":
                print(f"{name}: ending after the step under way; again: at once", flush=True)
        elif self._is_meant(number):
            self._end_at_once(number)

    def _is_meant(self, number: int) -> bool:
        """Whether a further signal is a further request."""
        waited = time.monotonic() - self._first
        if signal.SIGINT in self._signals:
            # Of a first Ctrl-C DeepSpeed's launcher makes SIGTERM, for one rank after the other; of
            # a second torchrun does.
            echo = number == signal.SIGTERM and self._launchers.are_deepspeed
            return waited > TWICE and not echo
        return waited > self._forwarded_within

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            if self._launchers.are_gone:
                self.ask(LAUNCHER)

    def _end_at_once(self, number: int) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            again = f"{signal.Signals(number).name} again"
            print(f"error: {again}: ending at once, nothing saved", file=sys.stderr, flush=True)
        os._exit(128 + number)


def _handled_by_thread(number: int, frame: object) -> None:
    """Does nothing, but that there is a handler makes Python write to the wake-up descriptor."""
