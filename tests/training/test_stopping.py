"""A run that is asked to stop saves, ends with 0, and goes on bit for bit; a lost rank ends it."""

import os
import signal
import sys
import time

import pytest

from megalong.training import stopping
from tests.forked import run_ranks, started_ranks
from tests.launching import (
    PRETRAIN,
    Job,
    deepspeed_command,
    ranks_command,
    small_run_flags,
)
from tests.training.test_resume import assert_same_run

EARLY_RUN = __file__.replace("test_stopping", "killed_run")
ENDLESS = {"train_iters": 100_000, "lr_decay_iters": 100, "save_interval": 100_000}


def test_one_rank_is_told_and_all_stop(corpus, tmp_path):
    """By SIGUSR1 to the rank that does not keep the folder; the end waits for what is written in
    the background. How the run goes on then, and that it is the same as an uninterrupted one, is in
    tests/slurm."""
    folder = tmp_path / "run"
    flags = small_run_flags(corpus, **ENDLESS, async_save=True, save=folder, load=folder)
    with Job(ranks_command(2, PRETRAIN, *flags), tmp_path / "out") as job:
        job.wait_for("iteration 2/")
        job.rank(1).send_signal(signal.SIGUSR1)
        assert job.wait() == 0, job.text()
    *_, saved, line = job.text().splitlines()
    assert line.startswith("stopped by SIGUSR1") and f"--load {folder}" in line
    assert saved == f"saved {folder / (folder / 'latest').read_text()}"
    assert (folder / "stopped").read_text().startswith("stopped by SIGUSR1 after iteration ")
    assert (folder / "latest").exists()


def test_four_ranks_go_on_bit_for_bit(corpus, tmp_path):
    """A run on sequence- and tensor-parallel ranks, stopped by SIGTERM to one and by SIGUSR1 to
    another, is the run that nobody stopped."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    layout = {"sequence_parallel_size": 2, "tensor_model_parallel_size": 2, "train_iters": 20}

    def flags(save):
        return small_run_flags(corpus, **layout, save_interval=1000, save=save, load=save)

    for number, rank in ((signal.SIGTERM, 2), (signal.SIGUSR1, 1)):
        with started_ranks(4, PRETRAIN, *flags(folder)) as launch:
            launch.wait_for("\niteration ")
            os.kill(launch.pids[rank], number)
            assert launch.wait(240) == 0, launch.text()
            assert f"stopped by {number.name} after iteration" in launch.text()
    for save in (folder, whole):
        run_ranks(4, PRETRAIN, *flags(save))
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    "launcher, number, reason",
    [
        (ranks_command, signal.SIGINT, "SIGINT"),
        (deepspeed_command, signal.SIGTERM, "the end of its launcher"),
    ],
)
def test_the_launcher_is_told(corpus, tmp_path, launcher, number, reason):
    """torchrun has its ranks in sessions of their own, and passes Ctrl-C on; the `deepspeed`
    command dies of SIGTERM and leaves its children alone."""
    folder = tmp_path / "run"
    flags = small_run_flags(corpus, **ENDLESS, save=folder, load=folder)
    with Job(launcher(2, PRETRAIN, *flags), tmp_path / "out") as job:
        job.wait_for("iteration 2/")
        rank = job.rank(0)
        job.process.send_signal(number)
        job.wait()
        rank.wait(60)  # a process with another parent by now, perhaps
    assert f"stopped by {reason} after iteration" in job.text()
    assert (folder / "latest").exists() and (folder / "stopped").exists()


EARLY_SIGNAL = """
import os, signal
from megalong.utils.command_line import remember_requests
asked = remember_requests()
os.kill(os.getpid(), signal.SIGUSR1)
print(*asked, flush=True)
os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_signal_in_the_first_moment(corpus, tmp_path):
    """SIGUSR1 is remembered, also where a job script had ignored it; Ctrl-C has nothing to save."""
    command = ["sh", "-c", 'trap "" USR1; exec "$@"', "", sys.executable, "-c", EARLY_SIGNAL]
    with Job(command, tmp_path / "out") as job:
        assert job.wait() == -signal.SIGINT
    assert job.text() == f"{signal.SIGUSR1.value}\n"
    folder = tmp_path / "run"
    flags = small_run_flags(corpus, **ENDLESS, save=folder)
    done = run_ranks(2, EARLY_RUN, "asked", signal.SIGUSR1.value, *flags)
    line = "stopped by SIGUSR1 before the training began"
    assert done.stdout.splitlines()[-1].startswith(line)
    assert (folder / "stopped").read_text() == line + "\n"


@pytest.mark.parametrize("launcher, lost", [(ranks_command, 2), (deepspeed_command, 0)])
def test_a_killed_rank_ends_the_job(corpus, tmp_path, launcher, lost):
    flags = small_run_flags(corpus, **ENDLESS)
    with Job(launcher(4, PRETRAIN, *flags), tmp_path / "out") as job:
        job.wait_for("iteration 2/")
        others = [job.rank(rank) for rank in range(4) if rank != lost]
        start = time.monotonic()
        job.rank(lost).kill()
        assert job.wait() != 0
        assert time.monotonic() - start < 60
        assert not any(other.is_running() for other in others)
    [line] = [line for line in job.text().splitlines() if line.startswith("error: rank")]
    assert line.startswith(f"error: rank {lost} on ") and "was lost" in line and "--load" in line


def test_the_clock_stops_a_run(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, op, group: None)
    stopping.StopRequest(exit_minutes=1).check()
    with pytest.raises(stopping.Stopped, match="--exit-duration-in-mins"):
        stopping.StopRequest(exit_minutes=0).check()


SECOND_SIGNAL = """
import hashlib
from megalong.training.stopping import StopRequest
with StopRequest(forwarded_within=0.5):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, like a collective that hangs
"""


@pytest.mark.parametrize(
    "first, forwarded, last",
    [("USR1", "TERM", "TERM"), ("INT", "TERM", "INT")],
)
def test_a_second_signal_ends_at_once(tmp_path, first, forwarded, last):
    """Not one that a launcher forwards at the same moment, though."""
    first, forwarded, last = (signal.Signals[f"SIG{name}"] for name in (first, forwarded, last))
    with Job([sys.executable, "-c", SECOND_SIGNAL], tmp_path / "out") as job:
        job.wait_for("ready")
        job.process.send_signal(first)
        job.wait_for(f"{first.name}: ending after the step under way")
        job.process.send_signal(forwarded)
        time.sleep(1.1)
        assert job.process.poll() is None
        job.process.send_signal(last)
        assert job.wait(20) == 128 + last
    assert f"error: {last.name} again" in job.text()
