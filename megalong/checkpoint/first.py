"""The checkpoint that a run from somebody's weights begins with: written by one process, a tensor
at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from megalong.checkpoint.folder import checkpoint_folder, point_at
from megalong.checkpoint.manifest import Manifest, record_of
from megalong.checkpoint.names import WEIGHTS, parameter_of, tensor_name
from megalong.checkpoint.progress import Progress
from megalong.checkpoint.texts import texts_of
from megalong.checkpoint.tokenizer import tokenizer_files
from megalong.checkpoint.writing import HashingWriter
from megalong.config import Config
from megalong.utils.files import written_aside


def write_first_checkpoint(
    run_folder: Path,
    config: Config,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> Path:
    """Write the checkpoint that a run begins with: iteration 0, weights alone. Before the first
    update any optimizer's moments are zero, and nobody reads them.

    run_folder: has to be there. shapes: of all weights, by canonical name; read: makes one of them
    when its turn comes. Returns the checkpoint's folder; `pretrain_longnet.py --load` takes
    run_folder.
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
