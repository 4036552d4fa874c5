"""The port where the ranks meet: one that is free, and a look at one that was given, before
anything slow is imported.

This module needs nothing but the standard library.
"""

from __future__ import annotations

import errno
import os
import random
import socket

from megalong.errors import UserError


def check_master_port() -> None:
    """Raise UserError where MASTER_PORT is no port, or where this is rank 0 and another program
    listens there. (torchrun listens there itself.)"""
    port = os.environ.get("MASTER_PORT")
    if "RANK" not in os.environ or port is None:
        return
    if not (port.isdecimal() and int(port) < 1 << 16):
        raise UserError(f"MASTER_PORT is {port!r}: set it to the number of a free port")
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ["RANK"] != "0" or agent_listens:
        return
    with socket.socket() as probe:  # which does not listen: other ranks may be calling already
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as who listens later
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise port_is_taken(port) from error


def free_port() -> int:
    """The number of a port that no program of this machine listens on.

    It lies below those that Linux hands out to whoever asks for any port, and each call draws anew:
    hardly anybody takes it before who asked for it listens there.
    """
    draw = random.SystemRandom()  # whatever seeds are set
    while True:
        port = draw.randrange(10_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise


def port_is_taken(port: str) -> UserError:
    """What to say where another program listens on the ranks' port."""
    return UserError(
        f"port {port}, where the ranks meet, is taken, by another run perhaps: give the launcher"
        " another --master_port"
    )
