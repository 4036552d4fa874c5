"""A checkpoint is read: one whole tensor at a time, by whoever wants it, without other ranks.

PyTorch keeps the list of tensors as a pickle, which may run any code; here it may name nothing but
the classes that such a list is made of. The tensors themselves are loaded as weights only.
"""

from __future__ import annotations

import enum
import pickle
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megalong.checkpoint.manifest import DamagedCheckpoint, reading
from megalong.checkpoint.progress import Progress
from megalong.checkpoint.texts import read_progress
from megalong.utils.torch_private import CHECKPOINT_CLASSES, slice_of_file


class CheckpointReader:
    """The tensors of one checkpoint by name, and its progress.

    tensors: {name: size and dtype, as torch.distributed.checkpoint describes them}.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self._files = _FileReader(checkpoint)
        with reading(checkpoint, ".metadata"):
            self._metadata = self._files.read_metadata()
            self.tensors: dict[str, TensorStorageMetadata] = self._metadata.state_dict_metadata

    def progress(self) -> Progress:
        """How far the run had come."""
        return read_progress(self.checkpoint)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor. Raises DamagedCheckpoint where there is none of this name."""
        if name not in self.tensors:
            raise DamagedCheckpoint(f"{self.checkpoint} has no tensor {name}")
        return tuple(self.tensors[name].size)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole, on the CPU. Raises DamagedCheckpoint where it cannot be read."""
        whole = torch.Size([0] * len(self.shape(name)))
        with reading(self.checkpoint, name):
            piece = self._metadata.storage_data[MetadataIndex(name, whole)]
            with (self.checkpoint / piece.relative_path).open("rb") as file:
                return self._files.read_piece(file, piece)


class _FileReader(dcp.FileSystemReader):
    """PyTorch's reader, which knows its file format, with a pickle that is safe to load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self.path / ".metadata").open("rb") as file:
            return _MetadataUnpickler(file).load()

    def read_piece(self, file: IO[bytes], piece: Any) -> torch.Tensor:
        return torch.load(slice_of_file(self, file, piece), map_location="cpu", weights_only=True)


def _member(kind: Any, name: str) -> enum.Enum:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError(f"{kind}.{name} has no place in a list of tensors")
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # as Python 3.11.0 to 3.11.3 write enums
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in CHECKPOINT_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a list of tensors")
