"""A rank that hangs ends the job with a line that says which it is; one that takes its time not."""

import os
import signal

import pytest

from megalong.config import Config
from megalong.config.run import RunConfig
from megalong.errors import UserError
from megalong.parallel.activity import Activity, Report, find_hung
from tests.forked import run_ranks, started_ranks
from tests.launching import PRETRAIN, REPOSITORY, small_run_flags

WAITS = Report(50, "all_reduce of the data axis", "loop.py:1 (step)")
STUCK = Report(40, "", "queue.py:171 (get)")


@pytest.mark.parametrize("hung", [1, 0])
def test_a_rank_that_stands_still(corpus, hung):
    """As SIGSTOP, a debugger or a dying disk have it: not a thread of it runs."""
    flags = small_run_flags(corpus, train_iters=100_000, hang_timeout_seconds=3)
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


def test_nobody_waits_for_ranks_that_read_data():
    assert find_hung({"rank 0": (1, STUCK), "rank 1": (1, STUCK)}, 30) is None


def test_a_process_moves_while_it_computes_and_after_a_pause():
    activity = Activity({}, interval=1000)
    activity.look()
    sum(range(10**7))
    assert activity.look().still == 0
    activity = Activity({}, interval=0)
    assert [activity.look().still for _ in range(3)] == [0, 0, 0]


def test_the_time_is_half_of_that_of_a_collective():
    assert RunConfig(distributed_timeout_minutes=2).resolve().hang_timeout_seconds == 60
    for seconds in (120, -1):
        run = RunConfig(distributed_timeout_minutes=2, hang_timeout_seconds=seconds)
        with pytest.raises(UserError, match="--hang-timeout-seconds"):
            Config(run=run).resolve(1)
