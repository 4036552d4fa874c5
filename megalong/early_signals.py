"""Signals that come before a run has anything to save, while it is still importing its libraries.

This module needs nothing but the standard library, and is imported before anything else.
"""

from __future__ import annotations

import signal


def remember_requests() -> list[int]:
    """From now on SIGUSR1, by which schedulers ask a run to stop, is kept in the list that this
    returns, and SIGINT ends the process at once, without a traceback.

    SIGTERM does so anyway: by it launchers end the other ranks when one has found a mistake.
    """
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell sets for background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return asked
