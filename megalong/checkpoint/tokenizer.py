"""The tokenizer of a checkpoint: its files lie in it, so that what reads the model needs nothing
else from the machine that trained it."""

from __future__ import annotations

import json
from pathlib import Path

from megalong.config import DataConfig

SENTENCEPIECE_FILE = "tokenizer.model"
TIKTOKEN_DESCRIPTION = "tiktoken.json"
TIKTOKEN_RANKS = "tokenizer.tiktoken"
HUGGINGFACE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def tokenizer_files(data: DataConfig) -> dict[str, bytes]:
    """The files of a run's tokenizer by the names that they have in a checkpoint: those that it is
    read from, and nothing else of its folder. None where it needs none, or has gone."""
    model = Path(data.tokenizer_model or "")
    if data.tokenizer_type == "TikTokenizer":
        return _tiktoken_files(model) if model.is_file() else {}
    if data.tokenizer_type == "SentencePieceTokenizer":
        found = {SENTENCEPIECE_FILE: model}
    elif data.tokenizer_type == "HuggingFaceTokenizer":
        found = {name: model / name for name in HUGGINGFACE_FILES}
    else:
        found = {}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def kept_tokenizer(checkpoint: Path, data: DataConfig) -> str | None:
    """Where the tokenizer of a checkpoint is: in it, or, of one without, where the training had it;
    None for one that needs no file."""
    if data.tokenizer_type == "SentencePieceTokenizer":
        kept = needed = checkpoint / SENTENCEPIECE_FILE
    elif data.tokenizer_type == "TikTokenizer":
        described = (checkpoint / TIKTOKEN_DESCRIPTION).is_file()
        kept = needed = checkpoint / (TIKTOKEN_DESCRIPTION if described else TIKTOKEN_RANKS)
    else:
        kept, needed = checkpoint, checkpoint / "tokenizer.json"
    return str(kept) if needed.is_file() else data.tokenizer_model


def _tiktoken_files(model: Path) -> dict[str, bytes]:
    """A .tiktoken file, or a .json file: a description and the ranks that it names, or Megatron's
    ranks."""
    if model.suffix != ".json":
        return {TIKTOKEN_RANKS: model.read_bytes()}
    content = json.loads(model.read_bytes())
    if not isinstance(content, dict):
        return {TIKTOKEN_DESCRIPTION: model.read_bytes()}
    ranks = model.parent / content["ranks"]
    if not ranks.is_file():
        return {}
    description = json.dumps(content | {"ranks": TIKTOKEN_RANKS}, indent=2)
    return {TIKTOKEN_DESCRIPTION: description.encode(), TIKTOKEN_RANKS: ranks.read_bytes()}
