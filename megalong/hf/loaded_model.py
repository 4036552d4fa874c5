"""Any model that text can be put to: megalong's checkpoints, and folders of Transformers, ours and
others'. Needs neither Megatron-core nor DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalong.checkpoint.folder import is_checkpoint_or_run
from megalong.checkpoint.reading import StoredModel
from megalong.data.tokenizers.huggingface_tokenizer import text_ids
from megalong.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalong.hf.configs import longnet_config
from megalong.hf.names import check_names, check_vocabulary, entries
from megalong.hf.tokenizer_files import begins_with_bos, open_tokenizer, plain_ids
from megalong.utils.errors import UserError


@dataclass(frozen=True)
class LoadedModel:
    """A causal model of Transformers, and how text becomes its tokens and tokens become text.

    first: the token that stands before a text.
    ids: those that stand for text, and not for something special, in order.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    first: int
    ids: Sequence[int] = ()

    def check_length(self, tokens: int) -> None:
        """Raise UserError where the model cannot read so many."""
        from megalong.hf.modeling_longnet import LongNetModel
        from megalong.hf.positions_longnet import check_length

        base = self.model.base_model
        if isinstance(base, LongNetModel):
            try:
                check_length(base.config, tokens, base.dtype)
            except ValueError as error:
                raise UserError(str(error)) from error


def load_model(
    path: Path, device: str | None, dtype: torch.dtype, tokenizer_model: str | None = None
) -> LoadedModel:
    """A megalong checkpoint (or run folder), or a folder of Transformers.

    device: None is the GPU where there is one.
    tokenizer_model: the tokenizer of a megalong checkpoint, where there is none in it.
    Raises UserError where it cannot be read.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is no GPU here that PyTorch can use")
    if (path / "config.json").exists():
        try:
            return _load_folder(path, device, dtype)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: {error}") from error
    if not is_checkpoint_or_run(path):
        raise UserError(
            f"{path} is not a checkpoint, a run folder with a file `latest`, or a folder of"
            " Transformers with a config.json"
        )
    checkpoint = StoredModel(path)
    if not checkpoint.config.training.causal:
        raise UserError(
            f"{path} is a masked-language model (--objective mlm), which does not continue texts:"
            " convert_to_hf.py makes a folder of it for Transformers' AutoModelForMaskedLM, which"
            ' pipeline("fill-mask") uses'
        )
    data = checkpoint.config.data
    kept = checkpoint.tokenizer_model
    tokenizer = build_tokenizer(data.tokenizer_type, tokenizer_model or kept)
    if tokenizer_model and kept and Path(kept).exists():
        own = build_tokenizer(data.tokenizer_type, kept)
        if own.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"--tokenizer-model {tokenizer_model}: not the tokenizer that {path} was trained"
                f" with, which is in {kept}: leave the flag out"
            )
    model = load_checkpoint(checkpoint, tokenizer).to(device, dtype).eval()
    first = tokenizer.bos if data.prepend_bos else tokenizer.eod

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size])

    return LoadedModel(model, tokenizer.encode, decode, first, tokenizer.text_ids)


def _load_folder(path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
    """Runs no code out of the folder: of our own exports the classes are here."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    if json.loads((path / "config.json").read_text()).get("model_type") == "longnet":
        from megalong.hf.modeling_longnet import LongNetForCausalLM

        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        model = LongNetForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    else:
        tokenizer = open_tokenizer(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    first = tokenizer.bos_token_id if begins_with_bos(tokenizer) else tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        return plain_ids(tokenizer, text)

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return LoadedModel(model.to(device).eval(), encode, decode, first, text_ids(tokenizer))


def load_checkpoint(checkpoint: StoredModel, tokenizer: Tokenizer):
    """LongNetForCausalLM with the weights of one of megalong's checkpoints, float32."""
    from megalong.hf.configuration_longnet import LongNetConfig
    from megalong.hf.modeling_longnet import LongNetForCausalLM

    table = entries(checkpoint.config.model, tokenizer.vocab_size)
    check_names(str(checkpoint.folder), (entry.name for entry in table), checkpoint.shapes)
    check_vocabulary(str(checkpoint.folder), table, tokenizer.vocab_size, checkpoint.shapes)
    model = LongNetForCausalLM(LongNetConfig(**longnet_config(checkpoint.config, tokenizer)))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for entry in table:
            for name, tensor in entry.to_huggingface(checkpoint.read(entry.name)).items():
                parameters[name].copy_(tensor)
    return model
