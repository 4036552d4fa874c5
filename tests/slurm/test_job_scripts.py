"""The job scripts of examples/slurm, with stubs for SLURM's commands: two nodes on this machine.

Training is real. SIGUSR1 to the batch script, as SLURM sends it before the time limit, has to end
in a checkpoint and a requeue; the second start has to leave what an uninterrupted run leaves.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.launching import PRETRAIN, REPOSITORY, Job, ranks_command, run, small_run_flags
from tests.training.test_resume import assert_same_run

STUBS = Path(__file__).parent / "stubs"
# Long enough for a signal to come in the middle, with a save and an evaluation on either side.
SCHEDULE = {"train_iters": 100, "save_interval": 40, "eval_interval": 30, "log_interval": 2}


def job(script: str, corpus: Path, folder: Path, output: Path) -> Job:
    command = ["sbatch", f"examples/slurm/{script}.sbatch", *small_run_flags(corpus, **SCHEDULE)]
    path = os.pathsep.join([str(STUBS), str(Path(sys.executable).parent), os.environ["PATH"]])
    return Job(command, output, RUN=str(folder), PATH=path)


def test_stopped_requeued_and_finished(corpus, tmp_path):
    """Stopped under torchrun, stopped again under deepspeed, then finished."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(ranks_command(2, PRETRAIN, *small_run_flags(corpus, **SCHEDULE, save=whole)))

    for script, iteration in (("srun_torchrun", 2), ("deepspeed", 50)):
        with job(script, corpus, folder, tmp_path / script) as stopped:
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


def test_shellcheck():
    """Every shell script of the repository, the stubs included."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True)
    scripts = []
    for name in listed.split("\0")[:-1]:
        path = REPOSITORY / name
        with path.open("rb") as file:
            if path.suffix in (".sh", ".sbatch") or file.readline().rstrip().endswith(b"bash"):
                scripts.append(name)
    assert {"examples/slurm/common.sh", "tests/slurm/stubs/srun", ".ci/run"} <= {*scripts}
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    subprocess.run([shellcheck, "--external-sources", *scripts], cwd=REPOSITORY, check=True)
