"""From a folder of Transformers to a megalong checkpoint that training goes on from: our own
exports, and models of the Llama family."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megalong.arguments import config_from_values, to_yaml
from megalong.config import Config
from megalong.flags import ConfigError
from megalong.hf.checkpoint_files import write_first_checkpoint
from megalong.hf.configs import megalong_values
from megalong.hf.names import Entry, Sizes, check_names, check_shape, entries
from megalong.hf.tokenizer_files import (
    HUGGINGFACE_FILES,
    SENTENCEPIECE_FILE,
    tokenizer_of_export,
)

TIED_COPY, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PRECISION_OF = {"bfloat16": "bf16", "float16": "fp16"}


class SafetensorsReader:
    """The tensors of a folder of safetensors, one file or many, one tensor at a time.

    Raises ConfigError where there are none, or where the index and the files disagree.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self.file_of = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").exists():
            with safe_open(folder / "model.safetensors", "pt") as file:
                self.file_of = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ConfigError(
                f"--input {folder}: no model.safetensors and no index of several; save the model"
                " with Transformers' save_pretrained"
            )

    def read(self, name: str) -> torch.Tensor:
        path = self.folder / self.file_of[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except Exception as error:  # safetensors has an error type of its own for damaged files
            raise ConfigError(f"--input {path}: {name} cannot be read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder of Transformers. Raises ConfigError where there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"--input {folder}: no config.json; give a folder of Transformers")
    return json.loads(path.read_text())


def import_model(source: Path, run_folder: Path, changes: dict[str, Any]) -> tuple[Path, Config]:
    """Write a checkpoint of iteration 0 with the weights of a folder of Transformers.

    run_folder: must not hold a run. changes: fields of megalong's configuration by name that win
    over the model's own: the attention pattern, the sequence length, the tokenizer, ...
    Leaves in run_folder the checkpoint, the tokenizer, and flags.yaml, which starts a run from it.
    Returns the checkpoint and the configuration. Raises ConfigError or OSError: what is wrong.
    """
    if run_folder.exists() and any(run_folder.iterdir()):
        raise ConfigError(f"--output {run_folder} is not empty: choose another folder")
    theirs = read_config(source)
    values = megalong_values(theirs, str(source / "config.json"))
    given, config = _configuration(theirs, values | changes, source, run_folder)
    sizes = Sizes.of(config.model, theirs["vocab_size"])
    weights = SafetensorsReader(source)
    table = {entry.name: entry for entry in entries(sizes)}
    _check_weights(source, theirs, weights, table)
    run_folder.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(source, config)

    def read(name: str) -> torch.Tensor:
        entry = table[name]
        return entry.to_megalong({part: weights.read(part).float() for part in entry.parts})

    shapes = {entry.name: entry.shape for entry in table.values()}
    checkpoint = write_first_checkpoint(run_folder, config, shapes, read)
    (run_folder / "flags.yaml").write_text(to_yaml(given, only_given=True))
    return checkpoint, config


def _configuration(
    theirs: dict[str, Any], values: dict[str, Any], source: Path, run_folder: Path
) -> tuple[Config, Config]:
    """The configuration of the model, as it is given to the run that goes on, and resolved."""
    if "tokenizer_type" not in values:
        kind, model = tokenizer_of_export(source)
        if model is not None:
            model = "tokenizer.model" if kind == "SentencePieceTokenizer" else "tokenizer"
            model = str((run_folder / model).resolve())
        values = values | {"tokenizer_type": kind, "tokenizer_model": model}
    if "make_vocab_size_divisible_by" not in values:
        # Nothing is padded, so that the model stays the same function: the largest power of two.
        vocab_size = theirs["vocab_size"]
        values["make_vocab_size_divisible_by"] = min(128, vocab_size & -vocab_size)
    if "precision" not in values:
        stored = (theirs.get("megalong") or {}).get("training_precision")
        dtype = theirs.get("dtype") or theirs.get("torch_dtype")
        values["precision"] = stored or _PRECISION_OF.get(str(dtype), "fp32")
    # The data of the run to come is not known yet, and nothing else of a run can be wrong here.
    resolved = config_from_values(values | {"data_path": "to come"}).resolve(1)
    data = dataclasses.replace(resolved.data, data_path=None)
    return config_from_values(values), dataclasses.replace(resolved, data=data)


def _check_weights(
    source: Path, theirs: dict[str, Any], weights: SafetensorsReader, table: dict[str, Entry]
) -> None:
    found = {name for name in weights.file_of if not name.endswith("rotary_emb.inv_freq")}
    tied = TIED_COPY not in {part for entry in table.values() for part in entry.parts}
    if tied and TIED_COPY in found:
        if not torch.equal(weights.read(TIED_COPY), weights.read(EMBEDDING)):
            raise ConfigError(
                f"--input {source}: {TIED_COPY} differs from {EMBEDDING}, and the configuration"
                " says that they are tied: set tie_word_embeddings to false in config.json"
            )
        found.discard(TIED_COPY)
    for ending, what in (
        ("q_proj.bias", "biases in the query, key and value projections alone"),
        ("q_norm.weight", "norms of queries and keys"),
    ):
        known = any(part.endswith(ending) for entry in table.values() for part in entry.parts)
        if not known and any(name.endswith(ending) for name in found):
            raise ConfigError(
                f"--input {source}: a {theirs['model_type']} model with {what}, which megalong's"
                " model has not"
            )
    expected = {name: shape for entry in table.values() for name, shape in entry.parts.items()}
    check_names(f"--input {source}", expected, found)
    for name, shape in expected.items():
        check_shape(name, shape, weights.shape(name))


def _copy_tokenizer(source: Path, config: Config) -> None:
    target = config.data.tokenizer_model
    if target is None or Path(target).exists():
        return
    if config.data.tokenizer_type == "SentencePieceTokenizer":
        shutil.copy(source / SENTENCEPIECE_FILE, target)
        return
    os.makedirs(target)
    for name in HUGGINGFACE_FILES:
        if (source / name).exists():
            shutil.copy(source / name, Path(target) / name)
