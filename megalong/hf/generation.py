"""A text continued by a model, printed as it comes.

By any model that `megalong.hf.loaded_model` loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from megalong.hf.loaded_model import LoadedModel
from megalong.utils.progress import progress_bar


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
