"""From a megalong checkpoint to a folder that Transformers reads: one process, one tensor at a
time, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import megalong
from megalong.attention import pattern
from megalong.checkpoint.reading import StoredModel
from megalong.config import Config, RunConfig
from megalong.config.arguments import to_yaml
from megalong.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalong.hf.configs import (
    DTYPE_OF_PRECISION,
    longnet_config,
    model_classes,
    plain_config,
)
from megalong.hf.names import Entry, check_names, check_shape, check_vocabulary, entries
from megalong.hf.tokenizer_files import check_tokenizer, export_tokenizer, open_tokenizer
from megalong.model import rope_scaling
from megalong.model.parameters import ParameterCount, count_parameters
from megalong.utils.errors import UserError
from megalong.utils.files import written_aside
from megalong.utils.progress import progress_bar

# The code that travels with a model, and what it has from the training's, which goes beside it.
MODEL_FILES = tuple(sorted(Path(__file__).parent.glob("*_longnet.py")))
SHARED_MODULES = (pattern, rope_scaling)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}


def export(
    load: Path,
    output: Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer_model: str | None = None,
    with_tokenizer: bool = True,
    verify: bool = True,
    overwrite: bool = False,
    model_type: str = "longnet",
) -> dict[str, Any]:
    """Write a checkpoint as a folder for `AutoModelForCausalLM.from_pretrained`, or, of a
    masked-language model, `AutoModelForMaskedLM`.

    load: run folder, or one checkpoint's. dtype: None is the precision of the training.
    tokenizer_model: None is the one in the checkpoint. verify: compare the checkpoint with its
    hashes first. overwrite: replace an earlier export. model_type: of `configs.MODEL_TYPES`; others
    than longnet are for dense models, and Transformers has their code.
    Returns the provenance that the folder records, "parameters" (how many, in words) and "files".
    Raises UserError or OSError naming what is wrong.
    """
    shard_bytes = parse_size(max_shard_size)
    checkpoint = StoredModel(load, verify)
    config = checkpoint.config
    dtype = dtype or DTYPE_OF_PRECISION[config.training.precision]
    tokenizer_model = tokenizer_model or checkpoint.tokenizer_model
    with written_aside(output, replaces=overwrite and _is_export(output)) as folder:
        if with_tokenizer:
            tokenizer = export_tokenizer(
                config.data.tokenizer_type,
                tokenizer_model,
                folder,
                config.model.seq_length,
                config.data.prepend_bos,
                with_mask=not config.training.causal,
            )
            pad = open_tokenizer(folder).pad_token_id
        else:
            kind, with_mask = config.data.tokenizer_type, not config.training.causal
            tokenizer, pad = build_tokenizer(kind, tokenizer_model, with_mask), None
        table = entries(config.model, tokenizer.vocab_size)
        check_vocabulary(str(checkpoint.folder), table, tokenizer.vocab_size, checkpoint.shapes)
        parameters = count_parameters(config.model, tokenizer.vocab_size)
        provenance = _provenance(checkpoint, config)
        if model_type == "longnet":
            fields = longnet_config(config, tokenizer)
            fields |= {"model_type": model_type, **model_classes(config.training.objective)}
        else:
            fields = plain_config(config, tokenizer, model_type)
        if pad is not None:
            fields["pad_token_id"] = pad
        _write_json(folder / "config.json", {**fields, "dtype": dtype, "megalong": provenance})
        if with_tokenizer and model_type != "longnet":
            _check_its_tokenizer(tokenizer, folder, model_type)
        files = _write_weights(checkpoint, table, getattr(torch, dtype), shard_bytes, folder)
        if config.training.causal:
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            tokens = {name: fields[name] for name in names}
            _write_json(folder / "generation_config.json", {**tokens, "do_sample": False})
        if model_type == "longnet":
            copy_model_files(folder)
        for file in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", file)  # safetensors makes them private
        card = model_card(config, provenance, parameters, dtype, model_type)
        (folder / "README.md").write_text(card)
    return {**provenance, "parameters": str(parameters), "files": files}


def copy_model_files(folder: Path) -> None:
    """Write the code of a model there: files that import each other, torch and Transformers."""
    for file in (*MODEL_FILES, *(Path(module.__file__) for module in SHARED_MODULES)):
        code = file.read_text()
        for module in SHARED_MODULES:
            code = code.replace(
                f"from {module.__name__} ", f"from .{module.__name__.split('.')[-1]} "
            )
        (folder / file.name).write_text(code)


def _check_its_tokenizer(tokenizer: Tokenizer, folder: Path, model_type: str) -> None:
    """Raise UserError where Transformers, which asks config.json too, reads the tokenizer there as
    another one: for qwen2 it takes the class of Qwen2's, whatever the files say."""
    try:
        check_tokenizer(tokenizer, folder)
    except UserError as error:
        raise UserError(
            f"--model-type {model_type}: AutoTokenizer reads the tokenizer of such a model in a way"
            " of its own, which is not the training's: leave the flag out, or write no tokenizer"
            f" (--no-tokenizer). What is other: {error}"
        ) from error


