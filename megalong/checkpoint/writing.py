"""One checkpoint is written: aside, every file flushed to disk, then named and pointed at.

Every rank writes its own file and hashes it on the way. Whatever goes wrong on one of them, all of
them raise, and the checkpoint before stays in force.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta

from megalong.checkpoint.folder import aside, clear_leftovers, publish
from megalong.checkpoint.manifest import TENSOR_FILES, FileRecord, Manifest, record_of
from megalong.utils.files import flush_to_disk


def write_checkpoint(
    checkpoint: Path,
    tensors: dict[str, torch.Tensor],
    others: dict[str, bytes],
    group: dist.ProcessGroup,
) -> None:
    """Write a checkpoint and put it in force; called by every rank of `group`, a gloo group.

    tensors: those that this rank has to write, on the CPU. others: further files; rank 0's count.
    Raises OSError where a file cannot be written, on every rank.
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
