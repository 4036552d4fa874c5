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
from tests.slurm.cluster import HOW_TO_INSTALL, SlurmJob, cluster, missing, wait_until
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
    stopped = (
        r"^stopped (by SIGUSR1 (before the training began|after iteration 1)|while the nodes' parts"
        r" were starting)\nrequeued: SLURM"
    )
    assert re.search(stopped, job.text(), re.MULTILINE), job.text()
    assert not job.shows_traceback(), job.text()
    assert_same_run(tmp_path / "run", whole)


def test_stopped_while_the_nodes_still_start(slurm, tmp_path):
    """SIGUSR1 ends the parts of nodes that have no trap yet, here as their BASH_ENV takes long: the
    job is requeued all the same."""
    slow = tmp_path / "slow.sh"
    slow.write_text(
        f'if [[ -n ${{SLURM_STEP_ID:-}} ]]; then >"{tmp_path}/$SLURM_NODEID"; sleep 60; fi\n'
    )
    job = slurm.submit(
        SCRIPTS / "srun_torchrun.sbatch",
        options="--nodes=2 --gpus-per-node=1 --cpus-per-task=1",
        output=tmp_path / "out",
        cwd=tmp_path,
        RUN="run",
        BASH_ENV=slow,
    )
    wait_until(lambda: all((tmp_path / node).exists() for node in "01"), 120, "no step", job.text)
    job.signal("--batch", "--signal=USR1")
    job.wait_for("\nrequeued: SLURM starts this job again")
    assert re.search("^stopped while the nodes' parts were starting\n", job.text(), re.MULTILINE)
    assert job.requeued == 1
    job.signal()


@pytest.mark.parametrize("asked", [True, False])
def test_a_step_that_ended_by_sigterm_is_requeued_only_where_the_script_was_asked(asked, tmp_path):
    """srun ends the parts of the other nodes by SIGTERM where one has failed, too: they then make
    the file that asks to stop."""
    stands_in = {
        "srun": f"""
            if [[ -n {"yes" if asked else ""!r} ]]; then kill -USR1 $PPID; sleep 1; fi
            touch "$STOP_REQUEST"
            exit 143
        """,
        "scontrol": f"""
            echo "$*" >>"{tmp_path}/said"
            if [[ $2 == hostnames ]]; then echo here; fi
            echo "JobState=RUNNING Restarts=0 "
        """,
    }
    for name, text in stands_in.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "MEGALONG": str(REPOSITORY),
        "RUN": str(tmp_path / "run"),
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "here",
    }
    script = str(SCRIPTS / "srun_torchrun.sbatch")
    done = subprocess.run(
        ["bash", script], env=environment, capture_output=True, text=True, check=False
    )
    requeued = "requeue 1\n" in (tmp_path / "said").read_text()
    stopped = (tmp_path / "run" / "stopped").exists()
    assert (done.returncode, requeued, stopped) == (
        (0, True, True) if asked else (143, False, False)
    )


def test_what_torchrun_says_of_its_own_end_is_no_traceback_of_a_run(tmp_path):
    # As torch shortens the path where its environment is below the working directory.
    where = ".venv/lib/python3.11/site-packages/torch/distributed/elastic/agent/server/api.py:1008"
    at = f"E1128 08:45:41.748000 6785 {where}] "
    later = at.replace("41.748", "42.007")
    barrier = [f"{at}Error waiting on exit barrier. Elapsed: 0.09 seconds", f"{at}Traceback (most"]
    barrier += [f"{at}torch.distributed.DistNetworkError: Failed to recv", ""]
    job = SlurmJob(None, 1, tmp_path / "out")
    for lines, shown in (
        (["saved", *barrier], False),
        ([barrier[0], "of the other node", *barrier[1:]], False),
        ([*barrier, "Traceback (most recent call last):"], True),
        ([f"{later}failed", f"{later}Traceback (most", *barrier], True),
    ):
        job.output.write_text("\n".join(lines))
        assert job.shows_traceback() == shown


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
    no_slurm = tmp_path / "bin" / "sinfo"  # a real one looks for its controller for minutes
    no_slurm.parent.mkdir()
    no_slurm.write_text("#!/bin/sh\nexit 1\n")
    no_slurm.chmod(0o755)
    environment["PATH"] = f"{no_slurm.parent}:{environment['PATH']}"
    deepspeed, preprocess = (
        str(SCRIPTS / name) for name in ("deepspeed.sbatch", "preprocess.sbatch")
    )
    said = {
        (deepspeed,): f"error: a job script: sbatch {deepspeed} ...",
        (preprocess,): f"error: a job script: sbatch --array=0-7 {preprocess} ...",
        (deepspeed, "--dry-run"): "error: --dry-run outside of a job needs a machine that can",
    }
    for command, line in said.items():
        done = subprocess.run(
            ["bash", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_a_task_that_has_nothing_to_preprocess_says_why_and_replaces_nothing(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name)
    no_slurm = tmp_path / "bin" / "scontrol"
    no_slurm.parent.mkdir()
    no_slurm.write_text("#!/bin/sh\n")
    no_slurm.chmod(0o755)
    flags = ["--tokenizer-type", "ByteTokenizer"]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(
            [str(no_slurm.parent), str(Path(sys.executable).parent), os.defpath]
        ),
        "MEGALONG": str(REPOSITORY),
        "SLURM_JOB_ID": "1",
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_COUNT": "1",
    }

    def task(pattern: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", str(SCRIPTS / "preprocess.sbatch"), *flags],
            cwd=tmp_path,
            env=environment | {"INPUT": pattern, "OUTPUT": "tokens"} | more,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    missing_files = "error: --input no*.txt: no such file, folder or match\n"
    assert task("no*.txt") == (2, missing_files)
    assert task("")[0] == 2 and task("")[1].startswith("error: set INPUT")
    code, said = task("one.txt")
    assert code == 0, said
    tokens = tmp_path / "tokens_000_text_document.bin"
    one = tokens.read_bytes()
    code, said = task("two.txt")
    assert code == 2 and "--overwrite" in said and tokens.read_bytes() == one
    code, said = task("two.txt", SLURM_RESTART_COUNT="1")
    assert code == 0 and tokens.read_bytes() != one, said


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
