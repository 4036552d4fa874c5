"""The commands of a cell, one after the other, within its minutes, and again after a kill.

What runs a command is a generator, which yields now and then while the command runs, so that one
loop has several cells run at a time; closed, it tells the command to stop.

A training lies in OUTPUT/models/NAME: the name is made of what it is trained with, so that cells
(of other experiments, too) that differ only in what they are asked share it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from cost import Cost, stages_file
from grid import Cell, as_flags
from machine import machine

from megalong.training.metrics import read_metrics, training_records
from megalong.utils.command_line import REPOSITORY
from megalong.utils.errors import UserError
from tools.evaluate import parse_arguments as parse_evaluation

TRAINING_SHARE = 0.85  # of a cell's minutes: the rest is for the evaluation
GRACE = 120  # seconds that a command may take longer than it was told
_PR_SET_PDEATHSIG = 1


class OutOfTime(Exception):
    """The minutes are over, of what it names."""


@dataclass(frozen=True)
class Place:
    """Where everything lies, and how it runs. corpus: what corpus.sh made, for grids that need it.
    processes: of one training. seconds: the bound of a cell. environment: of all commands, beside
    this process's own. failures: by folder, why a training has failed here, so that it is not tried
    again for each cell that starts from it."""

    corpus: Path | None
    models: Path
    processes: int
    seconds: float
    environment: dict[str, str]
    failures: dict[Path, str] = field(default_factory=dict)

    @cached_property
    def corpus_digest(self) -> str | None:
        """Of what the corpus' documents and their tokens hang on."""
        if self.corpus is None:
            return None
        files = (self.corpus / name for name in ("corpus.json", "tokenizer.model"))
        return _digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])

    def words(self, command: list[str]) -> str:
        """A command as it is reported: without the paths of this machine."""
        known = {str(self.models): "MODELS", str(REPOSITORY): "."}
        if self.corpus is not None:
            known = {str(self.corpus): "CORPUS", **known}
        line = " ".join(["python", *command[1:]])
        for path, name in known.items():
            line = line.replace(path, name)
        return line


