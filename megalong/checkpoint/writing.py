"""Write checkpoints: aside, every file flushed to disk, then named and pointed at.

Every rank writes its own file and hashes it on the way. Whatever goes wrong on one of them, all of
them raise, and the checkpoint before stays in force. In the background a thread writes while
training goes on; its process group is its own, so that its collectives never meet the training's.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta

from megalong.checkpoint.content import (
    WEIGHTS,
    Progress,
    parameter_of,
    tensor_name,
    texts_of,
    tokenizer_files,
)
from megalong.checkpoint.folder import (
    aside,
    checkpoint_folder,
    clear_leftovers,
    has_pointer,
    latest,
    point_at,
    publish,
    remove_old,
)
from megalong.checkpoint.manifest import TENSOR_FILES, FileRecord, Manifest, record_of
from megalong.config import Config
from megalong.utils.errors import UserError
from megalong.utils.files import flush_to_disk, written_aside


def write_checkpoint(
    checkpoint: Path,
    tensors: dict[str, torch.Tensor],
    others: dict[str, bytes],
    group: dist.ProcessGroup,
) -> None:
    """Write a checkpoint and put it in force; called by every rank of `group`, a gloo group.

    tensors: those that this rank has to write, on the CPU. others: further files; rank 0's count.
    Raises OSError on every rank.
    """
    is_main, new = dist.get_rank(group) == 0, aside(checkpoint)

    def prepare() -> None:
        clear_leftovers(checkpoint.parent)
        new.mkdir()

    def finish() -> None:
        for name, content in others.items():
            (new / name).write_bytes(content)
        files = {name: record for part in parts for name, record in part.items()}
        for path in new.iterdir():
            if path.name not in files:
                files[path.name] = record_of(path)
        Manifest(dist.get_world_size(group), files).write(new)
        for path in new.iterdir():
            if path.suffix != TENSOR_FILES:  # those were flushed by who wrote them
                flush_to_disk(path)
        publish(checkpoint)

    try:
        _on_main(prepare, group)
        writer = HashingWriter(new)
        dcp.save(tensors, storage_writer=writer, process_group=group)
        parts: list[dict[str, FileRecord]] = [{}] * dist.get_world_size(group)
        dist.gather_object(writer.files, parts if is_main else None, group=group)
        _on_main(finish, group)
    except BaseException as error:
        if is_main:  # of a full disk it takes up the last of the room
            shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, CheckpointException):
            raise _of_some_rank(error) from error
        raise


def _on_main(action: Callable[[], None], group: dist.ProcessGroup) -> None:
    """Rank 0 does it; the others wait, and raise what it raised."""
    outcome: list[Exception | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            action()
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, group_src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]


class HashingWriter(dcp.FileSystemWriter):
    """PyTorch's writer, one file a rank and flushed, which also knows what it wrote: `files`."""

    def __init__(self, folder: Path):
        # Tensors are on the CPU: nothing to copy ahead, which would look for a GPU in this thread.
        super().__init__(folder, per_thread_copy_ahead=0)
        self.files: dict[str, FileRecord] = {}
        self.fs = _HashingFileSystem(self.files)

    def storage_meta(self) -> StorageMeta:
        """Without the folder: it is about to be renamed, and a path is not the same pickle in every
        version of Python."""
        return StorageMeta(save_id=self.save_id)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # PyTorch's own complaint about a file that ends too early hides the reason.
            raise _os_error(error) or error from None


class _HashingFileSystem(FileSystem):
    def __init__(self, files: dict[str, FileRecord]):
        self._files = files

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        if not str(path).endswith(TENSOR_FILES):
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _HashingFile(io.FileIO(path, mode)) as stream:
            yield stream
        self._files[Path(path).name] = FileRecord(stream.size, stream.digest.hexdigest())


class _HashingFile(io.BufferedWriter):
    """A file that is written from its beginning to its end."""

    def __init__(self, raw: io.RawIOBase):
        super().__init__(raw)
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = super().write(data)
        self.size += written
        return written


def _os_error(error: BaseException | None) -> OSError | None:
    """The first reason behind an error that is the operating system's."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _of_some_rank(error: CheckpointException) -> BaseException:
    failures = [failure for failure, _ in error.failures.values()]
    return next((f for f in failures if isinstance(f, OSError)), failures[0])


class Saver:
    """Writes checkpoints into the folder of `--save`; a context, which waits for the last at its
    end. Every rank has one, and calls its methods at the same points.

    announce: called on rank 0 once one is durable. kept: iterations that are not removed.
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
        """Write a checkpoint: now, or with `--async-save` from now on. tensors: those of this rank,
        on the CPU. Raises UserError where it, or the one before, could not be written."""
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
            keep_last, keep_every = self._config.run.keep_last, self._config.run.keep_every
            if keep_last is None:
                return
            try:
                remove_old(checkpoint, keep_last, keep_every, self._kept)
            except OSError as error:
                self._announce(f"--keep-last {keep_last}: old checkpoints stay ({error})")


def _failure(run: Path, checkpoint: Path, error: OSError) -> str:
    in_force = latest(run) if has_pointer(run) else None
    before = "there is none before it" if in_force is None else f"{in_force.name} stays in force"
    reason = error.strerror or error
    return (
        f"--save {run}: the checkpoint {checkpoint} could not be written: {reason}. Nothing was"
        f" overwritten, {before}; make room there, or --save elsewhere, and go on with --load"
    )


def write_first_checkpoint(
    run_folder: Path,
    config: Config,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> Path:
    """Write the checkpoint that a run begins with, by one process: iteration 0, weights alone.

    run_folder: has to be there. shapes: of all weights, by canonical name; read: makes one of them
    when its turn comes. Returns the checkpoint's folder.
    """
    folder = checkpoint_folder(run_folder, 0)
    with written_aside(folder) as aside:
        state = {
            tensor_name(WEIGHTS, name): torch.empty(shape, device="meta")
            for name, shape in shapes.items()
        }
        writer, planner = HashingWriter(aside), _MakeWhenWritten(read)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
        texts = texts_of(Progress(), config) | tokenizer_files(config.data)
        for name, content in texts.items():
            (aside / name).write_bytes(content)
        others = {p.name: record_of(p) for p in aside.iterdir() if p.name not in writer.files}
        Manifest(ranks=1, files=writer.files | others).write(aside)
    point_at(folder)
    return folder


class _MakeWhenWritten(dcp.DefaultSavePlanner):
    """Plans with tensors that have a shape only, and makes each when it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        super().__init__()
        self.read = read
        self._written = torch.empty(0)

    def resolve_data(self, write_item):
        # PyTorch's writer holds on to all that it has written until the file is closed: what the
        # tensor before took is given back here.
        self._written.untyped_storage().resize_(0)
        made = self.read(parameter_of(write_item.index.fqn, WEIGHTS))
        self._written = torch.empty(made.shape).copy_(made)  # its own, and contiguous
        return self._written
