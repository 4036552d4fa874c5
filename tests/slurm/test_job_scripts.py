"""The job scripts of examples/slurm under a real SLURM: two nodes on this machine.

Training is real, if small. `make slurm-check` (check.py) has every case; here is what is worth its
seconds each time.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import run_ranks
from tests.launching import PRETRAIN, REPOSITORY, small_run_flags
from tests.slurm.cluster import HOW_TO_INSTALL, cluster, missing
from tests.training.test_resume import assert_same_run

SCRIPTS = REPOSITORY / "examples" / "slurm"
SCHEDULE = {"train_iters": 60, "save_interval": 40, "eval_interval": 30, "log_interval": 2}


@pytest.fixture(scope="module")
def slurm():
    if missing():
        pytest.skip(f"{', '.join(missing())} not installed: {HOW_TO_INSTALL}")
    with cluster() as running:
        yield running


def test_stopped_requeued_and_finished(slurm, corpus, tmp_path):
    """Told to stop before its ranks listen, from a folder that is not the repository: saved,
    requeued once, and the second start leaves what an uninterrupted run leaves."""
    flags = small_run_flags(corpus, **SCHEDULE)
    job = slurm.submit(
        SCRIPTS / "srun_torchrun.sbatch",
        *flags,
        options="--nodes=2 --gpus-per-node=1 --cpus-per-task=1",
        output=tmp_path / "out",
        cwd=tmp_path,
        RUN="run",
    )
    job.wait_for_step()
    job.signal("--batch", "--signal=TERM")
    whole = tmp_path / "whole"
    run_ranks(2, PRETRAIN, *flags, "--save", whole)

    assert job.wait() == "0:0", job.text()
    assert job.requeued == 1
    stopped = r"^stopped by SIGUSR1 (before the training began|after iteration 1)\nrequeued: SLURM"
    assert re.search(stopped, job.text(), re.MULTILINE), job.text()
    assert "Traceback" not in job.text()
    assert_same_run(tmp_path / "run", whole)


def test_what_would_start_where(slurm, tmp_path):
    """Two of a node's four GPUs, and all its CPUs, whatever the job says of tasks; the launcher is
    told which GPUs."""
    job = slurm.submit(
        SCRIPTS / "deepspeed.sbatch",
        "--dry-run",
        options="--nodes=2 --gpus-per-node=2 --cpus-per-task=2 --ntasks-per-node=2 --exclusive",
        output=tmp_path / "out",
        cwd=tmp_path,
        OMP_NUM_THREADS="",
    )
    assert job.wait() == "0:0"
    for node, name in enumerate(("127.0.0.1", "127.0.0.2")):
        expected = f"node {node}, {name}: 2 ranks, 16 CPUs, OMP_NUM_THREADS=8, GPUs 0,1\n"
        assert job.text().count(expected) == 1, job.text()
    assert "--include 127.0.0.1:0,1@127.0.0.2:0,1 --no_ssh --node_rank=0 " in job.text()

    contained = slurm.submit(
        SCRIPTS / "srun_torchrun.sbatch",
        "--dry-run",
        options="--nodes=1 --gpus-per-node=0 --cpus-per-task=2",
        output=tmp_path / "contained",
        cwd=tmp_path,
        CONTAINER="/images/megalong.sif",
        CONTAINER_MOUNTS="/data:/data",
        RANKS_PER_NODE=2,
    )
    assert contained.wait() == "0:0"
    assert (
        f"apptainer exec --nv --bind {REPOSITORY}:{REPOSITORY},{tmp_path}:{tmp_path},/data:/data"
        f" --pwd {tmp_path} /images/megalong.sif torchrun --nnodes=1 --nproc-per-node=2 "
    ) in contained.text()


def test_outside_of_a_job(tmp_path):
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    script = str(SCRIPTS / "deepspeed.sbatch")
    captured = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, **captured)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: a job script: sbatch {script} ...") and not done.stdout


def test_shellcheck():
    """Every shell script of the repository."""
    scripts = []
    for folder in (".ci", "examples", "tests", "tools"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            shell = path.suffix in (".sh", ".sbatch") or (
                path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
            )
            scripts += [str(path.relative_to(REPOSITORY))] if shell else []
    assert {"examples/slurm/common.sh", "examples/slurm/deepspeed.sbatch", ".ci/run"} <= {*scripts}
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    subprocess.run([shellcheck, "--external-sources", *scripts], cwd=REPOSITORY, check=True)
