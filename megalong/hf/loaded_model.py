"""Any model that text can be put to: megalong's checkpoints, and folders of Transformers, ours and
others'; and a text continued by it, printed as it comes. Needs neither Megatron-core nor
DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from megalong.checkpoint.folder import is_checkpoint_or_run
from megalong.checkpoint.reading import StoredModel
from megalong.data.tokenizers.huggingface_tokenizer import text_ids
from megalong.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalong.hf.configs import longnet_config
from megalong.hf.configuration_longnet import LongNetConfig
from megalong.hf.modeling_longnet import LongNetForCausalLM, LongNetModel
from megalong.hf.names import check_names, check_vocabulary, entries
from megalong.hf.positions_longnet import check_length
from megalong.hf.tokenizer_files import begins_with_bos, open_tokenizer, plain_ids
from megalong.utils.errors import UserError
from megalong.utils.progress import progress_bar


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
    logging.disable_progress_bar()
    if json.loads((path / "config.json").read_text()).get("model_type") == "longnet":
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


def continue_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    prefill_chunk_size: int,
    stop: Sequence[str] = (),
    echo: bool = True,
) -> Continuation:
    """Print the prompt and what the model makes of it, as the beginning of a document.

    temperature: 0 takes the likeliest token always. top_p: draw from the likeliest tokens of this
    share. prefill_chunk_size: tokens of the prompt read at once. stop: texts of which the first
    that the model writes ends it, and is left out. echo: whether the prompt is printed.
    """
    torch.manual_seed(seed)
    own = loaded.model.generation_config
    # What else a folder asks for, a repetition penalty for instance, would not be what was asked.
    loaded.model.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id,
        pad_token_id=loaded.first,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=top_p if temperature else None,
        top_k=0 if temperature else None,
    )
    tokens = torch.tensor([[loaded.first, *loaded.encode(prompt)]], device=loaded.model.device)
    length = tokens.shape[1]
    loaded.check_length(length + max_new_tokens)
    printer = Printer(loaded, stop, echo)
    with progress_bar(length, "token", "prompt", enabled=length > prefill_chunk_size) as bar:

        def count(model, inputs, output) -> None:
            bar.update(output.last_hidden_state.shape[1])

        reading = loaded.model.base_model.register_forward_hook(count)

        def read() -> None:
            reading.remove()
            bar.close()

        try:
            loaded.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                prefill_chunk_size=prefill_chunk_size,
                streamer=AfterPrompt(printer, read),
                stopping_criteria=StoppingCriteriaList([StopsWith(printer)]),
            )
        finally:
            reading.remove()  # also where the prompt was not read to its end
    ends = printer.stopped or printer.tokens[-1] in _ids(own.eos_token_id)
    return Continuation(printer.printed, ended=ends)


@dataclass(frozen=True)
class Continuation:
    """text: what the model has written, as it was printed. ended: by itself or by a text to stop
    at, not for its length."""

    text: str
    ended: bool


def _ids(eos: int | list[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else eos


class StopsWith(StoppingCriteria):
    """Ends a generation when the printer has met a text to stop at."""

    def __init__(self, printer: Printer):
        self.printer = printer

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.printer.stopped, device=input_ids.device)


class AfterPrompt(BaseStreamer):
    """Holds the prompt back until it is read: on a terminal its bar and its text would mix."""

    def __init__(self, streamer: BaseStreamer, on_read: Callable[[], object]):
        self.streamer, self.on_read, self.prompt = streamer, on_read, None

    def put(self, value: torch.Tensor) -> None:
        """value: token ids; the first call has the prompt's."""
        if self.on_read is None:
            self.streamer.put(value)
        elif self.prompt is None:
            self.prompt = value
        else:
            self.on_read()
            self.on_read = None
            self.streamer.put(self.prompt)
            self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


class Printer(BaseStreamer):
    """Prints the text of the tokens that it is given, as soon as it is certain: a character may be
    made of several tokens, and what could begin a text to stop at waits for the rest.

    stopped: whether such a text has come. printed: what follows the prompt, without it.
    """

    def __init__(self, loaded: LoadedModel, stop: Sequence[str] = (), echo: bool = True):
        self.decode, self.stop, self.echo = loaded.decode, stop, echo
        self.stopped, self.printed, self.waiting = False, "", ""
        # Text is decoded from a little before what is new: from `start` on, with `known` tokens of
        # it printed already, since a token's text may depend on the one before it.
        self.tokens, self.start, self.known = None, 0, 0

    def put(self, value: torch.Tensor) -> None:
        """value: token ids; the first call has the prompt's, after the token before the text."""
        ids = value.flatten().tolist()
        is_prompt = self.tokens is None
        if is_prompt:
            self.tokens = ids[1:]
        else:
            self.tokens += ids
        new = self._new_text()
        if new and not new.endswith("\N{REPLACEMENT CHARACTER}"):
            self.start, self.known = self.known, len(self.tokens)
            if not is_prompt:
                self._write(new)
            elif self.echo:
                print(new, end="", flush=True)

    def end(self) -> None:
        """The last of it, with a line's end."""
        self._write(self._new_text(), is_last=True)
        print(flush=True)

    def _write(self, new: str, is_last: bool = False) -> None:
        text = self.waiting + new
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if self.stopped or found:
            certain = 0 if self.stopped else min(found)
            self.stopped = True
        elif is_last:
            certain = len(text)
        else:
            certain = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        print(text[:certain], end="", flush=True)
        self.printed += text[:certain]
        self.waiting = text[certain:]

    def _new_text(self) -> str:
        before = self.decode(self.tokens[self.start : self.known])
        return self.decode(self.tokens[self.start :])[len(before) :]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
