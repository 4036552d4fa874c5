"""Tokenizers that are an encoding of tiktoken, from files of this machine.

A .tiktoken file has the ranks of an encoding, a base64 token and its rank a line; how a text is
split and which special tokens there are stands in the code that uses it. So --tokenizer-model is
- a .tiktoken file that tiktoken itself knows (r50k_base, p50k_base, cl100k_base, o200k_base), by
  what is in it and not by its name; or
- a .json file that says all there is to know, a `Description`; or
- a .json file of ranks as Megatron-LM's TikTokenizer reads it, with Megatron's special tokens and
  its pattern "v2".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.utils.errors import UserError

_END = "<|endoftext|>"
_FILL = {"<|fim_prefix|>": 0, "<|fim_middle|>": 1, "<|fim_suffix|>": 2}

# How texts are split before they are merged. The first three are tiktoken's, v1 and v2 Megatron's.
PATTERNS = MappingProxyType(
    {
        "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
        r"|\s++$|\s+(?!\S)|\s",
        "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        "o200k_base": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
        r"|\s+(?!\S)|\s+",
        "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)

# gigatoken's names of the ways to split a text.
_SCHEMES = {"r50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}

# By the SHA-256 of the file: the pattern, and the special tokens.
_PUBLISHED = MappingProxyType(
    {
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": (
            "r50k_base",
            {_END: 50_256},
        ),
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": (
            "r50k_base",  # p50k_base
            {_END: 50_256},
        ),
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (
            "cl100k_base",
            {_END: 100_257, "<|endofprompt|>": 100_276}
            | {name: 100_258 + i for name, i in _FILL.items()},
        ),
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": (
            "o200k_base",
            {_END: 199_999, "<|endofprompt|>": 200_018},
        ),
    }
)

# Megatron's special tokens come before the ranks, the named ones first.
_MEGATRON_NAMES = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_MEGATRON_SPECIAL = 1000
_MEGATRON_IDS = 1 << 17


@dataclass(frozen=True)
class Description:
    """An encoding, as a .json file has it.

    ranks: name of the file with the ranks, beside this one; .tiktoken, or Megatron's .json.
    pattern: a regular expression, or the name of one of PATTERNS.
    special_tokens: name -> id, or names, which have the ids behind the ranks.
    offset: what is added to a rank for its id. max_ranks: those from here on are left out.
    eod, bos, mask: the names of special tokens.
    """

    ranks: str
    pattern: str
    special_tokens: dict[str, int] | list[str] = field(default_factory=lambda: [_END])
    offset: int = 0
    max_ranks: int | None = None
    eod: str = _END
    bos: str | None = None
    mask: str | None = None


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken."""

    def __init__(self, model_file: str) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise UserError(
                "--tokenizer-type TikTokenizer needs the tiktoken package: pip install tiktoken"
            ) from error
        flag = f"--tokenizer-model {model_file}"
        description, ranks = _read(Path(model_file), flag)
        special = description.special_tokens
        if not isinstance(special, dict):
            first = max(ranks.values()) + 1
            special = {name: first + i for i, name in enumerate(special)}
        pattern = PATTERNS.get(description.pattern, description.pattern)
        _check(ranks, special, description, flag)
        try:
            self.library = tiktoken.Encoding(
                "megalong", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{flag}: tiktoken takes it for no encoding ({error})") from error
        pieces = [b""] * (max(*ranks.values(), *special.values()) + 1)
        for piece, i in ranks.items():
            pieces[i] = piece
        names = (description.eod, description.bos, description.mask)
        super().__init__(pieces, *(special.get(name) for name in names))
        self.pattern, self.ranks, self.special_tokens = pattern, ranks, special

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        text.encode("utf-8")  # the library puts something else for half a surrogate pair
        return self.library.encode_to_numpy(text, disallowed_special=())

    def _joins(self) -> bytes:
        return self.pattern.encode()

    @property
    def special_names(self) -> list[str]:
        return list(self.special_tokens)

    def fast_encoder(self) -> Callable[[str], np.ndarray]:
        from megalong.data.tokenizers.backend import of_ranks

        schemes = {PATTERNS[name]: scheme for name, scheme in _SCHEMES.items()}
        if self.pattern not in schemes:
            raise UserError(
                "gigatoken does not know the pattern that this encoding splits texts by"
            )
        return of_ranks(self.ranks, schemes[self.pattern])


def _read(path: Path, flag: str) -> tuple[Description, dict[bytes, int]]:
    """An encoding's description, and its ids by token."""
    if path.is_dir():
        raise UserError(f"{flag}: a folder; give the .tiktoken or .json file in it")
    try:
        content = path.read_bytes()
        description = _description(path, content, flag)
        ranks_file = path.parent / description.ranks
        ranks = _ranks(ranks_file.read_bytes())
    except OSError as error:
        raise UserError(f"{flag}: {error.filename}: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise UserError(
            f"{flag}: neither base64 tokens and their ranks, a pair a line, nor Megatron's list of"
            f' {{"rank": ..., "token_bytes": ...}} ({error})'
        ) from error
    kept = ranks if description.max_ranks is None else ranks[: description.max_ranks]
    return description, {piece: rank + description.offset for piece, rank in kept}


def _description(path: Path, content: bytes, flag: str) -> Description:
    if path.suffix != ".json":
        published = _PUBLISHED.get(hashlib.sha256(content).hexdigest())
        if published is None:
            raise UserError(
                f"{flag}: not one of the encodings that tiktoken publishes, so that a .json file is"
                f' to describe it: {{"ranks": "{path.name}", "pattern": "{next(iter(PATTERNS))}, or'
                f' a regular expression", "special_tokens": ["{_END}"], "eod": "{_END}"}}'
            )
        return Description(path.name, *published)
    described = json.loads(content)
    if isinstance(described, list):
        return Description(
            path.name,
            "v2",
            _megatron_special(),
            offset=_MEGATRON_SPECIAL,
            max_ranks=_MEGATRON_IDS - _MEGATRON_SPECIAL,
            eod="</s>",
            bos="<s>",
            mask="<mask>",
        )
    known = {entry.name for entry in fields(Description)}
    missing = {"ranks", "pattern"} - described.keys()
    for name in sorted(missing | described.keys() - known):
        what = "is missing" if name in missing else f"is unknown, unlike {', '.join(sorted(known))}"
        raise UserError(f"{flag}: {name!r} {what}")
    return Description(**described)


def _megatron_special() -> dict[str, int]:
    others = [f"<SPECIAL_{i}>" for i in range(len(_MEGATRON_NAMES), _MEGATRON_SPECIAL)]
    return {name: i for i, name in enumerate([*_MEGATRON_NAMES, *others])}


def _ranks(content: bytes) -> list[tuple[bytes, int]]:
    """Tokens and their ranks. Raises ValueError, KeyError, TypeError."""
    if content.lstrip().startswith(b"["):
        rows = json.loads(content)
        return [(base64.b64decode(row["token_bytes"]), row["rank"]) for row in rows]
    pairs = (line.split() for line in content.splitlines() if line)
    return [(base64.b64decode(token, validate=True), int(rank)) for token, rank in pairs]


def _check(
    ranks: dict[bytes, int], special: dict[str, int], description: Description, flag: str
) -> None:
    """Raises UserError where texts or documents could not be spelled."""
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{flag}: some of the 256 single bytes have no rank")
    ids: list[Any] = [*ranks.values(), *special.values()]
    if len(set(ids)) != len(ids) or min(ids) < 0:
        raise UserError(f"{flag}: two tokens have one id, or one has an id below 0")
    for role in ("eod", "bos", "mask"):
        name = getattr(description, role)
        if name not in special and (role == "eod" or name is not None):
            raise UserError(f"{flag}: {role} {name!r} is not among the special_tokens")
