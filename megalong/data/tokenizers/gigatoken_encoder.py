"""gigatoken, a fast library for byte-pair encodings, as an encoder of ours: text to ids.

It takes the names of special tokens in a text for these tokens, and ours never do: so it is given
an encoding without any.
"""

from __future__ import annotations

import base64
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from megalong.data.tokenizers.tokenizer import SENTENCEPIECE_SPACE
from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from megalong.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
    from megalong.data.tokenizers.tiktoken_tokenizer import TiktokenTokenizer

# Its names of the ways to split a text that tiktoken spells so.
_SCHEMES = {"r50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}


class GigatokenEncoder:
    """Text to ids, an array of integers. What the library remembers of texts has no bound, until
    `forget`; a copy in another process begins without any."""

    def __init__(
        self,
        load: Callable[[ModuleType], Any],
        *,
        offset: int = 0,
        stand_in: list[int] | None = None,
    ) -> None:
        """load: makes a tokenizer of the library; can be pickled. offset: is added to all ids.
        stand_in: the ids of SentencePiece's stand-in for a space, where a text has that character
        itself. Raises UserError: why there is none."""
        self._load, self._offset, self._stand_in = load, offset, stand_in
        self._encode: Callable[[bytes], np.ndarray] | None = _loaded(load).encode

    def __call__(self, text: str) -> np.ndarray:
        if self._encode is None:
            self._encode = _loaded(self._load).encode
        if self._stand_in is not None and SENTENCEPIECE_SPACE in text:
            first, *rest = text.encode("utf-8").split(SENTENCEPIECE_SPACE.encode("utf-8"))
            parts = [self._encode(first)]
            for part in rest:
                parts += [self._stand_in, self._encode(part)]
            return np.concatenate(parts)
        ids = self._encode(text.encode("utf-8"))
        return ids + np.uint32(self._offset) if self._offset else ids

    def forget(self) -> None:
        """Gives back the library's memory, until it is needed again."""
        self._encode = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_encode": None}


def of_tokenizer_json(content: str) -> GigatokenEncoder:
    """The encoder of Transformers' tokenizer.json. Raises UserError, as all of these do: why there
    is none."""
    described = json.loads(content)
    described["added_tokens"] = [t for t in described["added_tokens"] if not t["special"]]
    described["post_processor"] = None
    return GigatokenEncoder(functools.partial(_of_json, json.dumps(described)))


def of_sentencepiece(tokenizer: SentencePieceTokenizer) -> GigatokenEncoder:
    """The encoder of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    proto = protobuf.ModelProto()
    proto.ParseFromString(tokenizer.model_bytes)
    normal = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
    for i, piece in enumerate(proto.pieces):
        if piece.type in (piece.BYTE, piece.UNKNOWN) and _can_be_merged(piece.piece, normal):
            raise UserError(f"gigatoken would put the piece {piece.piece} together from others")
        if piece.type == piece.CONTROL:
            piece.type, piece.piece = piece.UNUSED, f"\0control{i}\0"  # in no text's pieces
    load = functools.partial(_of_model, proto.SerializeToString())
    # The library makes a tokenizer.json of a model first, which takes five times as long as the
    # rest, and would be done in every process and whenever it is to forget.
    content = getattr(_loaded(load), "_hf_json", None)
    if content is not None:
        load = functools.partial(_of_json, content)
    return GigatokenEncoder(load, stand_in=tokenizer.stand_in_ids)


def _can_be_merged(piece: str, others: set[str]) -> bool:
    return any(piece[:i] in others and piece[i:] in others for i in range(1, len(piece)))


def of_tiktoken(tokenizer: TiktokenTokenizer) -> GigatokenEncoder:
    """The encoder of an encoding of tiktoken, if it splits texts in a way that gigatoken has."""
    from megalong.data.tokenizers.tiktoken_tokenizer import PATTERNS

    known = {PATTERNS[name]: scheme for name, scheme in _SCHEMES.items()}
    scheme = known.get(tokenizer.pattern)
    if scheme is None:
        raise UserError("gigatoken does not know the pattern that this encoding splits texts by")
    ranked = sorted(tokenizer.ranks.items(), key=lambda pair: pair[1])
    first = ranked[0][1]
    lines = (f"{base64.b64encode(piece).decode()} {i - first}\n" for piece, i in ranked)
    return GigatokenEncoder(functools.partial(_of_ranks, "".join(lines), scheme), offset=first)


def _of_json(content: str, library: ModuleType) -> Any:
    return library.Tokenizer.from_json(content)


def _of_model(content: bytes, library: ModuleType) -> Any:
    return library.Tokenizer.from_sentencepiece(content)


def _of_ranks(lines: str, scheme: str, library: ModuleType) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "encoding.tiktoken")
        file.write_text(lines)
        return library.Tokenizer.from_tiktoken(file, scheme, {})


def _loaded(load: Callable[[ModuleType], Any]) -> Any:
    try:
        import gigatoken
    except ImportError as error:
        raise UserError("a faster one is gigatoken: pip install gigatoken") from error
    try:
        return load(gigatoken)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever it says of an encoding; its panics are no Exception
        reason = " ".join(str(error).split())  # in one line
        raise UserError(f"gigatoken does not do this tokenizer ({reason})") from error
