"""A real SLURM on this machine: two nodes with four GPUs that are not there, on loopback only.

Its daemons (munged, slurmctld, two slurmd) are children of this process, without systemd, and what
they write lies in one temporary folder. By itself, to try job scripts by hand:

    python -m tests.slurm.cluster

starts a shell in which sbatch, squeue, scancel and the others speak to it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megalong.utils.machine import free_port
from tests.launching import REPOSITORY

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
HOW_TO_INSTALL = "apt-get install --no-install-recommends slurm-wlm munge"
# Names that are addresses, so that they resolve everywhere; slurmd takes them.
NODES = ("127.0.0.1", "127.0.0.2")

# Jobs in the partition "low" are preempted by those in "high". A requeued job starts again after
# cred_expire seconds, 120 by default. Without cgroups, which a container may not have.
SLURM_CONF = """
ClusterName=megalong
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_delay}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait={kill_wait}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={node_names} NodeHostname=localhost NodeAddr={node_names} Port=[{node_ports}] CPUs=16 \
    RealMemory=1000 Gres=gpu:4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The commands that are not installed, of those that a cluster needs."""
    return [name for name in NEEDED if shutil.which(name, path=_path()) is None]


class Cluster:
    """A context in which the cluster runs. folder: an empty one for all that it writes.

    environment: for commands that are to speak to it.
    """

    def __init__(self, folder: Path, kill_wait: int = 30, requeue_delay: int = 5):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), _path()]),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
        }
        self.user = getpass.getuser()
        self._daemons: list[subprocess.Popen] = []
        self._settings = {"kill_wait": kill_wait, "requeue_delay": requeue_delay}

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as undo:
            undo.callback(self._end)
            self._configure()
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--full", f"--user={self.user}")
            wait_until(lambda: not self.run("squeue", "--noheader"), 30, "jobs are left")
        self._end()

    def run(self, *command: object, **options: object) -> str:
        """What a command prints. Raises CalledProcessError where it fails."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words,
            **{"env": self.environment, "capture_output": True, "text": True, "check": True}
            | options,
        )
        return done.stdout

    def submit(
        self, script: object, *flags: object, options: str = "", output: Path, **more: object
    ) -> SlurmJob:
        """A job of one of the scripts of examples/slurm, or of any other file, in the queue.

        options: of sbatch. more: cwd, and what else subprocess.run takes; the rest is environment.
        """
        cwd = more.pop("cwd", REPOSITORY)
        environment = self.environment | {name: str(value) for name, value in more.items()}
        command = ["sbatch", "--parsable", "--account=nobody", "--partition=low", "--time=10"]
        command += [f"--output={output}", *options.split(), script, *flags]
        number = self.run(*command, env=environment, cwd=cwd)
        return SlurmJob(self, int(number), output)

    def _configure(self) -> None:
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(64))
        configuration = SLURM_CONF.format(
            folder=self.folder,
            user=self.user,
            controller_port=free_port(),
            node_names=",".join(NODES),
            node_ports=",".join(str(free_port()) for _ in NODES),
            **self._settings,
        )
        (self.folder / "slurm.conf").write_text(configuration)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        # Any character devices do; nothing opens them.
        devices = ("null", "zero", "full", "random")
        gpus = "".join(f"Name=gpu File=/dev/{device}\n" for device in devices)
        (self.folder / "gres.conf").write_text(gpus)

    def _start(self) -> None:
        at = {name: self.folder / f"munge.{name}" for name in ("key", "socket", "log", "seed")}
        munge = [f"--{name}-file={at[name]}" for name in ("key", "log", "seed")]
        munge += [f"--socket={at['socket']}", f"--pid-file={self.folder}/munge.pid"]
        self._daemon("munged", "--foreground", "--force", *munge)
        wait_until(at["socket"].exists, 20, "munged did not start")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-c", "-N", node)

        def ready() -> bool:
            try:
                return self.run("sinfo", "--noheader", "--format=%T", "--partition=low") == "idle\n"
            except subprocess.CalledProcessError:
                return False

        wait_until(ready, 60, "slurmctld or slurmd did not start", self._logs)

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            )

    def _end(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _logs(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self.folder.glob("*.log")))


