"""megalong checkpoints as files: read and written a tensor at a time, by one process.

The layout is that of `megalong.training.checkpoint`; nothing here needs Megatron-core, DeepSpeed,
a GPU or a process group.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from megalong.arguments import config_from_values, read_yaml, to_yaml
from megalong.config import Config
from megalong.flags import ConfigError

WEIGHTS, MOMENTS = "weights.", ("exp_avg.", "exp_avg_sq.")


class CheckpointReader:
    """One checkpoint: its configuration, its progress, and its weights by canonical name.

    path: a run folder (its newest checkpoint) or one checkpoint's folder.
    Raises ConfigError naming the folder and what is wrong with it.
    """

    def __init__(self, path: Path):
        pointer = path / "latest"
        self.folder = path / pointer.read_text().strip() if pointer.exists() else path
        for name in ("progress.json", "config.yaml", ".metadata"):
            if not (self.folder / name).exists():
                raise ConfigError(
                    f"--load {self.folder}: not a checkpoint, it has no {name}; give a run folder"
                    " with a file `latest`, or one of its iter_* folders"
                )
        self.config: Config = config_from_values(read_yaml(str(self.folder / "config.yaml")))
        self.progress: dict = json.loads((self.folder / "progress.json").read_text())
        metadata = dcp.FileSystemReader(str(self.folder)).read_metadata().state_dict_metadata
        self.shapes: dict[str, tuple[int, ...]] = {
            name.removeprefix(WEIGHTS): tuple(entry.size)
            for name, entry in metadata.items()
            if name.startswith(WEIGHTS)
        }

    def read(self, name: str) -> torch.Tensor:
        """One weight, whole, float32."""
        tensor = torch.empty(self.shapes[name])
        try:
            dcp.load({WEIGHTS + name: tensor}, checkpoint_id=str(self.folder), no_dist=True)
        except (Exception, dcp.api.CheckpointException) as error:
            raise ConfigError(f"--load {self.folder}: {name} cannot be read: {error!r}") from error
        return tensor


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
    folder = run_folder / "iter_0000000"
    with written_aside(folder) as aside:
        state = {
            kind + name: torch.empty(shape, device="meta")
            for name, shape in shapes.items()
            for kind in (WEIGHTS, *MOMENTS)
        }
        writer, planner = dcp.FileSystemWriter(str(aside)), _MakeWhenWritten(read)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
        progress = {"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0, "losses": []}
        (aside / "progress.json").write_text(json.dumps(progress))
        (aside / "config.yaml").write_text(to_yaml(config))
    (run_folder / "latest.tmp").write_text(folder.name)
    os.replace(run_folder / "latest.tmp", run_folder / "latest")
    return folder


class _MakeWhenWritten(dcp.DefaultSavePlanner):
    """Plans with tensors that have a shape only, and makes each when it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        super().__init__()
        self.read = read

    def resolve_data(self, write_item):
        name = write_item.index.fqn
        if name.startswith(WEIGHTS):
            return self.read(name.removeprefix(WEIGHTS)).float().contiguous()
        return torch.zeros(self.lookup_object(write_item.index).shape)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder to write into, `.tmp` until the block ends, on the disk, then `folder`.

    Raises ConfigError where `folder` is there already; leaves nothing behind on an error.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already: remove it, or choose another folder")
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            _flush_to_disk(path)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _flush_to_disk(folder.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
