"""The texts that a run continues while it trains (`--sample-prompts`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megalong.config import Config
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.utils.errors import UserError, system_errors_of


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and its tokens as the beginning of a document."""

    text: str
    tokens: tuple[int, ...]


def prompts_of(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """What `--sample-prompts` has. Raises UserError for a file that cannot be read or has no text,
    and where a prompt is too long to be continued."""
    samples, seq_length = config.samples, config.model.seq_length
    if samples.sample_prompts is None:
        return []
    first = tokenizer.bos if config.data.prepend_bos else tokenizer.eod
    assert first is not None and samples.sample_tokens is not None
    found = []
    for text in _texts(samples.sample_prompts):
        try:
            tokens = (first, *tokenizer.encode(text))
        except UnicodeEncodeError:
            raise UserError(f"--sample-prompts {text!r}: not a text of UTF-8") from None
        if len(tokens) + samples.sample_tokens > seq_length:
            raise UserError(
                f"--sample-prompts {text[:20]!r}: {len(tokens)} tokens, and --sample-tokens"
                f" {samples.sample_tokens} more, are longer than --seq-length {seq_length}: shorten"
                " one of the two"
            )
        found.append(Prompt(text, tokens))
    return found


def _texts(given: Iterable[str]) -> Iterable[str]:
    for text in given:
        if not text.endswith(".txt"):
            yield text
            continue
        try:
            with system_errors_of("--sample-prompts", text):
                lines = [line for line in Path(text).read_text("utf-8").splitlines() if line]
        except UnicodeDecodeError as error:
            raise UserError(f"--sample-prompts {text}: not UTF-8 (byte {error.start})") from None
        if not lines:
            raise UserError(f"--sample-prompts {text}: there is no text in it")
        yield from lines