class Training:
    """The training of a cell, as far as it is. start: the one that it starts from."""

    def __init__(self, cell: Cell, cost: Cost, place: Place, start: Training | None = None):
        self.cell, self.cost, self.place, self.start = cell, cost, place, start
        self._flags = dict(cell.flags)
        if not cell.stages:
            self._flags["train_iters"] = cost.iterations
        identity = {"flags": self._flags, "data": cell.data, "processes": place.processes}
        if cell.stages:
            identity["stages"] = [cell.stages, cost.stages]
        if cell.needs_corpus:
            identity["corpus"] = place.corpus_digest
        if start is not None:
            identity["start"] = start.settings
        self.folder = place.models / _digest(identity)
        # Of all that a cell's result hangs on.
        self.settings = _digest({**identity, "evaluate": cell.evaluate})
        self.run = self.folder / "run"
        self.commands: list[list[str]] = []

    @property
    def seconds(self) -> float:
        """What it has taken until now, whenever it went on."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / "seconds.json").read_text())
        return 0.0

    @property
    def commits(self) -> list[str | None]:
        """Of the code that has trained it."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / "commits.json").read_text())
        return []

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    def curve(self) -> list[tuple[int, float]]:
        """Iterations, and the mean losses up to each since the one before."""
        with contextlib.suppress(FileNotFoundError):
            records = training_records(read_metrics(self.run / "metrics.jsonl"))
            return [(record["iteration"], record["loss"]) for record in records]
        return []

    @property
    def all_of_them(self) -> list[Training]:
        """Those that it starts from, the first one first, and itself."""
        return [*(self.start.all_of_them if self.start else []), self]

    def go_on(self, shares: dict[Path, float]) -> Generator[None]:
        """Train to the end, what it starts from before it. shares: is told, by folder, which share
        of a training is done. Raises OutOfTime, and UserError where a command fails."""
        if self.start is not None:
            yield from self.start.go_on(shares)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:  # another cell may have the same training
            while not _locked(lock):
                yield
            if self.folder in self.place.failures:
                raise UserError(self.place.failures[self.folder])
            try:
                yield from self._go_on(shares)
            except UserError as error:
                self.place.failures[self.folder] = str(error)
                raise
        shares[self.folder] = 1.0

    def _go_on(self, shares: dict[Path, float]) -> Generator[None]:
        make_data = self._make_data() if self.cell.data is not None else {}
        self.commands = [*make_data.values(), self._train(list(make_data))]
        if self.done:
            return
        if (commit := machine(gpu=False)["commit"]) not in (commits := self.commits):
            (self.folder / "commits.json").write_text(json.dumps([*commits, commit]))
        if self.cell.stages:
            file = self.folder / "stages.yaml"
            file.write_text(stages_file(self.cell.stages, self.cost.stages))
        for prefix, command in make_data.items():
            if not prefix.with_suffix(".idx").exists():
                yield from self._run(command, shares)
        yield from self._run(self.commands[-1], shares)
        if (self.run / "stopped").exists():
            raise OutOfTime(self.cell.name)
        (self.folder / "done").touch()

    def _run(self, command: list[str], shares: dict[Path, float]) -> Generator[None]:
        left = TRAINING_SHARE * self.place.seconds - self.seconds
        if left < 1:
            raise OutOfTime(self.cell.name)
        if command is self.commands[-1]:
            command = [*command, "--exit-duration-in-mins", f"{left / 60:.3f}"]
        before = self.seconds

        def on_tick(seconds: float) -> None:
            aside = self.folder / "seconds.tmp"
            aside.write_text(json.dumps(before + seconds))
            aside.replace(self.folder / "seconds.json")
            curve = self.curve()
            shares[self.folder] = curve[-1][0] / self.cost.iterations if curve else 0.0

        log = self.folder / "log.txt"
        yield from run_command(command, self.place.environment, log, left + GRACE, on_tick)

    @property
    def _tokenizer(self) -> dict[str, str]:
        """Flags: that of the corpus, if the grid has one."""
        if not self.cell.needs_corpus:
            return {}
        return {"tokenizer_model": str(self.place.corpus / "tokenizer.model")}

    def _make_data(self) -> dict[Path, list[str]]:
        """By prefix, what makes the samples of a length, of which each has as many tokens."""
        settings, tool = dict(self.cell.data), REPOSITORY / "tools" / "make_task_data.py"
        lengths = settings.pop("lengths")
        found = {}
        for length, tasks in lengths.items():
            samples = -(-self.cost.tokens // (len(lengths) * length))
            prefix = self.folder / f"samples_of_{length}"
            flags = {"tasks": tasks, "length": length, "samples": samples, "seed": self.cell.seed}
            flags |= {**settings, **self._tokenizer, "output_prefix": str(prefix)}
            found[prefix] = [sys.executable, str(tool), *as_flags(flags), "--overwrite"]
        return found

    def _train(self, prefixes: list[Path]) -> list[str]:
        """prefixes: of datasets that are blended, if not the corpus is trained on."""
        if prefixes:
            paths = [word for prefix in prefixes for word in (1, str(prefix))]
        else:
            paths = [str(self.place.corpus / "train_text_document")]
        data = {"train_data_path": paths, **self._tokenizer}
        if self.start is not None:
            data["pretrained_checkpoint"] = str(self.start.run)
        if self.cell.stages:
            data["config"] = str(self.folder / "stages.yaml")
        run = {
            "save": str(self.run),
            "load": str(self.run),
            "save_interval": max(self.cost.iterations // 8, 1),
            "keep_last": 1,
            "log_interval": max(self.cost.iterations // 100, 1),
        }
        python = [sys.executable]
        if self.place.processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone"]
            python += [f"--nproc_per_node={self.place.processes}"]
        script = str(REPOSITORY / "pretrain_longnet.py")
        return [*python, script, *as_flags({**self._flags, **data, **run})]


def evaluation_command(training: Training, folder: Path) -> list[str]:
    """What evaluates it, into the folder. Raises UserError, which names the cell, where
    tools/evaluate.py would refuse its flags."""
    cell = training.cell
    settings: dict[str, Any] = dict(cell.evaluate)
    if cell.data is None:
        settings["input"] = str(training.place.corpus / "held_out.jsonl")
    words = ["--model", str(training.run), *as_flags(settings)]
    words += ["--output", str(folder), "--overwrite"]
    try:
        parse_evaluation(words)
    except UserError as error:
        raise UserError(f"cell {cell.name}: evaluate: {error}") from None
    return [sys.executable, str(REPOSITORY / "tools" / "evaluate.py"), *words]


def evaluate(
    training: Training, folder: Path
) -> Generator[None, None, tuple[dict[str, Any], list[str], float]]:
    """Returns what tools/evaluate.py finds, its command and its seconds. Raises OutOfTime,
    UserError."""
    place, command = training.place, evaluation_command(training, folder)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    left = max(place.seconds - training.seconds, (1 - TRAINING_SHARE) * place.seconds)
    log = folder / "log.txt"
    yield from run_command(command, place.environment, log, left, lambda seconds: None)
    found = json.loads((folder / "evaluation.json").read_text())
    found.pop("model")  # a path
    return found, [*command[:-2], "EVALUATION"], time.monotonic() - start


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _locked(file: TextIO) -> bool:
    """Whether this process has the lock of a file now, which it gives back with the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_with_this_process() -> None:
    """In a child: be told to stop where the parent is killed, and can tell nobody (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_command(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    seconds: float,
    on_tick: Callable[[float], None],
) -> Generator[None]:
    """Run it to its end, its output appended to `log`. It is told to stop where this process is.
    on_tick: hears every few seconds how long it has been. Raises OutOfTime after `seconds`, and
    UserError where it fails."""
    start = told = time.monotonic()
    with log.open("a") as file:
        before = file.tell()  # of what earlier starts have said
        # Of a session of its own: Ctrl-C is for this process, which passes it on once.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=_end_with_this_process,
            env={**os.environ, **environment, "PYTHONPATH": str(REPOSITORY)},
        )
        try:
            while process.poll() is None:
                yield
                now = time.monotonic()
                if now - start > seconds:
                    raise OutOfTime(Path(command[1]).name)
                if now - told > 2:
                    told = now
                    on_tick(now - start)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # a training saves a checkpoint
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                if process.poll() is None:
                    process.kill()
            on_tick(time.monotonic() - start)
    if process.returncode:
        lines = log.read_bytes()[before:].decode(errors="replace").strip().splitlines() or [""]
        last = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
        raise UserError(
            f"{Path(command[1]).name} ended with {process.returncode}: {last}: see {log}"
        )
