"""megalong checkpoints as files: read and written a tensor at a time, by one process.

The layout is that of `megalong.checkpoint`; nothing here needs Megatron-core, DeepSpeed,
a GPU or a process group.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from megalong.checkpoint.folder import (
    POINTER,
    being_read,
    checkpoint_folder,
    flush_to_disk,
    latest,
    point_at,
)
from megalong.checkpoint.manifest import MANIFEST, Manifest, check_files, check_share, record_of
from megalong.checkpoint.names import KINDS, WEIGHTS, parameter_of, tensor_name
from megalong.checkpoint.progress import Progress
from megalong.checkpoint.reading import CheckpointReader
from megalong.checkpoint.writing import HashingWriter
from megalong.config import Config
from megalong.config.arguments import config_from_values, read_yaml, to_yaml
from megalong.errors import UserError


class StoredModel:
    """What a checkpoint holds of a model: its configuration, and its weights by canonical name.

    path: a run folder (its newest checkpoint) or one checkpoint's folder. verify: compare its files
        with their hashes.
    Raises UserError naming the folder and what is wrong with it.
    """

    def __init__(self, path: Path, verify: bool = True):
        self.folder = (latest(path) if (path / POINTER).exists() else None) or path
        if not (self.folder / MANIFEST).exists():
            raise UserError(
                f"{self.folder} is not a checkpoint, it has no {MANIFEST}: give a run folder with a"
                " file `latest`, one of its iter_* folders"
            )
        # While this object lives, a run that goes on does not remove the checkpoint.
        self._held = ExitStack()
        self._held.enter_context(being_read(self.folder))
        manifest = check_files(self.folder)
        if verify:
            check_share(self.folder, manifest)
        self.config: Config = config_from_values(read_yaml(str(self.folder / "config.yaml")))
        self._reader = CheckpointReader(self.folder)
        self.progress: Progress = self._reader.progress()
        self.shapes: dict[str, tuple[int, ...]] = {
            parameter: tuple(entry.size)
            for name, entry in self._reader.tensors.items()
            if (parameter := parameter_of(name, WEIGHTS)) is not None
        }

    def read(self, name: str) -> torch.Tensor:
        """One weight, whole, float32."""
        return self._reader.read(tensor_name(WEIGHTS, name))


def write_first_checkpoint(
    run_folder: Path,
    config: Config,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> Path:
    """Write the checkpoint that a run begins with: iteration 0, Adam's moments zero.

    run_folder: has to be there. shapes: of all weights, by canonical name; read: makes one of them
    when its turn comes. Returns the checkpoint's folder; `pretrain_longnet.py --load` takes
    run_folder.
    """
    folder = checkpoint_folder(run_folder, 0)
    with written_aside(folder) as aside:
        state = {
            tensor_name(kind, name): torch.empty(shape, device="meta")
            for name, shape in shapes.items()
            for kind in KINDS
        }
        writer, planner = HashingWriter(aside), _MakeWhenWritten(read)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
        (aside / "progress.json").write_text(json.dumps(asdict(Progress())))
        (aside / "config.yaml").write_text(to_yaml(config))
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
        parameter = parameter_of(write_item.index.fqn, WEIGHTS)
        if parameter is None:
            self._written = torch.zeros(self.lookup_object(write_item.index).shape)
        else:
            made = self.read(parameter)
            self._written = torch.empty(made.shape).copy_(made)  # its own, and contiguous
        return self._written


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder to write into, `.tmp` until the block ends, on the disk, then `folder`.

    Raises UserError where `folder` is there already; leaves nothing behind on an error.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: remove it, or choose another folder")
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            flush_to_disk(path)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    flush_to_disk(folder.parent)