def _is_export(folder: Path) -> bool:
    """Whether there is an export, as `export` has left it. Raises UserError where the folder is
    something else, which nobody wants to lose."""
    if not os.path.lexists(folder):
        return False
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    # What Transformers saves of an export, when it is fine-tuned, has the version of Transformers.
    ours = "megalong" in config and "transformers_version" not in config
    if folder.is_symlink() or not ours or any(path.is_dir() for path in folder.iterdir()):
        raise UserError(
            f"--output {folder} is no earlier export, or there is more in it: choose another folder"
        )
    return True


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "500MB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]B|)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--max-shard-size {text}: give a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _write_weights(
    checkpoint: StoredModel, table: list[Entry], dtype: torch.dtype, shard_bytes: int, folder: Path
) -> int:
    """The weights as safetensors, in files of at most `shard_bytes` (one tensor at least); returns
    how many."""
    check_names(
        f"--load {checkpoint.folder}", (entry.name for entry in table), checkpoint.shapes.keys()
    )
    for entry in table:
        check_shape(entry.name, entry.shape, checkpoint.shapes[entry.name])
    shards = _plan_shards(table, dtype, shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    remaining, ready = iter(table), {}
    with progress_bar(len(table), "tensor", "exporting") as bar:
        for file, names in zip(files, shards, strict=True):
            while not names <= ready.keys():
                entry = next(remaining)
                for name, tensor in entry.to_huggingface(checkpoint.read(entry.name)).items():
                    ready[name] = _converted(name, tensor, dtype)
                bar.update()
            shard = {name: ready.pop(name) for name in sorted(names)}
            save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(math.prod(shape) for entry in table for shape in entry.parts.values())
        there = zip(files, shards, strict=True)
        where = {name: file for file, names in there for name in sorted(names)}
        index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)
    return len(files)