class SlurmJob:
    """A job by its number. output: the file that it writes, over all its starts."""

    def __init__(self, cluster: Cluster, number: int, output: Path):
        self.cluster, self.number, self.output = cluster, number, output

    def show(self, field: str) -> str:
        """A field of `scontrol show job`."""
        text = self.cluster.run("scontrol", "show", "job", self.number)
        match = re.search(rf"(?:^|\s){field}=(\S*)", text)
        assert match is not None, text
        return match.group(1)

    @property
    def state(self) -> str:
        """RUNNING, COMPLETED, ..."""
        return self.show("JobState")

    @property
    def requeued(self) -> int:
        """How often the job was requeued."""
        return int(self.show("Restarts"))

    def signal(self, *options: str) -> None:
        """scancel, with these options."""
        self.cluster.run("scancel", *options, self.number)

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def shows_traceback(self) -> bool:
        """Whether there is one in the output, but for that of torchrun's barrier at the end of a
        run, at which the node that keeps its store does not wait until the others are through."""
        barrier = r"^(E.*\btorch/distributed/elastic/agent/server/api\.py:\d+\] )Error waiting on "
        # Its lines begin with its time and process; those of others may come between them.
        own = tuple(re.findall(barrier, self.text(), re.MULTILINE))
        lines = self.text().splitlines()
        return any("Traceback" in line and not line.startswith(own) for line in lines)

    def wait_for(self, words: str, times: int = 1, timeout: float = 300) -> None:
        """Wait until the output has these words so often."""
        message = f"no {words!r} of job {self.number}"
        wait_until(lambda: self.text().count(words) >= times, timeout, message, self.text)

    def wait_for_state(self, *states: str, timeout: float = 300) -> None:
        message = f"job {self.number} did not become {' or '.join(states)}"
        wait_until(lambda: self.state in states, timeout, message, self._tell)

    def wait_for_step(self) -> None:
        """Wait until the job has begun to start its ranks: they take seconds to listen."""
        step = f"StepId={self.number}.0"
        wait_until(lambda: step in self.cluster.run("scontrol", "show", "step"), 120, "no " + step)

    def wait(self, timeout: float = 400) -> str:
        """The exit status, CODE:SIGNAL, when the job has ended and is not to start again."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED")
        self.wait_for_state(*ends, timeout=timeout)
        return self.show("ExitCode")

    def _tell(self) -> str:
        return f"{self.cluster.run('scontrol', 'show', 'job', self.number)}\n{self.text()}"


def wait_until(
    ready: Callable[[], bool], timeout: float, message: str, more: Callable[[], str] = str
) -> None:
    """Wait for `ready`. Raises AssertionError with the message, and what `more` says, at the end
    of so many seconds."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, f"{message}\n{more()}"
        time.sleep(0.1)


@contextlib.contextmanager
def cluster(**settings: int) -> Iterator[Cluster]:
    """A cluster in a temporary folder of its own; settings as for Cluster."""
    # Not below pytest's folder: the path of a socket may have a hundred characters.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder,
        Cluster(Path(folder), **settings) as running,
    ):
        yield running


def _path() -> str:
    """PATH, with the folders of daemons."""
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def main() -> None:
    if missing():
        sys.exit(f"error: {', '.join(missing())} not installed: {HOW_TO_INSTALL}")
    with cluster(requeue_delay=10) as running:
        print("A cluster of two nodes until this shell ends. Its partitions are low and high.")
        subprocess.run([os.environ.get("SHELL", "bash")], env=running.environment, check=False)


if __name__ == "__main__":
    main()
