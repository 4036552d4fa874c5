"""The watch over the other ranks: when one is gone, all end at once, and say which it was.

A rank that dies leaves the others in a collective that will never finish. gloo notices a closed
connection; NCCL inside a node notices nothing and waits out its time limit. So each rank keeps one
idle connection to rank 0, which the kernel closes when the process at its end dies, however it
dies, and which keep-alive probes close when a whole node falls silent. Rank 0 tells the others.

All that takes less time than PyTorch gives a process between an error of NCCL and its abort
(`gpu_environment`), so that what comes first is the line that says which rank it was.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from megalong.errors import UserError

LEAVING, FAILING = b"leaving\n", b"failing\n"
LOST = "lost"  # rank 0's news: this word and a name, or "failed" and a name
OWN_WORDS = 10.0  # seconds for a rank to say itself what another rank has failed of
KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, and probes
NEWS_BEHIND_ERROR = 3.0  # seconds in which the news of a lost rank follows a failed collective


@contextlib.contextmanager
def watch_ranks() -> Iterator[None]:
    """Inside, the death of any rank of the process group ends this one too, with exit code 1.

    A UserError carries its whole message; any other error may be the consequence of a lost rank.
    """
    if dist.get_world_size() == 1:
        yield
        return
    watch = _Hub() if dist.get_rank() == 0 else _Spoke()
    try:
        yield
    except BaseException as error:
        surprise = isinstance(error, Exception) and not isinstance(error, UserError)
        if surprise and watch.news.wait(NEWS_BEHIND_ERROR):
            threading.Event().wait()  # until the watch ends the process: a traceback adds nothing
        if surprise and "timed out" in str(error).lower():
            error.add_note(
                "A rank hangs, or is that much slower than the others: see its output, or raise"
                " --distributed-timeout-minutes. Start again with --load to go on."
            )
        watch.leave(FAILING)
        raise
    watch.leave(LEAVING)


class _Spoke:
    """The watch of a rank other than 0: tells rank 0 who it is, and listens."""

    def __init__(self) -> None:
        self.news, self._leaving = threading.Event(), False
        [(port, token)] = _shared([None])
        rank, host = dist.get_rank(), socket.gethostname()
        hub = os.environ["MASTER_ADDR"]
        try:
            self._connection = socket.create_connection((hub, port), timeout=60)
        except OSError as error:
            raise ConnectionError(
                f"rank {rank} on {host} cannot reach rank 0 at {hub}, port {port} ({error}): open"
                " the ports between the nodes, or set MASTER_ADDR to an address that they share"
            ) from error
        self._connection.settimeout(None)
        _keep_alive(self._connection)
        name = f"rank {rank} on {host} (process {os.getpid()})"
        self._connection.sendall(f"{token} {name}\n".encode())
        dist.barrier()
        threading.Thread(target=self._listen, name="rank watchdog", daemon=True).start()

    def leave(self, word: bytes) -> None:
        self._leaving = True
        with contextlib.suppress(OSError):
            self._connection.sendall(word)

    def _listen(self) -> None:
        news = b""
        with contextlib.suppress(OSError):
            while not news.endswith(b"\n") and (part := self._connection.recv(1024)):
                news += part
        if news == LEAVING or self._leaving:
            return
        self.news.set()
        # Rank 0 has said it already, unless it is the lost one.
        heard_from_hub = news.endswith(b"\n")
        word, _, name = news.decode().strip().partition(" ")
        if not heard_from_hub:
            word, name = LOST, f"rank 0 on {os.environ['MASTER_ADDR']}"
        speaks = not heard_from_hub and (dist.get_rank() == 1 or _first_of_node())
        _end(word, name, speaks)


class _Hub:
    """The watch of rank 0: one connection a rank, and a thread that sees them close."""

    def __init__(self) -> None:
        self.news, self._leaving = threading.Event(), False
        self._server = _listening_socket(backlog=dist.get_world_size())
        token = secrets.token_hex(16)
        _shared([(self._server.getsockname()[1], token)])
        self._selector = selectors.DefaultSelector()
        self._names: dict[socket.socket, str] = {}
        self._server.settimeout(60)
        while len(self._names) < dist.get_world_size() - 1:
            try:
                connection, _ = self._server.accept()
            except TimeoutError as error:
                missing = dist.get_world_size() - 1 - len(self._names)
                raise ConnectionError(
                    f"{missing} ranks did not connect to rank 0 within a minute"
                ) from error
            connection.settimeout(60)
            with contextlib.suppress(OSError), connection.makefile("r") as lines:
                told, _, name = lines.readline().strip().partition(" ")
                if secrets.compare_digest(told, token):
                    _keep_alive(connection)
                    self._names[connection] = name
                    self._selector.register(connection, selectors.EVENT_READ)
        self._server.close()
        dist.barrier()
        threading.Thread(target=self._listen, name="rank watchdog", daemon=True).start()

    def leave(self, word: bytes) -> None:
        self._leaving = True
        self._tell(LEAVING if word == LEAVING else f"failed rank 0 (process {os.getpid()})\n")

    def _tell(self, news: bytes | str) -> None:
        news = news.encode() if isinstance(news, str) else news
        for connection in list(self._names):
            with contextlib.suppress(OSError):
                connection.sendall(news)

    def _listen(self) -> None:
        while self._names:
            for key, _ in self._selector.select():
                connection: socket.socket = key.fileobj
                word = b""
                with contextlib.suppress(OSError):
                    word = connection.recv(64)
                self._selector.unregister(connection)
                name = self._names.pop(connection)
                if word == LEAVING or self._leaving:
                    continue
                outcome = "failed" if word == FAILING else LOST
                self.news.set()
                self._tell(f"{outcome} {name}\n")
                _end(outcome, name, speaks=True)


def _shared(value: list) -> list:
    """Rank 0's list, on every rank."""
    dist.broadcast_object_list(value, src=0)
    return value


def _end(word: str, name: str, speaks: bool) -> None:
    """End this process because of another; `speaks`: and say so."""
    if word == LOST:
        message = f"{name} was lost: its process was killed, or its node is gone. Ending all ranks"
    else:
        time.sleep(OWN_WORDS)
        message = f"{name} failed, see its own error. Ending all ranks"
    if speaks:
        print(
            f"error: {message}; start again with --load to go on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)


def _listening_socket(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
        )
    return socket.create_server(("", 0), backlog=backlog)


def _first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel give up a rank that falls silent, where it can be told when to."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
