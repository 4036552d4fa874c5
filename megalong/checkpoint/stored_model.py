"""What a checkpoint holds of a model, for everybody who is not the engine: one process reads its
configuration and its weights, and needs no Megatron-core, DeepSpeed, GPU or process group."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from megalong.checkpoint.folder import being_read, find_checkpoint
from megalong.checkpoint.manifest import check_files, check_share
from megalong.checkpoint.names import WEIGHTS, parameter_of, tensor_name
from megalong.checkpoint.progress import Progress
from megalong.checkpoint.reading import CheckpointReader
from megalong.checkpoint.texts import read_settings
from megalong.checkpoint.tokenizer import kept_tokenizer
from megalong.config import Config
from megalong.config.arguments import config_from_values


class StoredModel:
    """What a checkpoint holds of a model: its configuration, and its weights by canonical name.

    path: a run folder (the checkpoint in force) or one checkpoint's folder. verify: compare its
        files with their hashes.
    Raises UserError naming the folder and what is wrong with it.
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
