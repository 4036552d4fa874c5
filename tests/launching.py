"""Start real processes: a script on several ranks, or a training run."""

import contextlib
import fcntl
import io
import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import psutil

from megalong.utils.machine import free_port

REPOSITORY = Path(__file__).resolve().parent.parent
PRETRAIN = str(REPOSITORY / "pretrain_longnet.py")


def ranks_command(ranks: int, script: str, *arguments: object) -> list[str]:
    """The command that runs a script on this many ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={ranks}"]
    return [*launcher, script, *map(str, arguments)]


def run(command: list[str], timeout: float = 300, check: bool = True):
    """Run a command to its end; on failure the assertion shows what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def run_here(script: Path, *arguments: object, check: bool = True):
    """As `run`, a Python script, in this process, which has imported what it needs."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    argv = [str(script), *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    if check:
        assert code == 0, f"{argv}\n{out.getvalue()}\n{errors.getvalue()}"
    return subprocess.CompletedProcess(argv, code, out.getvalue(), errors.getvalue())


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A file that `make` writes once for all of pytest's worker processes; the others wait."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path, aside = folder / name, folder / f"{name}.tmp"
    failed = folder / f"{name}.failed"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not failed.exists(), f"{name} could not be made, see the first test that wanted it"
        if not path.exists():
            try:
                make(aside)
            except BaseException:
                failed.touch()  # so that nobody waits for the same failure again
                raise
            aside.rename(path)
    return path


def small_run_flags(corpus: Path, **changes: object) -> list[str]:
    """Flags of a training run that takes a second: two layers, 128 tokens, three branches."""
    flags = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 128,
        "segment_lengths": "32 64 128",
        "dilation_rates": "1 2 3",
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 6,
        "lr": 3e-3,
        "lr_warmup_iters": 2,
        "precision": "fp32",
        "data_path": corpus,
        "tokenizer_type": "ByteTokenizer",
        "split": "80,15,5",
        "eval_iters": 1,
    } | changes
    words = []
    for name, value in flags.items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else str(value).split()
    return words


def deepspeed_command(ranks: int, script: str, *arguments: object) -> list[str]:
    """The command that starts a script on this many ranks by the deepspeed launcher."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(free_port())]
    return [*launcher, script, *map(str, arguments)]


class Job:
    """A launcher in the background: its output, and its ranks as processes of this machine.

    A context, at the end of which nothing of it is left alive.
    """

    def __init__(self, command: list[str], output: Path, **environment: str):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for member in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.kill()
        self.process.wait()

    def rank(self, rank: int) -> psutil.Process:
        """The process of one rank, which has to be running."""
        for member in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if member.environ().get("RANK") == str(rank) and PRETRAIN in member.cmdline():
                    return member
        raise LookupError(f"no rank {rank}\n{self.text()}")

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, words: str, timeout: float = 240) -> None:
        """Wait until the output has these words."""
        deadline = time.monotonic() + timeout
        while words not in self.text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def wait(self, timeout: float = 240) -> int:
        """The exit code, when the launcher has ended."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running\n{self.text()}") from None

    def _family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
