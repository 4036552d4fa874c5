"""The watch over the other ranks: when one is gone or hangs, all end, and say which it was.

gloo notices the closed connection of a rank that dies; NCCL inside a node notices nothing. So each
rank keeps one connection to rank 0, which the kernel closes when the process at its end dies, and
when a whole node falls silent; rank 0 tells the others. A rank that hangs cannot say so: over the
same connections every rank reports what it does, and rank 0 looks for the one that the others wait
for; if that is rank 0 itself, the others notice its silence.

All that takes less time than PyTorch gives a process between an error of NCCL and its abort
(`set_gpu_defaults`), so that what comes first is the line that says which rank it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import linecache
import os
import secrets
import selectors
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megalong.config.run import RunConfig
from megalong.parallel.mesh import Mesh
from megalong.utils.errors import UserError, counted
from megalong.utils.torch_private import collective_counts, open_collectives, write_collectives

# Where a thread of a rank may stand as long as it likes: what is written to slow disks and to
# services, and compilers.
PATIENT = (
    "/megalong/checkpoint/", "/megalong/training/metrics.py", "/megalong/training/profiling.py",
    "/deepspeed/ops/op_builder/", "/torch/_dynamo/convert_frame.py",
    "/torch/_inductor/async_compile.py", "/torch/_inductor/compile_fx.py",
    "/torch/utils/cpp_extension.py", "/triton/backends/", "/triton/compiler/",
)  # fmt: skip
COMPUTING = 0.05  # seconds of a CPU in a second, above which a rank that trains on it computes
PACKAGE = str(Path(__file__).resolve().parent.parent)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a rank says of itself: seconds since it last moved, the collective in which it waits,
    where its main thread is, and whether a thread is where it may stay."""

    still: float
    waits_in: str = ""
    place: str = ""
    patient: bool = False


class Activity:
    """Looks at this process. It has moved if a thread is elsewhere than the last time, or if
    collectives began or ended; or if it computes on the CPU, or allocates memory of a GPU.

    axis_of_group: names of process groups -> those of their axes. interval: seconds between two
    looks; after a `pause` of some the process itself was stopped, and the time begins anew.
    """

    def __init__(self, axis_of_group: Mapping[str, str], interval: float, device: torch.device):
        self._axis_of_group, self._interval = axis_of_group, interval
        self._main: int = threading.main_thread().ident
        self._device = device
        self._mark: object = None
        self._moved = self._looked = time.monotonic()
        self._computed, self._allocations = 0.0, 0

    def look(self) -> Report:
        """What this process is doing now."""
        now, computed = time.monotonic(), self._seconds_computed()
        frames = sys._current_frames()
        stack = list(_stack(frames.pop(self._main, None)))
        frames.pop(threading.get_ident(), None)
        stacks = [stack, *(list(_stack(frame)) for _, frame in sorted(frames.items()))]
        places = [[(frame.f_code, frame.f_lasti) for frame in each] for each in stacks]
        mark = places, collective_counts()
        files = {frame.f_code.co_filename for each in stacks for frame in each}
        passed = now - self._looked
        computes = self._device.type == "cpu" and computed - self._computed > COMPUTING * passed
        if mark != self._mark or computes or passed > pause(self._interval):
            self._moved = now
        self._mark, self._looked, self._computed = mark, now, computed
        still = now - self._moved
        waits_in = self._collective(stack) if still > self._interval else ""
        # The allocator may answer only after the GPU: not to be asked where that waits for a rank.
        if still > self._interval and not waits_in and self._has_allocated():
            self._moved, still = now, 0.0
        return Report(
            still=still,
            waits_in=waits_in,
            place=_place(stack),
            patient=any(part in file for file in files for part in PATIENT),
        )

    def _seconds_computed(self) -> float:
        """CPU time of the main thread: those of gloo use some for ever."""
        if not hasattr(time, "pthread_getcpuclockid"):  # macOS
            return time.process_time()
        return time.clock_gettime(time.pthread_getcpuclockid(self._main))

    def _has_allocated(self) -> bool:
        """Whether memory of the GPU was allocated since this was asked the last time."""
        if self._device.type != "cuda":
            return False
        before = self._allocations
        stats = torch.cuda.memory_stats(self._device)
        self._allocations = stats.get("allocation.all.allocated", before)
        return self._allocations != before

    def _collective(self, stack: list[FrameType]) -> str:
        for name, group in open_collectives():
            axis = self._axis_of_group.get(group)
            return f"{name} of the {axis} axis" if axis else name
        # gloo keeps no record of what is sent from one rank to another.
        if not stack:
            return ""
        code = stack[0].f_code
        if "/torch/distributed/" in code.co_filename:
            return code.co_name
        line = linecache.getline(code.co_filename, stack[0].f_lineno)
        return "a receive" if ".wait(" in line and "/megatron/" in code.co_filename else ""


def pause(interval: float) -> float:
    """Return the seconds between two looks after which this process was held up."""
    return 3 * interval


