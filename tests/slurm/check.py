"""Every way in which a job of examples/slurm starts, stops and starts again, under a real SLURM.

    python -m tests.slurm.check [--cases WORDS...]        (or: make slurm-check)

prints for each case: which checkpoints the run has, how often the job was requeued, its state and
exit status, and the line that the user sees. Ends with status 1 where one is not what is due.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.launching import REPOSITORY, small_run_flags
from tests.slurm.cluster import (
    HOW_TO_INSTALL,
    NODES,
    Cluster,
    SlurmJob,
    cluster,
    missing,
    wait_until,
)

SCRIPTS = REPOSITORY / "examples" / "slurm"
TORCHRUN, DEEPSPEED = SCRIPTS / "srun_torchrun.sbatch", SCRIPTS / "deepspeed.sbatch"
ITERATIONS = 80
ONE_BY_TWO = "--nodes=1 --gpus-per-node=2 --cpus-per-task=2"
TWO_BY_ONE = "--nodes=2 --gpus-per-node=1 --cpus-per-task=1"
TWO_BY_TWO = "--nodes=2 --gpus-per-node=2 --cpus-per-task=2"
CASES: dict[str, Callable[[Story], None]] = {}


def case(name: str):
    """Enters a function into the list, by the name that the table has for it."""

    def enter(function: Callable[[Story], None]) -> Callable[[Story], None]:
        CASES[name] = function
        return function

    return enter


@dataclass
class Story:
    """One case: its job, its run, and what has to be so at its end."""

    slurm: Cluster
    folder: Path
    corpus: Path
    job: SlurmJob | None = None
    line: str = "-"
    environment: dict[str, object] = field(default_factory=dict)

    def start(
        self,
        script: Path = TORCHRUN,
        options: str = TWO_BY_ONE,
        cwd: Path = REPOSITORY,
        run: object = None,
        **changes: object,
    ) -> SlurmJob:
        """Submit a training run of a few seconds."""
        flags = {"train_iters": ITERATIONS, "log_interval": 1, "save_interval": 1000} | changes
        self.job = self.slurm.submit(
            script,
            *small_run_flags(self.corpus, **flags),
            options=options,
            output=self.folder / "out",
            cwd=cwd,
            RUN=run or self.folder / "run",
            DS_ACCELERATOR="cpu",
            OMP_NUM_THREADS=1,
            **self.environment,
        )
        return self.job

    def checkpoints(self) -> list[int]:
        """Iterations of the checkpoints of the run."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("run/iter_*[0-9]"))

    def sees(self, pattern: str) -> None:
        """The user sees a line like this, once; it goes into the table."""
        lines = [line for line in self.job.text().splitlines() if re.search(pattern, line)]
        assert len(lines) == 1, f"{len(lines)} lines like {pattern!r}:\n{self.job.text()}"
        self.line = lines[0]

    def ends(self, requeued: int, state: str = "COMPLETED", tracebacks: bool = False) -> None:
        """The job ends, was requeued so often, and stays as it is."""
        self.job.wait()
        time.sleep(1)
        assert (self.job.state, self.job.requeued) == (state, requeued), self.job.text()
        assert tracebacks or not self.job.shows_traceback(), self.job.text()

    def goes_on_and_finishes(self) -> None:
        """What was stopped has a checkpoint of where it was, starts once more, and finishes."""
        self.ends(requeued=1)
        *first, last = self.checkpoints()
        said = re.findall(r"^stopped by \w+ after iteration (\d+)$", self.job.text(), re.MULTILINE)
        assert last == ITERATIONS and first == [int(iteration) for iteration in said]
        if said:
            assert f"iter_{first[0]:07}" in resumed(self.job), self.job.text()
        else:
            assert "before the training began" in self.job.text()
        seen = [int(n) for n in re.findall(r"^iteration (\d+)/", self.job.text(), re.MULTILINE)]
        assert seen == list(range(1, ITERATIONS + 1)), seen

    def cells(self) -> list[str]:
        state = f"{self.job.state} {self.job.show('ExitCode')}"
        saved = " ".join(map(str, self.checkpoints())) or "none"
        return [saved, str(self.job.requeued), state, self.line]


def resumed(job: SlurmJob) -> str:
    return "".join(re.findall(r"^resuming from .*", job.text(), re.MULTILINE))


