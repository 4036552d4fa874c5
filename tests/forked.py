"""Ranks that start at once: forked from a process that has imported everything already.

Importing torch, Megatron-core and DeepSpeed takes seconds, and the tests start hundreds of ranks.
`run_ranks` does what `torchrun` does for the ranks of one machine, and they are processes like any
other. `run_on_fake_gpu` starts a process that has been given a GPU that is not there, which has to
come before torch. Tests of what a launcher does use the real ones (`tests.launching`).
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megalong.utils.machine import free_port

REPOSITORY = Path(__file__).resolve().parent.parent


def run_ranks(ranks: int, script: str, *arguments: object, timeout=300.0, check=True):
    """Run a script on this many ranks to its end; what it printed, and the first exit code that is
    not 0. Ranks that still run when one has failed are killed. One rank is a process that no
    launcher started, as with plain `python`."""
    with started_ranks(ranks, script, *arguments) as launch:
        return _ended(launch, timeout, check, f"{ranks} ranks of {script}")


def run_on_fake_gpu(script: str, *arguments: object, timeout=900.0):
    """Run a script to its end in a process with a fake GPU (`megalong.dry_run.fake_device`); what
    it printed."""
    with _started(_server(fake_gpu=True), 1, script, arguments) as launch:
        return _ended(launch, timeout, True, f"{script} on a fake GPU")


def _ended(launch: "Launch", timeout: float, check: bool, what: str):
    code, text = launch.wait(timeout), launch.text()
    assert code == 0 or not check, f"{what} ended with {code}\n{text}"
    return subprocess.CompletedProcess(what, code, text, "")


def started_ranks(ranks: int, script: str, *arguments: object):
    """Ranks under way, as `run_ranks` starts them; at the end of the block none is left alive."""
    return _started(_server(), ranks, script, arguments)


@contextlib.contextmanager
def _started(server: "_Server", ranks, script, arguments) -> Iterator["Launch"]:
    with tempfile.TemporaryDirectory() as folder:
        launch = server.launch(ranks, script, list(map(str, arguments)), Path(folder, "output"))
        try:
            yield launch
        finally:
            launch.kill()
            launch.wait(30)


class Launch:
    """Ranks under way. pids: in their order. output: the file with all that they print."""

    def __init__(self, server: "_Server", pids: list[int], output: Path):
        self.server, self.pids, self.output = server, pids, output
        self.code: int | None = None

    def wait(self, timeout: float) -> int:
        """The first exit code that was not 0 (of a signal: negative), or 0."""
        if self.code is None:
            self.code = self.server.answer(timeout, self.output)
        return self.code

    def text(self) -> str:
        """What they have printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, words: str, timeout: float = 120.0) -> None:
        """Wait until they have printed these words."""
        deadline = time.monotonic() + timeout
        while words not in self.text():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL to all of them, and to what they have started."""
        for pid in self.pids if self.code is None else []:
            for kill in (os.kill, os.killpg):  # a rank that has just begun leads no group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)


class _Server:
    """This side of the process that forks, which takes one launch after the other."""

    def __init__(self, *options: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # `select` knows nothing of what a buffer holds
        )
        self.under_way: Launch | None = None
        # As `fake_device.pretend` has set it there, whatever these tests themselves run on.
        self.settings = {"DS_ACCELERATOR": "cuda"} if options else {}

    def launch(self, ranks: int, script: str, arguments: list[str], output: Path) -> Launch:
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **self.settings,
        }
        assert self.under_way is None or self.under_way.code is not None, "one launch at a time"
        order = [ranks, script, arguments, str(output), environment]
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.under_way = Launch(self, self.answer(300, output), output)
        return self.under_way

    def answer(self, timeout: float, output: Path):
        """The next line that the process says. AssertionError where it takes too long."""
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        assert ready, f"nothing after {timeout} s\n{output.exists() and output.read_text()}"
        return json.loads(self.process.stdout.readline())


@cache
def _server(fake_gpu: bool = False) -> _Server:
    # Ends when its standard input does, with this process.
    return _Server(*["fake-gpu"] * fake_gpu)


def _serve(*options: str) -> None:
    """Fork ranks as told; answer with their process ids, and at their end with an exit code."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if options == ("fake-gpu",):
        from megalong.dry_run import fake_device

        fake_device.load()
        import torch  # noqa: F401

        fake_device.pretend()
    import deepspeed  # noqa: F401
    import megatron.core.models.gpt  # noqa: F401

    import megalong.training.loop  # noqa: F401

    _share_gloo_device()
    gc.freeze()  # the ranks' collections need not look at all that is imported, nor copy its pages

    for line in sys.stdin:
        ranks, *order = json.loads(line)
        pids = []
        for rank in range(ranks):
            pids.append(os.fork())
            if pids[-1] == 0:
                answers.close()
                return _become_rank(rank, ranks, *order)
        print(json.dumps(pids), file=answers, flush=True)
        print(_first_failure(pids), file=answers, flush=True)


def _end_with_parent() -> None:
    """SIGKILL to this process when its parent has ended, however that was: ranks whose tests were
    killed would wait for each other for ever, and take the time of what runs then."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _share_gloo_device() -> None:
    """One gloo device for all process groups of a rank. Each has its own else, with a thread that
    wakes 100 times a second, and a mesh has some forty groups."""
    from torch.distributed import ProcessGroupGloo

    create, devices = ProcessGroupGloo.__init__, []

    def create_on_one_device(self, store, rank, size, timeout, **more):
        if not devices:
            devices.append(ProcessGroupGloo.create_default_device())
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = devices, timeout
        for name, value in more.items():
            setattr(options, name, value)
        create(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = create_on_one_device


def _become_rank(rank, ranks, script, arguments, output, environment) -> None:
    _end_with_parent()
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    if ranks > 1:
        for scope in ("", "LOCAL_"):
            os.environ |= {f"{scope}RANK": str(rank), f"{scope}WORLD_SIZE": str(ranks)}
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target in (1, 2):
        os.dup2(file, target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import numpy

    random.seed()
    numpy.random.seed()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int | None) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # without taking all modules down, which takes another second


def _first_failure(pids: list[int]) -> int:
    left, failure = set(pids), 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failure:
            failure = code
            for other in left:
                os.kill(other, signal.SIGKILL)
    return failure


if __name__ == "__main__":
    _serve(*sys.argv[1:])