def _converted(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = tensor.to(dtype, copy=True).contiguous()
    if not converted.isfinite().all():
        raise UserError(
            f"{name} has values that are not finite in {str(dtype).removeprefix('torch.')}: choose"
            " another --dtype, or an earlier checkpoint"
        )
    return converted


def _plan_shards(table: list[Entry], dtype: torch.dtype, shard_bytes: int) -> list[set[str]]:
    """Return the tensors of each file, in the order in which they will be read."""
    shards, room = [set()], shard_bytes
    for name, shape in (part for entry in table for part in entry.parts.items()):
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append(set())
            room = shard_bytes
        shards[-1].add(name)
        room -= size
    return shards


def _provenance(checkpoint: StoredModel, config: Config) -> dict[str, Any]:
    progress = checkpoint.progress
    return {
        "checkpoint": f"{checkpoint.folder.resolve().parent.name}/{checkpoint.folder.name}",
        "iteration": progress.iteration,
        "tokens": progress.consumed_tokens,
        "training_precision": config.training.precision,
        "make_vocab_size_divisible_by": config.model.make_vocab_size_divisible_by,
        "versions": {
            "megalong": megalong.__version__,
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


_CARD = """\
---
library_name: transformers
pipeline_tag: {pipeline}
tags: [{tags}]
---

# {name}

{what}, pretrained with
megalong: {parameters} in {dtype}, {layers} layers, {attention}. It was trained on
sequences of {seq_length:,} tokens.

{use}

## Where it comes from

| | |
|---|---|
| checkpoint | `{checkpoint}` |
| iteration | {iteration:,} |
| tokens of training | {tokens:,} |
| precision of training | {training_precision} |
| converted with | {versions} |

The training's configuration, where it differs from megalong's defaults:

```yaml
{config}```
"""


_PAPER = "([arXiv 2307.02486](https://arxiv.org/abs/2307.02486))"

_CAUSAL = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

The model's code is in this folder; it needs torch and transformers (5.24 or later) only. A text may
name special tokens: `text + tokenizer.eos_token` ends a document; with `split_special_tokens=True`
names are plain text, as they were in the training. The cache
keeps what later tokens can still attend to: KEPT. With `prefill_chunk_size`
`generate` reads a long prompt in chunks, in bounded memory; any size gives the same. With labels
the loss of a long sequence is computed in chunks and comes without logits, unless `logits_to_keep`
asks for some."""

_MASKED = """\
```python
from transformers import pipeline

fill = pipeline("fill-mask", FOLDER, trust_remote_code=True)
print(fill(f"Once upon a {{fill.tokenizer.mask_token}}"))
```

The model's code is in this folder; it needs torch and transformers (5.24 or later) only. Attention
looks both ways."""

_EXACT = """
The attention is the exact one, in PyTorch's operators, whether `attn_implementation`
says `eager` or `sdpa`; `output_attentions=True` gives its weights, of up to 8,192 tokens."""

_PLAIN = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
```

Its layers are those of Transformers' model type {model_type}, and need no code besides."""

_APART = """

The model was trained on documents that share a sequence without seeing each other: what stands
behind an end-of-document token does not see what is before it."""

_NOT_APART = """

The model was trained on documents that share a sequence without seeing each other
(`--document-attention isolated`), which Transformers' class does not know: there, what stands
behind an end-of-document token sees what is before it. Give each document a sequence of its own."""

_KEPT = {  # by kind of attention
    "dilated": "of dilated attention at most the sum of segment length / dilation rate rows,"
    " however long the sequence",
    "local": "of local attention its window",
    "sparse": "of sparse attention a block, and the columns of all before it",
    "dense": "of dense attention everything",
}


def model_card(
    config: Config,
    provenance: dict[str, Any],
    parameters: ParameterCount,
    dtype: str,
    model_type: str,
) -> str:
    """The text of README.md in an exported folder; model_type: of `configs.MODEL_TYPES`."""
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    causal = config.training.causal
    tags, what = "megalong", "A dense language model"
    apart = config.data.isolates_documents
    use = _PLAIN.format(model_type=model_type) + (_NOT_APART if apart else "")
    if model_type == "longnet":
        tags = "longnet, dilated-attention, megalong"
        what = f"A LongNet {'' if causal else 'masked-'}language model {_PAPER}"
        kept = ", ".join(_KEPT[kind] for kind in config.attention.kinds)
        use = _CAUSAL.replace("KEPT", kept) if causal else _MASKED.format()
        use += (_APART if apart else "") + _EXACT
    return _CARD.format(
        pipeline="text-generation" if causal else "fill-mask",
        tags=tags,
        what=what,
        use=use,
        name=provenance["checkpoint"].split("/")[0],
        dtype=dtype,
        layers=config.model.num_layers,
        attention=config.attention.description,
        seq_length=config.model.seq_length,
        config=to_yaml(_without_paths(config), leave_out="defaults"),
        parameters=parameters,
        **(provenance | {"versions": versions}),
    )


def _without_paths(config: Config) -> Config:
    """The configuration without the folders of the machine that it ran on."""
    names = {
        name: Path(path).name
        for name in ("data_blend", "tokenizer_model")
        if (path := getattr(config.data, name)) is not None
    }
    paths = {
        name: tuple(re.sub(r"[^=]*/", "", word) for word in words)  # NAME=/a/path is NAME=path
        for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path")
        if (words := getattr(config.data, name)) is not None
    }
    data = dataclasses.replace(config.data, data_cache_path=None, **names, **paths)
    return dataclasses.replace(config, data=data, run=RunConfig())
