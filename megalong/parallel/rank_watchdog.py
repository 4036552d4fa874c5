"""The watch over the other ranks: when one is gone or hangs, all end, and say which it was.

A rank that dies leaves the others in a collective that will never finish. gloo notices a closed
connection; NCCL inside a node notices nothing and waits out its time limit. So each rank keeps one
connection to rank 0, which the kernel closes when the process at its end dies, however it dies, and
when a whole node falls silent. Rank 0 tells the others.

Over the same connections the ranks report what they are doing (`activity`), and rank 0 looks for
the one that the others wait for; if that is rank 0 itself, the others notice its silence.

All that takes less time than PyTorch gives a process between an error of NCCL and its abort
(`set_gpu_defaults`), so that what comes first is the line that says which rank it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import selectors
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megalong.config.run import RunConfig
from megalong.parallel.activity import Activity, Report, find_hung, pause
from megalong.parallel.mesh import Mesh
from megalong.utils.errors import UserError, counted
from megalong.utils.torch_private import write_collectives

# What the ranks say, a line each: "report" and a report, "leaving" or "failing"; and rank 0 to
# them: "alive", "leaving", or the news, which is one of three words and then what is known of it.
REPORT, LEAVING, FAILING, ALIVE = "report", "leaving", "failing", "alive"
LOST, FAILED, HUNG = "lost", "failed", "hung"
OWN_WORDS = 10.0  # seconds for a rank to say itself what another rank has failed of
KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, and probes
UNANSWERED = 30_000  # milliseconds in which what was sent has to reach the other node
NEWS_BEHIND_ERROR = 3.0  # seconds in which the news of a lost rank follows a failed collective
LOOKS, INTERVAL = 10, 10.0  # looks in the time that makes a hang, and seconds between two at most


@contextlib.contextmanager
def watch_ranks(mesh: Mesh, run: RunConfig) -> Iterator[None]:
    """Inside, the death of any rank of the process group ends this one too, with exit code 1; so
    does a rank that hangs for `--hang-timeout-seconds`, and then each rank that talks over NCCL
    leaves a record of its last collectives in the run folder.

    A UserError carries its whole message; any other error may be the consequence of a lost rank.
    """
    if dist.get_world_size() == 1:
        yield
        return
    patience = _Patience.of(mesh, run)
    if mesh.is_main and patience.record is not None:
        shutil.rmtree(patience.record, ignore_errors=True)  # of an earlier hang
    watch = (_Hub if mesh.is_main else _Spoke)(patience)
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


@dataclasses.dataclass(frozen=True)
class _Patience:
    """How long a rank may keep the others waiting. limit: in seconds, 0 is for ever. interval:
    between two looks. record: folder for the last collectives of all ranks, if they are to be
    kept."""

    limit: float
    interval: float
    record: Path | None
    activity: Activity

    @classmethod
    def of(cls, mesh: Mesh, run: RunConfig) -> _Patience:
        assert run.hang_timeout_seconds is not None
        interval = min(INTERVAL, run.hang_timeout_seconds / LOOKS)
        by_axis = mesh.groups_by_axis.items()
        axes = {group.group_name: axis for axis, groups in by_axis for group in groups}
        recorded = run.save is not None and dist.get_backend() == "nccl"
        record = Path(run.save) / "collectives" if recorded else None
        activity = Activity(axes, interval, mesh.device)
        return cls(run.hang_timeout_seconds, interval, record, activity)

    @property
    def until_look(self) -> float | None:
        """How long to listen before the next look; None is for ever."""
        return self.interval if self.limit else None


class _Spoke:
    """The watch of a rank other than 0: tells rank 0 who it is and what it does, and listens."""

    def __init__(self, patience: _Patience) -> None:
        self.news, self._leaving, self._patience = threading.Event(), False, patience
        [(port, token)] = _shared([None])
        hub = os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((hub, port), timeout=60)
        except OSError as error:
            raise ConnectionError(
                f"rank {dist.get_rank()} on {socket.gethostname()} cannot reach rank 0 at {hub},"
                f" port {port} ({error}): open the ports between the nodes, or set MASTER_ADDR to"
                " an address that they share"
            ) from error
        connection.settimeout(None)
        self._hub = _Line(connection)
        self._hub.say(f"{token} {_name()}")
        dist.barrier()
        self._heard = self._looked = time.monotonic()
        threading.Thread(target=self._listen, name="rank watchdog", daemon=True).start()

    def leave(self, word: str) -> None:
        self._leaving = True
        self._hub.say(word)

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._hub.connection, selectors.EVENT_READ)
        while True:
            if selector.select(self._patience.until_look):
                self._heard = time.monotonic()
                lines = self._hub.hear()
                for line in [f"{LOST} {_hub_name()}"] if lines is None else lines:
                    if line == LEAVING or self._leaving:
                        return
                    if line != ALIVE:
                        self._end(line, first_hand=lines is None)
            if self._patience.limit:
                self._look()

    def _look(self) -> None:
        """Report, and judge rank 0 by its silence."""
        now, interval = time.monotonic(), self._patience.interval
        if now - self._looked < interval:
            return
        if now - self._looked > pause(interval):
            self._heard = now  # it is this process that was away
        self._looked = now
        report = self._patience.activity.look()
        self._hub.say(f"{REPORT} {report.to_line()}")
        silence = now - self._heard
        seen = {_hub_name(): (silence, Report(silence)), _name(): (0.0, report)}
        words = find_hung(seen, self._patience.limit) if report.waits_in else None
        if words and not self._leaving:
            self._end(f"{HUNG} {words}", first_hand=True)

    def _end(self, line: str, first_hand: bool) -> None:
        self.news.set()
        word, _, rest = line.partition(" ")
        # Rank 0 has said it already, unless it is the one.
        speaks = first_hand and (dist.get_rank() == 1 or _first_of_node())
        _end(word, rest, speaks, self._patience.record)


class _Hub:
    """The watch of rank 0: one connection a rank, and a thread that hears what they say."""

    def __init__(self, patience: _Patience) -> None:
        self.news, self._leaving, self._patience = threading.Event(), False, patience
        server = _listening_socket(backlog=dist.get_world_size())
        token = secrets.token_hex(16)
        _shared([(server.getsockname()[1], token)])
        self._selector = selectors.DefaultSelector()
        self._names: dict[_Line, str] = {}
        server.settimeout(60)
        while len(self._names) < dist.get_world_size() - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError as error:
                missing = dist.get_world_size() - 1 - len(self._names)
                raise ConnectionError(
                    f"{counted(missing, 'rank')} did not connect to rank 0 within a minute"
                ) from error
            self._welcome(connection, token)
        server.close()
        dist.barrier()
        self._looked = time.monotonic()
        # When they came, and what they are; a rank may stop before its first.
        self._reports = {line: (self._looked, Report(still=0.0)) for line in self._names}
        threading.Thread(target=self._listen, name="rank watchdog", daemon=True).start()

    def _welcome(self, connection: socket.socket, token: str) -> None:
        connection.settimeout(10)  # a rank speaks at once; anything else may knock here
        line = _Line(connection)
        words: list[str] | None = []
        while words == []:
            words = line.hear()
        told, _, name = words[0].partition(" ") if words else ("", "", "")
        if secrets.compare_digest(told.encode(), token.encode()):
            connection.settimeout(None)
            self._names[line] = name
            self._selector.register(connection, selectors.EVENT_READ, line)

    def leave(self, word: str) -> None:
        self._leaving = True
        self._tell(LEAVING if word == LEAVING else f"{FAILED} rank 0 (process {os.getpid()})")

    def _tell(self, news: str) -> None:
        for line in list(self._names):
            line.say(news)

    def _listen(self) -> None:
        while self._names:
            for key, _ in self._selector.select(self._patience.until_look):
                lines = key.data.hear()
                for words in [LOST] if lines is None else lines:
                    self._take(key.data, words)
            if self._patience.limit and not self._leaving:
                self._look()

    def _take(self, line: _Line, words: str) -> None:
        """What a rank has said, or that it is gone."""
        word, _, rest = words.partition(" ")
        if line not in self._names:  # it has left
            return
        if word == REPORT:
            self._reports[line] = time.monotonic(), Report.from_line(rest)
            return
        self._selector.unregister(line.connection)
        self._reports.pop(line, None)
        name = self._names.pop(line)
        if word != LEAVING and not self._leaving:
            self._spread(FAILED if word == FAILING else LOST, name)

    def _look(self) -> None:
        now, interval = time.monotonic(), self._patience.interval
        if now - self._looked < interval:
            return
        if now - self._looked > pause(interval):  # it is this process that was away
            self._reports = {line: (now, report) for line, (_, report) in self._reports.items()}
        self._looked = now
        self._tell(ALIVE)
        seen = {_name(): (0.0, self._patience.activity.look())}
        for line, (came, report) in self._reports.items():
            seen[self._names[line]] = now - came, report
        if words := find_hung(seen, self._patience.limit):
            self._spread(HUNG, words)

    def _spread(self, word: str, rest: str) -> None:
        self.news.set()
        record = self._patience.record
        # Before the others know: they end at once, and then a launcher kills this rank. But who
        # waits for a rank that failed has to be told before its collectives break.
        if word != FAILED:
            _say(word, rest, record)
        self._tell(f"{word} {rest}")
        _end(word, rest, word == FAILED, record)


class _Line:
    """A connection to another rank, on which both sides say lines."""

    def __init__(self, connection: socket.socket):
        self.connection, self._begun = connection, b""
        _keep_alive(connection)

    def say(self, words: str) -> None:
        with contextlib.suppress(OSError):  # who is gone is noticed by listening
            self.connection.sendall(f"{words}\n".encode())

    def hear(self) -> list[str] | None:
        """The lines that have come in full; None when the other side is gone."""
        part = b""
        with contextlib.suppress(OSError):  # of a node that falls silent it is no ConnectionError
            part = self.connection.recv(65536)
        *lines, self._begun = (self._begun + part).split(b"\n")
        return [line.decode(errors="replace") for line in lines] if part else None


def _name() -> str:
    return f"rank {dist.get_rank()} on {socket.gethostname()} (process {os.getpid()})"


def _hub_name() -> str:
    return f"rank 0 on {os.environ['MASTER_ADDR']}"


def _shared(value: list) -> list:
    """Rank 0's list, on every rank."""
    dist.broadcast_object_list(value, src=0)
    return value


def _end(word: str, rest: str, speaks: bool, record: Path | None) -> None:
    """End this process because of another; `speaks`: and say so. record: folder for this rank's
    last collectives, where another hangs."""
    if word == FAILED:
        time.sleep(OWN_WORDS)
    if speaks:
        _say(word, rest, record)
    if word == HUNG and record is not None:
        with contextlib.suppress(OSError):
            record.mkdir(exist_ok=True)
            write_collectives(record / f"rank_{dist.get_rank()}")
    os._exit(1)


def _say(word: str, rest: str, record: Path | None) -> None:
    if word == LOST:
        message = f"{rest} was lost: its process was killed, or its node is gone"
    elif word == FAILED:
        message = f"{rest} failed, see its own error"
    else:
        message = f"hung: {rest}"
        if record is not None:
            command = f"torchfrtrace --allow-incomplete-ranks {record}"
            message += f". `{command}` shows the last collectives of each rank"
    print(
        f"error: {message}. Ending all ranks; start again with --load to go on from the last"
        " checkpoint",
        file=sys.stderr,
        flush=True,
    )


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
    for option, value in (KEEP_ALIVE | {"TCP_USER_TIMEOUT": UNANSWERED}).items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
