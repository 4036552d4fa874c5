"""A rank that hangs ends the job with a line that says which it is; one that takes its time not."""

import errno
import os
import signal
import socket
import time
from queue import Queue
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from megalong.config import Config
from megalong.config.run import RunConfig
from megalong.parallel import rank_watchdog
from megalong.parallel.rank_watchdog import Activity, Report, find_hung
from megalong.utils.errors import UserError
from tests.forked import run_ranks, started_ranks
from tests.launching import PRETRAIN, REPOSITORY, small_run_flags

CPU = torch.device("cpu")
WAITS = Report(50, "all_reduce of the data axis", "loop.py:1 (step)")
STUCK = Report(40, "", "queue.py:171 (get)")


@pytest.mark.parametrize("hung", [1, 0])
def test_a_rank_that_stands_still(corpus, hung):
    """As SIGSTOP, a debugger or a dying disk have it: not a thread of it runs."""
    limits = {"hang_timeout_seconds": 5, "distributed_timeout_minutes": 1}
    flags = small_run_flags(corpus, train_iters=100_000, **limits)
    with started_ranks(2, PRETRAIN, *flags) as launch:
        launch.wait_for("\niteration 2/")
        os.kill(launch.pids[hung], signal.SIGSTOP)
        assert launch.wait(60) == 1, launch.text()
        text = launch.text()
    [line] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: hung: rank {hung} on ") and "no sign of life since" in line
    assert f"; rank {1 - hung} on " in line and "waits in all_reduce" in line and "--load" in line


def test_a_rank_whose_main_thread_hangs():
    done = run_ranks(2, str(REPOSITORY / "tests/parallel/hanging_worker.py"), check=False)
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: hung: rank 1 on ") and "does not move since" in line
    assert "(wait_for_a_disk)" in line and "waits in all_reduce of the data axis" in line


def test_who_hangs():
    def hung(**seen):
        return find_hung({name.replace("_", " "): told for name, told in seen.items()}, 30)

    assert hung(rank_0=(1, WAITS), rank_1=(45, Report(0, "", "a.py:1 (f)"))).startswith(
        "rank 1 gives no sign of life since "
    )
    words = hung(rank_0=(1, WAITS), rank_1=(1, STUCK), rank_2=(1, WAITS))
    assert words.startswith("rank 1 does not move since ")
    assert words.count(";") == 1 and "; rank 0 waits in all_reduce of the data axis since " in words


@pytest.mark.parametrize(
    "others",
    [
        Report(5, "", "matmul.py:1 (f)"),  # computes
        Report(5, "all_reduce", "loop.py:1 (f)"),  # has just begun to wait
        Report(500, "", "writing.py:1 (f)", patient=True),  # saves, or compiles
        Report(500, "all_reduce", "loop.py:1 (f)"),  # waits too: a network that is slow, say
    ],
)
def test_who_does_not_hang(others):
    assert find_hung({"rank 0": (1, WAITS), "rank 1": (1, others)}, 30) is None


def stills(activity, *doings):
    """Seconds since it last moved, by looks from one line, each after one of these."""
    return [(doing(), activity.look())[1].still for doing in doings]


def rest():
    time.sleep(0.3)


def test_a_process_moves_while_it_computes_and_after_a_pause():
    activity = Activity({}, 1000, CPU)
    _, idle, busy = stills(activity, rest, rest, lambda: sum(range(3 * 10**7)))
    assert idle > 0.2 and busy == 0
    assert stills(Activity({}, 0, CPU), rest, rest, rest) == [0, 0, 0]


@pytest.mark.parametrize("waits_for", ["", "all_reduce"])
def test_a_rank_that_allocates_on_its_gpu_moves(monkeypatch, waits_for):
    """While it waits for another, the allocator is left alone: its lock may be held until then."""
    counts = iter([5, 5, 6])
    monkeypatch.setattr(
        torch.cuda, "memory_stats", lambda _: {"allocation.all.allocated": next(counts)}
    )
    monkeypatch.setattr(Activity, "_collective", lambda *_: waits_for)
    monkeypatch.setattr("megalong.parallel.rank_watchdog.pause", lambda _: 1000)
    activity = Activity({}, 0.2, torch.device("cuda", 3))
    _, first, same, more = stills(activity, rest, rest, rest, rest)
    assert (first > 0, same > 0, more > 0) == ((True,) * 3 if waits_for else (False, True, False))


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ECONNRESET])
def test_a_node_that_falls_silent_is_gone(number):
    connection = Mock(recv=Mock(side_effect=OSError(number, "")))
    assert rank_watchdog._Line(connection).hear() is None


def test_a_rank_that_says_who_it_is_and_then_nothing(monkeypatch):
    """It stopped before its first report; and what else connects is no rank."""
    ended, connections = Queue(), []

    def connect(values, src):
        [(port, token)] = values
        for words in (b"GET /", b"\xff\x00", f"{token} rank 1 on node (process 7)".encode()):
            connections.append(socket.create_connection(("localhost", port)))
            connections[-1].sendall(words + b"\n")

    group = {"broadcast_object_list": connect, "get_world_size": lambda: 2, "get_rank": lambda: 0}
    monkeypatch.setattr(rank_watchdog, "dist", SimpleNamespace(barrier=lambda: None, **group))
    monkeypatch.setattr(rank_watchdog, "_end", lambda *words: ended.put(words))
    activity = SimpleNamespace(look=lambda: WAITS)
    rank_watchdog._Hub(rank_watchdog._Patience(0.5, 0.05, None, activity))
    word, rest, *_ = ended.get(timeout=60)
    assert word == "hung" and rest.startswith("rank 1 on node (process 7) gives no sign of life")
    for connection in connections:
        connection.close()  # ends the watch
    while ended.get(timeout=60)[0] != "lost":
        pass


def test_the_time_is_half_of_that_of_a_collective():
    assert RunConfig(distributed_timeout_minutes=2).resolve().hang_timeout_seconds == 60
    for seconds in (120, -1):
        run = RunConfig(distributed_timeout_minutes=2, hang_timeout_seconds=seconds)
        with pytest.raises(UserError, match="--hang-timeout-seconds"):
            Config(run=run).resolve(1)
