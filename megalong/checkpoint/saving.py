"""Saving the checkpoints of a run, one after the other; in the background, if asked to.

In the background a thread writes while training goes on. It has a process group of its own, so that
its collectives never meet those of the training.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalong.checkpoint.folder import checkpoint_folder, has_pointer, latest, remove_old
from megalong.checkpoint.progress import Progress
from megalong.checkpoint.texts import texts_of
from megalong.checkpoint.tokenizer import tokenizer_files
from megalong.checkpoint.writing import write_checkpoint
from megalong.config import Config
from megalong.utils.errors import UserError


class Saver:
    """Writes checkpoints into the folder of `--save`; a context, which waits for the last at its
    end. Every rank of the run has one, and calls its methods at the same points.

    announce: called on rank 0 with a line to be said: what was saved, once that is durable. kept:
        iterations whose checkpoints are not removed when they are old.
    """

    def __init__(self, config: Config, announce: Callable[[str], None], kept: Collection[int] = ()):
        self._config, self._announce, self._kept = config, announce, kept
        # Read now: it may be gone from where it is before the run has ended.
        self._tokenizer = tokenizer_files(config.data) if dist.get_rank() == 0 else {}
        timeout = timedelta(minutes=config.run.distributed_timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self.durable_at: float | None = None  # time.perf_counter(), of the last one written

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        # What ends the run already is the news; a checkpoint under way is finished all the same.
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
            self.wait()
        self._pool.shutdown()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint in the background could not be written: `wait` says why."""
        future = self._under_way
        return future is not None and future.done() and future.exception() is not None

    def save(self, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
        """Write a checkpoint: now, or with `--async-save` from now on.

        tensors: those that this rank has to write, on the CPU; nobody changes them any more.
        Raises UserError where it, or the one before, could not be written.
        """
        self.wait()
        if self._config.run.async_save:
            self._under_way = self._pool.submit(self._write, progress, tensors)
        else:
            self._write(progress, tensors)

    def wait(self) -> None:
        """Wait until nothing is under way. Raises UserError where that could not be written."""
        future, self._under_way = self._under_way, None
        if future is not None:
            future.result()

    def _write(self, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
        run = Path(self._config.run.save)
        checkpoint = checkpoint_folder(run, progress.iteration)
        try:
            others = texts_of(progress, self._config) | self._tokenizer
            write_checkpoint(checkpoint, tensors, others, self._group)
        except OSError as error:
            raise UserError(_failure(run, checkpoint, error)) from error
        self.durable_at = time.perf_counter()
        if dist.get_rank() == 0:
            self._announce(f"saved {checkpoint}")
            self._remove_old(checkpoint)

    def _remove_old(self, newest: Path) -> None:
        run: Any = self._config.run
        if run.keep_last is None:
            return
        try:
            remove_old(newest, run.keep_last, run.keep_every, self._kept)
        except OSError as error:
            self._announce(f"--keep-last {run.keep_last}: old checkpoints stay ({error})")


def _failure(run: Path, checkpoint: Path, error: OSError) -> str:
    in_force = latest(run) if has_pointer(run) else None
    before = "there is none before it" if in_force is None else f"{in_force.name} stays in force"
    reason = error.strerror or error
    return (
        f"--save {run}: the checkpoint {checkpoint} could not be written: {reason}. Nothing was"
        f" overwritten, {before}; make room there, or --save elsewhere, and go on with --load"
    )