# Starts.


def _start(story: Story, script: Path, options: str, ranks: int, **more: object) -> None:
    story.start(script, options, train_iters=4, **more)
    story.ends(requeued=0)
    assert story.checkpoints() == [4]
    story.sees(rf"on {ranks} cpu ranks")
    story.line = re.search(rf"on {ranks} cpu ranks", story.line).group()


STARTS = {
    "start, 1 x 2 ranks, torchrun": (TORCHRUN, ONE_BY_TWO, 2),
    "start, 1 x 2 ranks, deepspeed": (DEEPSPEED, ONE_BY_TWO, 2),
    "start, 2 x 2 ranks, torchrun": (TORCHRUN, TWO_BY_TWO, 4),
    "start, 2 x 2 ranks, deepspeed": (DEEPSPEED, TWO_BY_TWO, 4),
    "--ntasks-per-node=2": (TORCHRUN, f"{TWO_BY_ONE} --ntasks-per-node=2", 2),
    "--exclusive, 2 of 4 GPUs": (TORCHRUN, f"{ONE_BY_TWO} --exclusive", 2),
}
for _name, (_script, _options, _ranks) in STARTS.items():
    case(_name)(partial(_start, script=_script, options=_options, ranks=_ranks))


@case("a copy without --exclusive, on GPUs 2 and 3")
def _(story: Story) -> None:
    """The launcher would number the GPUs from 0."""
    copy = story.folder / "mine.sbatch"
    copy.write_text(DEEPSPEED.read_text().replace("#SBATCH --exclusive\n", ""))
    story.environment["MEGALONG"] = REPOSITORY
    other = story.slurm.submit(
        "--wrap=sleep 600", options=f"--nodelist={NODES[0]} --gpus=2", output=story.folder / "other"
    )
    other.wait_for_state("RUNNING")
    _start(story, copy, f"{ONE_BY_TWO} --nodelist={NODES[0]}", 2, cwd=story.folder)
    other.signal()
    story.sees(r"Setting CUDA_VISIBLE_DEVICES=2,3")


@case("RANKS_PER_NODE=2, no GPUs")
def _(story: Story) -> None:
    story.environment["RANKS_PER_NODE"] = 2
    _start(story, TORCHRUN, "--nodes=1 --gpus-per-node=0 --cpus-per-task=2", 2)


@case("submitted from another folder")
def _(story: Story) -> None:
    _start(story, TORCHRUN, ONE_BY_TWO, 2, cwd=story.folder, run="run")


# Stopped, and to go on.


def _told(story: Story, signal: list[str], script: Path) -> None:
    story.start(script)
    story.job.wait_for("iteration 2/")
    story.job.signal(*signal)
    story.goes_on_and_finishes()
    story.sees("^requeued: ")


SIGNALS = {
    "USR1 to the script, torchrun": (["--batch", "--signal=USR1"], TORCHRUN),
    "USR1 to the step, deepspeed": (["--signal=USR1"], DEEPSPEED),
    "TERM to the script, deepspeed": (["--batch", "--signal=TERM"], DEEPSPEED),
    "TERM to the step, torchrun": (["--signal=TERM"], TORCHRUN),
}
for _name, (_signal, _script) in SIGNALS.items():
    case(_name)(partial(_told, signal=_signal, script=_script))


@case("USR1 in second 1")
def _(story: Story) -> None:
    story.start()
    story.job.wait_for_step()
    story.job.signal("--batch", "--signal=USR1")
    story.goes_on_and_finishes()
    story.sees("^requeued: ")


@case("TERM to the step in second 1")
def _(story: Story) -> None:
    """As soon as the launchers run: their ranks begin to listen seconds later."""
    story.start()
    wait_until(lambda: len(_processes(story.job, "bin/torchrun")) >= 2, 120, "no launchers")
    story.job.signal("--signal=TERM")
    story.goes_on_and_finishes()
    story.sees("^requeued: ")


def _limited(story: Story, options: str) -> None:
    story.start(
        options=f"{TWO_BY_ONE} {options}",
        train_iters=100_000,
        lr_decay_iters=100,
        log_interval=100,
    )
    story.job.wait_for("\nrequeued: ")
    story.job.wait_for("resuming from")
    wait_until(lambda: story.job.requeued == 1 and story.job.state == "RUNNING", 5, "not once")
    story.sees("^requeued: ")
    story.job.signal()
    story.ends(requeued=1, state="CANCELLED", tracebacks=True)


