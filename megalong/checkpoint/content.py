"""The contents of a checkpoint: names of tensors, progress, configuration, tokenizer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalong.checkpoint.manifest import reading
from megalong.config import Config, DataConfig
from megalong.config.arguments import read_yaml, to_yaml

WEIGHTS = "weights"  # other kinds: the optimizer's moments (`megalong.model.optimizers`)


def tensor_name(kind: str, parameter: str) -> str:
    """The name of one of the tensors of a parameter."""
    return f"{kind}.{parameter}"


def parameter_of(name: str, kind: str) -> str | None:
    """The parameter whose tensor of this kind `name` is; None where it is another's."""
    return name.removeprefix(f"{kind}.") if name.startswith(f"{kind}.") else None


def random_state_name(rank: int, generator: str) -> str:
    """The name of the state of one of a rank's random generators."""
    return f"random.{rank}.{generator}"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    consumed_tokens: where the run stands in the training stream, whatever the sequence lengths.
    losses: those of the iterations since the last one that was logged; losses_by_source: since then
        too, by source the sum of the losses, and of how many predictions.
    blend: where each source stands (`megalong.data.blend.History`); None: nothing was read.
    updates: steps of the optimizer, without those skipped; skipped_spikes: for their loss.
    recent_losses: what the next losses are measured by (`megalong.training.training_loss`).
    stages: those that have begun: name, the iteration after which it began ("begin"), and the
        settings that its result hangs on ("settings").
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    losses_by_source: dict[str, tuple[float, float]] = field(default_factory=dict)
    blend: dict[str, Any] | None = None
    updates: int = 0
    skipped_spikes: int = 0
    recent_losses: list[float] = field(default_factory=list)
    loss_scaler: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)


_PROGRESS, _CONFIG = "progress.json", "config.yaml"


def texts_of(progress: Progress, config: Config) -> dict[str, bytes]:
    """The contents of these files by name. config: resolved."""
    texts = {_PROGRESS: json.dumps(dataclasses.asdict(progress)), _CONFIG: to_yaml(config)}
    return {name: text.encode() for name, text in texts.items()}


def read_progress(checkpoint: Path) -> Progress:
    """How far the run had come. Raises DamagedCheckpoint."""
    with reading(checkpoint, _PROGRESS):
        return Progress(**json.loads((checkpoint / _PROGRESS).read_text()))


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """Read the fields of the resolved configuration by name. Raises UserError."""
    return read_yaml(str(checkpoint / _CONFIG))


def read_config_text(checkpoint: Path) -> str:
    """The resolved configuration as it was written. Raises DamagedCheckpoint."""
    with reading(checkpoint, _CONFIG):
        return (checkpoint / _CONFIG).read_text()


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
    """Return the files of a run's tokenizer by the names that they have in a checkpoint; none where
    it needs none, or has gone."""
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
    """Return where the tokenizer of a checkpoint is: in it, or where the training had it; None for
    one that needs no file."""
    if data.tokenizer_type == "SentencePieceTokenizer":
        kept = needed = checkpoint / SENTENCEPIECE_FILE
    elif data.tokenizer_type == "TikTokenizer":
        described = (checkpoint / TIKTOKEN_DESCRIPTION).is_file()
        kept = needed = checkpoint / (TIKTOKEN_DESCRIPTION if described else TIKTOKEN_RANKS)
    else:
        kept, needed = checkpoint, checkpoint / "tokenizer.json"
    return str(kept) if needed.is_file() else data.tokenizer_model


def _tiktoken_files(model: Path) -> dict[str, bytes]:
    """A .tiktoken file; a description and the ranks that it names; or Megatron's ranks."""
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
