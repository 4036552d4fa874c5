"""From a folder of Transformers to a megalong checkpoint that training goes on from: our own
exports, and models of the Llama family."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megalong.checkpoint.content import HUGGINGFACE_FILES, SENTENCEPIECE_FILE
from megalong.checkpoint.writing import write_first_checkpoint
from megalong.config import Config
from megalong.config.arguments import config_from_values, to_yaml
from megalong.config.model import FACTORS, fields_of_scaling
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.hf.configs import DTYPE_OF_PRECISION, megalong_values
from megalong.hf.names import Entry, check_names, check_shape, entries
from megalong.hf.tokenizer_files import begins_with_bos, open_tokenizer, tokenizer_of_export
from megalong.utils.errors import UserError
from megalong.utils.progress import progress_bar

TIED_COPY, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class SafetensorsReader:
    """The tensors of a folder of safetensors, one file or many, one tensor at a time.

    Raises UserError where there are none, or where the index and the files disagree.
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
            raise UserError(
                f"--input {folder}: no model.safetensors and no index of several; save the model"
                " with Transformers' save_pretrained"
            )

    def read(self, name: str) -> torch.Tensor:
        path = self.folder / self.file_of[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except Exception as error:  # safetensors has an error type of its own for damaged files
            raise UserError(f"--input {path}: {name} cannot be read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder of Transformers. Raises UserError where there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"--input {folder}: no config.json; give a folder of Transformers")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"--input {path}: not JSON: {error}") from error


def import_model(source: Path, run_folder: Path, changes: dict[str, Any]) -> tuple[Path, Config]:
    """Write a checkpoint of iteration 0 with the weights of a folder of Transformers.

    run_folder: must not hold a run. changes: fields of megalong's configuration by name that win
    over the model's own: the attention pattern, the sequence length, the tokenizer, ...
    Leaves in run_folder the checkpoint, the tokenizer, and flags.yaml, which starts a run from it.
    Returns the checkpoint and the configuration. Raises UserError or OSError: what is wrong.
    """
    if run_folder.exists() and any(run_folder.iterdir()):
        raise UserError(f"--output {run_folder} is not empty: choose another folder")
    theirs = read_config(source)
    scalings = [name for name in FACTORS if changes.get(name) is not None]
    values = megalong_values(theirs, str(source / "config.json"), scalings)
    values = _with_changes(values, changes, scalings)
    values, ids = _with_tokenizer(values, source, run_folder)
    if "tokenizer_type" not in changes:
        values = {"prepend_bos": begins_with_bos(open_tokenizer(source))} | values
    given, config = _configuration(theirs, values, ids)
    rows, here = theirs["vocab_size"], config.model.vocabulary_rows(ids)
    if here < rows:
        raise UserError(
            f"--padded-vocab-size {here} is less than the model's {rows} rows: leave it out"
        )
    weights = SafetensorsReader(source)
    table = {entry.name: entry for entry in entries(config.model, ids, theirs["vocab_size"])}
    _check_weights(source, theirs, weights, table)
    run_folder.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(source, config)

    def read(name: str) -> torch.Tensor:
        entry = table[name]
        bar.update()
        return entry.to_megalong({part: weights.read(part).float() for part in entry.parts})

    shapes = {entry.name: entry.shape for entry in table.values()}
    with progress_bar(len(table), "tensor", "importing") as bar:
        checkpoint = write_first_checkpoint(run_folder, config, shapes, read)
    (run_folder / "flags.yaml").write_text(to_yaml(given, leave_out="open"))
    return checkpoint, config


def _with_changes(
    values: dict[str, Any], changes: dict[str, Any], scalings: list[str]
) -> dict[str, Any]:
    """The model's values and over them the changes; a scaling of rotary positions in the place of
    the model's own, with all that belongs to that. scalings: factors of those that are changed."""
    theirs = [name for name in FACTORS if scalings and name in values and name not in scalings]
    gone = {name for factor in theirs for name in fields_of_scaling(factor)}
    return {name: value for name, value in values.items() if name not in gone} | changes


def _with_tokenizer(
    values: dict[str, Any], source: Path, run_folder: Path
) -> tuple[dict[str, Any], int]:
    """The values with the tokenizer that is given, or that comes with the model; and how many ids
    it has."""
    with_mask = values.get("objective") == "mlm"
    if "tokenizer_type" in values:
        kind, model = values["tokenizer_type"], values.get("tokenizer_model")
        return values, build_tokenizer(kind, model, with_mask).vocab_size
    if "tokenizer_model" in values:
        raise UserError(
            f"--tokenizer-model {values['tokenizer_model']} is given without --tokenizer-type: give"
            " both, or neither for the model's own"
        )
    kind, model = tokenizer_of_export(source)
    ids = build_tokenizer(kind, model, with_mask).vocab_size
    if model is not None:
        name = SENTENCEPIECE_FILE if kind == "SentencePieceTokenizer" else "tokenizer"
        model = str((run_folder / name).resolve())
    return values | {"tokenizer_type": kind, "tokenizer_model": model}, ids


def _configuration(
    theirs: dict[str, Any], values: dict[str, Any], ids: int
) -> tuple[Config, Config]:
    """The configuration of the model, as it is given to the run that goes on, and resolved."""
    stored = (theirs.get("megalong") or {}).get("training_precision")
    dtype = str(theirs.get("dtype") or theirs.get("torch_dtype"))
    precisions = {dtype: precision for precision, dtype in DTYPE_OF_PRECISION.items()}
    defaults = {
        "precision": stored or precisions.get(dtype, "fp32"),
        **_vocabulary(theirs["vocab_size"], ids, values),
    }
    given = config_from_values(defaults | values)
    # The data of the run to come is not known yet, and nothing else of a run can be wrong here.
    with_data = dataclasses.replace(given.data, data_path=("to come",))
    resolved = dataclasses.replace(given, data=with_data).resolve(given.parallel.ranks_per_replica)
    return given, dataclasses.replace(resolved, data=given.data)


def _vocabulary(rows: int, ids: int, values: dict[str, Any]) -> dict[str, int]:
    """The fields that make training give the vocabulary as many rows as the model has, so that it
    stays the same function; or more, where a multiple is asked for."""
    multiple = values.get("make_vocab_size_divisible_by")
    if values.get("objective") == "mlm" and ids == rows + 1:
        if multiple is None:
            raise UserError(
                f"--input: the model has {rows} rows in its vocabulary, one for each id of the"
                " tokenizer, and the mask token needs one more: set --make-vocab-size-divisible-by"
                " 128, for as many rows as that takes"
            )
        return {"make_vocab_size_divisible_by": multiple}
    if ids > rows:
        raise UserError(
            f"--input: the model has {rows} rows in its vocabulary, and the tokenizer {ids} ids:"
            " choose the model's own tokenizer"
        )
    if ids == rows:
        return {"make_vocab_size_divisible_by": multiple or min(128, rows & -rows)}
    return {"padded_vocab_size": math.ceil(rows / (multiple or 1)) * (multiple or 1)}


def _check_weights(
    source: Path, theirs: dict[str, Any], weights: SafetensorsReader, table: dict[str, Entry]
) -> None:
    found = {name for name in weights.file_of if not name.endswith("rotary_emb.inv_freq")}
    tied = TIED_COPY not in {part for entry in table.values() for part in entry.parts}
    if tied and TIED_COPY in found:
        if not torch.equal(weights.read(TIED_COPY), weights.read(EMBEDDING)):
            raise UserError(
                f"--input {source}: {TIED_COPY} differs from {EMBEDDING}, and the configuration"
                " says that they are tied: set tie_word_embeddings to false in config.json"
            )
        found.discard(TIED_COPY)
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