@case("time limit, USR1 before it")
def _(story: Story) -> None:
    _limited(story, "--time=2 --signal=B:USR1@60")


@case("time limit, no signal before it")
def _(story: Story) -> None:
    _limited(story, "--time=1 --signal=B:URG@1")


@case("preemption with GraceTime")
def _(story: Story) -> None:
    story.start()
    story.job.wait_for("iteration 2/")
    urgent = story.slurm.submit(
        "--wrap=sleep 5",
        options="--partition=high --nodes=2 --exclusive",
        output=story.folder / "urgent",
    )
    story.goes_on_and_finishes()
    assert urgent.state == "COMPLETED"
    story.sees("^preempted: ")


@case("preempted, finished in the GraceTime")
def _(story: Story) -> None:
    script = story.folder / "job.sbatch"
    script.write_text(
        f"#!/usr/bin/env bash\n#SBATCH --requeue\nset -- flag\nsource {SCRIPTS}/common.sh\n"
        "echo running\nrun_step sleep 8\n"
    )
    story.job = story.slurm.submit(
        script, options=TWO_BY_ONE, output=story.folder / "out", RUN=story.folder / "run"
    )
    story.job.wait_for("running")
    time.sleep(1)
    story.slurm.submit(
        "--wrap=sleep 1",
        options="--partition=high --nodes=2 --exclusive",
        output=story.folder / "urgent",
    )
    story.job.wait_for_state("PREEMPTED", "COMPLETED")
    time.sleep(8)  # longer than a requeued job waits
    assert story.job.requeued == 0
    story.line = "(it ends, as without a preemption)"


@case("user's scontrol requeue")
def _(story: Story) -> None:
    story.start(save_interval=10)
    story.job.wait_for("iteration 12/")
    story.slurm.run("scontrol", "requeue", story.job.number)
    story.ends(requeued=1, tracebacks=True)
    assert re.search(r"iter_00000[1-7]\d", resumed(story.job)), story.job.text()
    story.sees("^requeued already: ")


@case("node down")
def _(story: Story) -> None:
    story.start(save_interval=10)
    story.job.wait_for("iteration 12/")
    story.slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    wait_until(lambda: story.job.requeued == 1, 60, "not requeued", story.job.text)
    story.slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    story.ends(requeued=1, tracebacks=True)
    assert re.search(r"iter_00000[1-7]\d", resumed(story.job)), story.job.text()
    story.sees("^resuming from")


# Ended, and not to go on by itself.


@case("plain scancel")
def _(story: Story) -> None:
    story.start()
    story.job.wait_for("iteration 2/")
    story.job.signal()
    story.ends(requeued=0, state="CANCELLED")
    assert len(story.checkpoints()) == 1
    story.sees("^not requeued: ")


@case("saved and ended: Requeue=0, USR1")
def _(story: Story) -> None:
    story.start()
    story.job.wait_for("iteration 2/")
    story.slurm.run("scontrol", "update", f"JobId={story.job.number}", "Requeue=0")
    story.job.signal("--batch", "--signal=USR1")
    story.ends(requeued=0)
    assert len(story.checkpoints()) == 1
    story.sees("^not requeued: ")


def _rank(story: Story, rank: int, signal: str) -> None:
    """A signal to one rank, as the system or a mishap would send it."""
    process, *_ = sorted(_processes(story.job, "pretrain_longnet.py", RANK=rank), key=int)
    subprocess.run(["kill", f"-{signal}", process], check=True)


def _processes(job: SlurmJob, command: str, **environment: object) -> list[str]:
    """Numbers of the job's processes that have these in their command line and environment."""
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    wanted.add(f"SLURM_JOB_ID={job.number}".encode())
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = {*(folder / "environ").read_bytes().split(b"\0")}
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if wanted <= words and command.encode() in line:
            found.append(folder.name)
    return found


