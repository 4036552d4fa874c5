"""A text continued by a model, printed as it comes.

By any model that `megalong.hf.loaded_model` loads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from megalong.hf.loaded_model import LoadedModel
from megalong.progress import progress_bar


def continue_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    prefill_chunk_size: int,
) -> None:
    """Print the prompt and what the model makes of it, as the beginning of a document.

    temperature: 0 takes the likeliest token always. top_p: draw from the likeliest tokens of this
    share. prefill_chunk_size: tokens of the prompt read at once.
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
                streamer=AfterPrompt(Printer(loaded), read),
            )
        finally:
            reading.remove()  # also where the prompt was not read to its end


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
    made of several tokens."""

    def __init__(self, loaded: LoadedModel):
        self.decode = loaded.decode
        # Text is decoded from a little before what is new: from `start` on, with `known` tokens of
        # it printed already, since a token's text may depend on the one before it.
        self.tokens, self.start, self.known = None, 0, 0

    def put(self, value: torch.Tensor) -> None:
        """value: token ids; the first call has the prompt's, after the token before the text."""
        ids = value.flatten().tolist()
        if self.tokens is None:
            self.tokens = ids[1:]
        else:
            self.tokens += ids
        new = self._new_text()
        if new and not new.endswith("\N{REPLACEMENT CHARACTER}"):
            print(new, end="", flush=True)
            self.start, self.known = self.known, len(self.tokens)

    def end(self) -> None:
        print(self._new_text(), flush=True)

    def _new_text(self) -> str:
        before = self.decode(self.tokens[self.start : self.known])
        return self.decode(self.tokens[self.start :])[len(before) :]
