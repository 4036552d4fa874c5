"""Read checkpoints without an engine or other ranks: one whole tensor at a time.

PyTorch keeps the list of tensors as a pickle, which may run any code; here it may name nothing but
the classes that such a list is made of. The tensors themselves are loaded as weights only.
"""

from __future__ import annotations

import enum
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megalong.checkpoint.content import (
    WEIGHTS,
    Progress,
    kept_tokenizer,
    parameter_of,
    read_progress,
    read_settings,
    tensor_name,
)
from megalong.checkpoint.folder import being_read, find_checkpoint
from megalong.checkpoint.manifest import DamagedCheckpoint, check_files, check_share, reading
from megalong.config import Config
from megalong.config.arguments import config_from_values
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


class StoredModel:
    """What a checkpoint holds of a model: its configuration, and its weights by canonical name.

    path: a run folder or one checkpoint's. verify: compare files with hashes. Raises UserError.
    """

    def __init__(self, path: Path, verify: bool = True):
        self.folder = find_checkpoint(path)
        # While this object lives, a run that goes on does not remove the checkpoint.
        self._held = ExitStack()
        self._held.enter_context(being_read(self.folder))
        manifest = check_files(self.folder)
        if verify:
            check_share(self.folder, manifest)
        self.config: Config = config_from_values(read_settings(self.folder))
        self._reader = CheckpointReader(self.folder)
        self.progress: Progress = self._reader.progress()
        self.shapes: dict[str, tuple[int, ...]] = {
            parameter: tuple(entry.size)
            for name, entry in self._reader.tensors.items()
            if (parameter := parameter_of(name, WEIGHTS)) is not None
        }

    @property
    def tokenizer_model(self) -> str | None:
        """Where its tokenizer is, `tokenizer_model` of `build_tokenizer`."""
        return kept_tokenizer(self.folder, self.config.data)

    def read(self, name: str) -> torch.Tensor:
        """One weight, whole, float32."""
        return self._reader.read(tensor_name(WEIGHTS, name))
