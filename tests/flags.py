"""Flags as a configuration of so many ranks."""

from megalong.config import Config
from megalong.config.arguments import parse_arguments

NEEDED = ["--data-path", "data", "--tokenizer-type", "ByteTokenizer"]


def resolve(*flags: str, ranks: int = 1) -> Config:
    return parse_arguments([*NEEDED, *map(str, flags)]).resolve(ranks)