@case("kill -9 of one rank")
def _(story: Story) -> None:
    story.start(save_interval=10, train_iters=100_000, lr_decay_iters=100, log_interval=10)
    story.job.wait_for("iteration 20/")
    _rank(story, 1, "KILL")
    start = time.monotonic()
    story.ends(requeued=0, state="FAILED", tracebacks=True)
    assert time.monotonic() - start < 60 and 10 in story.checkpoints()
    story.sees("^error: rank 1 .*lost")


@case("SIGSTOP of one rank")
def _(story: Story) -> None:
    story.start(
        save_interval=10,
        train_iters=100_000,
        lr_decay_iters=100,
        log_interval=10,
        distributed_timeout_minutes=1,
        hang_timeout_seconds=15,
    )
    story.job.wait_for("iteration 20/")
    _rank(story, 1, "STOP")
    story.ends(requeued=0, state="FAILED", tracebacks=True)
    assert 10 in story.checkpoints()
    story.sees("^error: hung: rank 1 .* since ")


@case("preprocessing, array of 3")
def _(story: Story) -> None:
    """Merged as README.md says, the outputs of the tasks are that of one process."""
    flags = ["--tokenizer-type", "ByteTokenizer", "--append-eod"]
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    story.job = story.slurm.submit(
        SCRIPTS / "preprocess.sbatch",
        *flags,
        options="--array=0-2 --cpus-per-task=1",
        output=story.folder / "out-%a",
        cwd=story.folder,
        INPUT=str(files[0].parent / "*.py"),
        OUTPUT="part",
    )
    tokens = story.folder / "corpus_text_document.bin"
    wait_until(lambda: len([*story.folder.glob("part*.idx")]) == 3, 120, "tokens are missing")
    line = re.search(
        r"^python tools/merge_datasets.py .*$", (SCRIPTS / "README.md").read_text(), re.M
    )
    merge = line.group().replace("tokens/corpus", "part").replace("tools/", f"{REPOSITORY}/tools/")
    story.slurm.run("bash", "-c", merge, cwd=tokens.parent)
    tool = str(REPOSITORY / "tools" / "preprocess_data.py")
    command = [sys.executable, tool, *flags, "--output-prefix", "one", "--input", *map(str, files)]
    story.slurm.run(*command, cwd=tokens.parent)
    for suffix in (".bin", ".idx"):
        one = story.folder / f"one_text_document{suffix}"
        assert one.read_bytes() == tokens.with_suffix(suffix).read_bytes()
    story.job.wait()
    story.line = (story.folder / "out-1").read_text().splitlines()[-1]


def make_corpus(folder: Path) -> Path:
    """Prefix of a preprocessed corpus: modules of the standard library, one token a byte."""
    modules = [str(path) for path in sorted(Path(json.__file__).parent.parent.glob("*.py"))[:60]]
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--input"]
    command += [*modules, "--output-prefix", str(folder / "code"), "--append-eod"]
    command += ["--tokenizer-type", "ByteTokenizer"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "code_text_document"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[""], help="only those with one of the words")
    words = parser.parse_args().cases
    if missing():
        print(f"error: {', '.join(missing())} not installed: {HOW_TO_INSTALL}", file=sys.stderr)
        return 2
    failed = []
    chosen = {name: case for name, case in CASES.items() if any(word in name for word in words)}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, cluster() as slurm:
        corpus = make_corpus(Path(temporary))
        print("| case | checkpoints | requeued | state, exit status | line | seconds |")
        print("|---|---|---|---|---|---|", flush=True)
        for name, function in chosen.items():
            folder = Path(temporary) / str(len(list(Path(temporary).iterdir())))
            folder.mkdir()
            story, begin = Story(slurm, folder, corpus), time.monotonic()
            try:
                function(story)
                cells = story.cells()
            except (AssertionError, subprocess.CalledProcessError) as error:
                output = getattr(error, "stderr", None) or ""
                failed.append(f"== {name}\n{traceback.format_exc()}{output}")
                cells = ["FAILED", "", "", ""]
                slurm.run("scancel", "--full", "--user=" + slurm.user)
            cells = [name, *cells, f"{time.monotonic() - begin:.0f}"]
            print(f"| {' | '.join(cells)} |".replace(str(folder), ""), flush=True)
    print(
        f"{len(chosen)} cases in {(time.monotonic() - start) / 60:.1f} minutes", *failed, sep="\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
