"""The job scripts of examples/slurm, with stubs for SLURM's commands: two nodes on this machine.

Training is real. SIGUSR1 to the batch script, as SLURM sends it before the time limit, has to end
in a checkpoint and a requeue; the second start has to leave what an uninterrupted run leaves.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.forked import run_ranks
from tests.launching import PRETRAIN, REPOSITORY, Job, small_run_flags
from tests.training.test_resume import assert_same_run

STUBS = Path(__file__).parent / "stubs"
# Long enough for a signal to come in the middle, with a save and an evaluation on either side.
SCHEDULE = {"train_iters": 100, "save_interval": 40, "eval_interval": 30, "log_interval": 2}


def job(script: str, corpus: Path, folder: Path, output: Path, signals: str = "tasks") -> Job:
    """A job in its batch script. signals: see the stub of srun."""
    command = ["sbatch", f"examples/slurm/{script}.sbatch", *small_run_flags(corpus, **SCHEDULE)]
    path = os.pathsep.join([str(STUBS), str(Path(sys.executable).parent), os.environ["PATH"]])
    return Job(command, output, RUN=str(folder), PATH=path, SRUN_SIGNALS=signals)


def test_stopped_requeued_and_finished(corpus, tmp_path):
    """Stopped under torchrun, stopped again under deepspeed, then finished."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run_ranks(2, PRETRAIN, *small_run_flags(corpus, **SCHEDULE, save=whole))

    starts = (("srun_torchrun", "tasks", 2), ("deepspeed", "step", 50))
    for script, signals, iteration in starts:
        with job(script, corpus, folder, tmp_path / script, signals) as stopped:
            stopped.wait_for(f"iteration {iteration}/100")
            stopped.process.send_signal(signal.SIGUSR1)
            assert stopped.wait() == 0, stopped.text()
        assert "stopped by SIGUSR1 after iteration" in stopped.text()
        assert stopped.text().splitlines()[-1] == "scontrol: requeued job 4242"
        assert not (folder / "iter_0000100").exists()

    with job("srun_torchrun", corpus, folder, tmp_path / "last") as finished:
        assert finished.wait() == 0, finished.text()
    assert f"resuming from {folder}" in finished.text()
    assert "scontrol: requeued" not in finished.text()
    assert_same_run(folder, whole)


CANCELLED = """
srun() {  # a step that saves when it is told to end
    trap 'echo saved >"$run/stopped"; exit 143' TERM
    echo running
    while true; do sleep 0.1; done
}
source examples/slurm/common.sh
run_step training
"""


def test_a_cancelled_job_is_not_requeued(tmp_path):
    environment = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node0", "GRACE_SECONDS": "0"}
    environment |= {"RUN": str(tmp_path / "run"), "PATH": f"{STUBS}:{os.environ['PATH']}"}
    with Job(["bash", "-c", CANCELLED], tmp_path / "out", **environment) as cancelled:
        cancelled.wait_for("running")
        cancelled.process.send_signal(signal.SIGTERM)
        assert cancelled.wait() == 1
    assert cancelled.text() == "running\nsaved\n"


def test_shellcheck():
    """Every shell script of the repository, the stubs included."""
    scripts = []
    for folder in (".ci", "examples", "tests", "tools"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            shell = path.suffix in (".sh", ".sbatch") or (
                path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
            )
            scripts += [str(path.relative_to(REPOSITORY))] if shell else []
    assert {"examples/slurm/common.sh", "tests/slurm/stubs/srun", ".ci/run"} <= {*scripts}
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    subprocess.run([shellcheck, "--external-sources", *scripts], cwd=REPOSITORY, check=True)
