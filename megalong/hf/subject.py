"""Any model that text can be put to: megalong's checkpoints, and folders of Transformers, ours and
others'. Needs neither Megatron-core nor DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalong.data.tokenizer import build_tokenizer
from megalong.hf.checkpoint_files import StoredModel
from megalong.hf.configs import longnet_config
from megalong.hf.names import Sizes, check_names, entries


@dataclass(frozen=True)
class Subject:
    """A causal model of Transformers, and how text becomes its tokens and tokens become text.

    first: the token that stands before a text.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    first: int


def load_subject(path: Path, device: str, dtype: torch.dtype, tokenizer_model: str | None = None):
    """A megalong checkpoint (or run folder), or a folder of Transformers.

    tokenizer_model: where the tokenizer of a megalong checkpoint is now.
    Raises ConfigError, ValueError or OSError where it cannot be read.
    """
    if (path / "config.json").exists():
        return _load_folder(path, device, dtype)
    checkpoint = StoredModel(path)
    data = checkpoint.config.data
    tokenizer = build_tokenizer(data.tokenizer_type, tokenizer_model or data.tokenizer_model)
    model = load_checkpoint(checkpoint, tokenizer.vocab_size, tokenizer.eod)
    model = model.to(device, dtype).eval()
    return Subject(model, tokenizer.encode, tokenizer.decode, tokenizer.eod)


def _load_folder(path: Path, device: str, dtype: torch.dtype) -> Subject:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": True, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return Subject(model.to(device).eval(), encode, decode, first)


def load_checkpoint(checkpoint: StoredModel, vocab_size: int, eod: int):
    """LongNetForCausalLM with the weights of one of megalong's checkpoints, float32."""
    from megalong.hf.configuration_longnet import LongNetConfig
    from megalong.hf.modeling_longnet import LongNetForCausalLM

    table = entries(Sizes.of(checkpoint.config.model, vocab_size))
    check_names(str(checkpoint.folder), (entry.name for entry in table), checkpoint.shapes)
    config = LongNetConfig(**longnet_config(checkpoint.config, vocab_size, eod))
    model = LongNetForCausalLM(config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for entry in table:
            for name, tensor in entry.to_huggingface(checkpoint.read(entry.name)).items():
                parameters[name].copy_(tensor)
    return model