def find_hung(seen: Mapping[str, tuple[float, Report]], limit: float) -> str | None:
    """Say who hangs: a rank that was silent for `limit` seconds, or one that stands still outside
    of any collective while another waits in one. None while a rank moves.

    seen: names of ranks -> seconds since their last report, and what that was.
    """
    if any(age < limit and report.still < limit for age, report in seen.values()):
        return None
    silent = {name: age for name, (age, _) in seen.items() if age >= limit}
    waiting = {name: r for name, (_, r) in seen.items() if r.waits_in and name not in silent}
    stuck = {
        name: report.still
        for name, (_, report) in seen.items()
        if not (name in silent or name in waiting or report.patient)
    }
    hung = silent or (stuck if waiting else {})
    if not hung:
        return None
    words = []
    for name, seconds in list(hung.items())[:4]:
        what = "gives no sign of life" if silent else "does not move"
        words.append(f"{name} {what} since {_clock(seconds)}, for {seconds:.0f} s")
        if place := seen[name][1].place:
            words[-1] += f", {'last seen ' if silent else ''}at {place}"
    if len(hung) > 4:
        words.append(f"nor do {len(hung) - 4} others")
    for name, report in list(waiting.items())[:1]:
        since = f"{report.waits_in} since {_clock(report.still)}"
        words.append(f"{name} waits in {since}, at {report.place}")
    return "; ".join(words)


def _clock(seconds_ago: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() - seconds_ago))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost frame outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(stack: list[FrameType]) -> str:
    """The innermost line that is not PyTorch's own, and the line of ours that led there."""
    pytorchs = ("/torch/", "/typing_extensions.py")
    outside = [f for f in stack if not any(part in f.f_code.co_filename for part in pytorchs)]
    ours = [frame for frame in outside if frame.f_code.co_filename.startswith(PACKAGE)]
    lines = {
        f"{'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno}"
        f" ({frame.f_code.co_name})": None
        for frame in (*outside[:1], *ours[:1])
    }
    return ", from ".join(lines)


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
    """Inside, the death of any rank ends this one too, with exit code 1; so does a rank that hangs
    for `--hang-timeout-seconds`, and then each rank that talks over NCCL leaves a record of its
    last collectives in the run folder."""
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
    """How long a rank may keep the others waiting: seconds (0 is for ever), those between two
    looks, and the folder for the last collectives of all ranks, if they are to be kept."""

    limit: float
    interval: float
    record: Path | None
    activity: Activity

    @classmethod
    def of(cls, mesh: Mesh, run: RunConfig) -> _Patience:
        interval = min(INTERVAL, run.hang_timeout_seconds / LOOKS)
        by_axis = mesh.groups_by_axis.items()
        axes = {group.group_name: axis for axis, groups in by_axis for group in groups}
        recorded = run.save is not None and dist.get_backend() == "nccl"
        record = Path(run.save) / "collectives" if recorded else None
        activity = Activity(axes, interval, mesh.device)
        return cls(run.hang_timeout_seconds, interval, record, activity)

    @property
    def until_look(self) -> float | None:
        return self.interval if self.limit else None


class _Spoke:
    """The watch of a rank other than 0: tells rank 0 who it is and what it does, and listens."""

    def __init__(self, patience: _Patience) -> None:
        self.news, self._leaving, self._patience = threading.Event(), False, patience
        address = [None]
        dist.broadcast_object_list(address, src=0)
        [(port, token)] = address
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
        self._hub.say(f"{REPORT} {json.dumps(dataclasses.astuple(report))}")
        silence = now - self._heard
        seen = {_hub_name(): (silence, Report(silence)), _name(): (0.0, report)}
        words = find_hung(seen, self._patience.limit) if report.waits_in else None
        if words and not self._leaving:
            self._end(f"{HUNG} {words}", first_hand=True)

    def _end(self, line: str, first_hand: bool) -> None:
        self.news.set()
        word, _, rest = line.partition(" ")
        # Rank 0 has said it already, unless it is the one.
        speaks = first_hand and (dist.get_rank() == 1 or os.environ.get("LOCAL_RANK", "0") == "0")
        _end(word, rest, speaks, self._patience.record)


class _Hub:
    """The watch of rank 0: one connection a rank, and a thread that hears what they say."""

    def __init__(self, patience: _Patience) -> None:
        self.news, self._leaving, self._patience = threading.Event(), False, patience
        dual = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", 0),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=dist.get_world_size(),
        )
        token = secrets.token_hex(16)
        dist.broadcast_object_list([(server.getsockname()[1], token)], src=0)
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
            self._reports[line] = time.monotonic(), Report(*json.loads(rest))
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


def _end(word: str, rest: str, speaks: bool, record: Path | None) -> None:
    """End this process because of another, and say so if it `speaks`."""
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
    message = {
        LOST: f"{rest} was lost: its process was killed, or its node is gone",
        FAILED: f"{rest} failed, see its own error",
        HUNG: f"hung: {rest}",
    }[word]
    if word == HUNG and record is not None:
        message += (
            f". `torchfrtrace --allow-incomplete-ranks {record}` shows the last collectives of each"
            " rank"
        )
    go_on = "start again with --load to go on from the last checkpoint"
    print(f"error: {message}. Ending all ranks; {go_on}", file=sys.stderr, flush=True)


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel give up a rank that falls silent, where it can be told when to."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (KEEP_ALIVE | {"TCP_USER_TIMEOUT": UNANSWERED}).items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
