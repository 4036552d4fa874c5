"""The run folder: opened by one run at a time, and never taken over by another by accident.

flags.yaml     what was given on the command line, and the defaults; --config starts a like run
config.yaml    the resolved configuration: what ran, of the last stage that did
stopped        there while the run waits to be started again: it was asked to stop, and did
metrics.jsonl, tensorboard/: see metrics.py; profile/: see profiling.py; the checkpoints, and
`best`, a link to that of the lowest validation loss: see megalong/checkpoint
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megalong.checkpoint.folder import best, checkpoint_folder, has_pointer, iteration_of, link_best
from megalong.checkpoint.writing import Saver
from megalong.config import Config
from megalong.config.arguments import to_yaml
from megalong.training.evaluation import Evaluation
from megalong.training.metrics import read_metrics
from megalong.utils.errors import UserError, system_errors_of
from megalong.utils.files import writable_folder


def prepare_run_folder(config: Config) -> None:
    """Make the folders of `--save` and `--tensorboard-dir`. Raises UserError where that fails, or
    where `--save` holds a run that `--load` does not name."""
    run = config.run
    for flag, folder in (("--save", run.save), ("--tensorboard-dir", run.tensorboard_dir)):
        if folder is not None:
            writable_folder(flag, Path(folder))
    if run.save is None or same_folder(run.load, run.save):
        return
    folder = Path(run.save)
    if has_pointer(folder) or (folder / "metrics.jsonl").exists():
        go_on = f"--load {run.save} to go on with it"
        if run.finetune:
            go_on += f", with --pretrained-checkpoint {run.load} in the place of --finetune"
        raise UserError(f"--save {run.save} holds another run already: {go_on}, or save elsewhere")


def same_folder(one: str | None, other: str | None) -> bool:
    """Whether two paths are given and name one folder."""
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def open_run_folder(config: Config, flags: str) -> IO[str] | None:
    """Take the folder of `--save` and write down the configuration; by the main process only.

    flags: the YAML text that starts a like run. Returns the locked file, to be kept open as long as
    the run lasts. Raises UserError while another run holds the folder.
    """
    if config.run.save is None:
        return None
    folder = Path(config.run.save)
    with system_errors_of("--save", folder):
        lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"--save {folder}: another run is writing there") from None
        except OSError:
            pass  # some network file systems have no locks
        (folder / "flags.yaml").write_text(flags)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "stopped").unlink(missing_ok=True)
    return lock


def leave_unfinished(config: Config, why: str) -> None:
    """Leave the file `stopped`, by which a job script knows that the run is to be started again."""
    with system_errors_of("--save", config.run.save):
        (Path(config.run.save) / "stopped").write_text(why + "\n")


class BestCheckpoint:
    """The best so far of a run folder, or of a stage, which begins after iteration `since`: what
    was evaluated before it may have been other sequences. Every rank has one.

    split: the held-out set that decides.
    """

    def __init__(
        self,
        run: Path,
        saver: Saver,
        say: Callable[[str], None],
        split: str = "validation",
        since: int = 0,
        stage: str | None = None,
    ):
        self._run, self._saver, self._say, self._split = run, saver, say, split
        self._best = "the best so far" if stage is None else f"the best of stage {stage} so far"
        found = [_earlier(run, split, since) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        self._loss_and_tokens = found[0]

    def evaluated(self, iteration: int, split: str, result: Evaluation) -> None:
        """Compare the loss of a checkpoint; called by every rank. What was evaluated on another
        number of tokens counts no more; what is not finite never does."""
        if split != self._split or not math.isfinite(result.loss):
            return
        words = self._best
        if self._loss_and_tokens is not None:
            loss, tokens = self._loss_and_tokens
            if result.tokens == tokens and result.loss >= loss:
                return
            if result.tokens != tokens:
                words += f" on {result.tokens:,} tokens; those before were evaluated on {tokens:,}"
        self._loss_and_tokens = result.loss, result.tokens
        self._saver.wait()  # until it is on the disk
        if dist.get_rank() == 0:
            checkpoint = checkpoint_folder(self._run, iteration)
            with system_errors_of("--save", self._run):
                link_best(checkpoint)
            self._say(f"{checkpoint} is {words}")


def _earlier(run: Path, split: str, since: int) -> tuple[float, int] | None:
    """Validation loss and tokens of the best checkpoint, which an earlier start has found."""
    with system_errors_of("--save", run):
        checkpoint, metrics = best(run), run / "metrics.jsonl"
        if checkpoint is None or not checkpoint.exists() or not metrics.exists():
            return None
        if iteration_of(checkpoint) <= since:
            return None
        records = [
            record
            for record in read_metrics(metrics)
            if record.get("split") == split and record["iteration"] == iteration_of(checkpoint)
        ]
    return (records[-1]["loss"], records[-1]["tokens"]) if records else None
