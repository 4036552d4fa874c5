"""gigatoken, a fast library for byte-pair encodings, as an encoder of ours: text to ids.

It takes the names of special tokens in a text for these tokens, and ours never do: so it is given
an encoding without any.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalong.data.tokenizers.tokenizer import SENTENCEPIECE_SPACE
from megalong.errors import UserError

if TYPE_CHECKING:
    from megalong.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
    from megalong.data.tokenizers.tiktoken_tokenizer import TiktokenTokenizer

Encoder = Callable[[str], np.ndarray]

# Its names of the ways to split a text that tiktoken spells so.
_SCHEMES = {"r50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}


def of_tokenizer_json(content: str) -> Encoder:
    """The encoder of Transformers' tokenizer.json. Raises UserError, as all of these do: why there
    is none."""
    described = json.loads(content)
    described["added_tokens"] = [t for t in described["added_tokens"] if not t["special"]]
    described["post_processor"] = None
    return _encoder(lambda library: library.Tokenizer.from_json(json.dumps(described)))


def of_sentencepiece(tokenizer: SentencePieceTokenizer) -> Encoder:
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
    content = proto.SerializeToString()
    encode = _encoder(lambda library: library.Tokenizer.from_sentencepiece(content))
    stand_in = tokenizer.stand_in_ids

    def encode_around_stand_in(text: str) -> np.ndarray:
        if stand_in is None or SENTENCEPIECE_SPACE not in text:
            return encode(text)
        first, *rest = text.split(SENTENCEPIECE_SPACE)
        parts = [encode(first)]
        for part in rest:
            parts += [stand_in, encode(part)]
        return np.concatenate(parts)

    return encode_around_stand_in


def _can_be_merged(piece: str, others: set[str]) -> bool:
    return any(piece[:i] in others and piece[i:] in others for i in range(1, len(piece)))


def of_tiktoken(tokenizer: TiktokenTokenizer) -> Encoder:
    """The encoder of an encoding of tiktoken, if it splits texts in a way that gigatoken has."""
    from megalong.data.tokenizers.tiktoken_tokenizer import PATTERNS

    known = {PATTERNS[name]: scheme for name, scheme in _SCHEMES.items()}
    scheme = known.get(tokenizer.pattern)
    if scheme is None:
        raise UserError("gigatoken does not know the pattern that this encoding splits texts by")
    ranked = sorted(tokenizer.ranks.items(), key=lambda pair: pair[1])
    first = ranked[0][1]
    lines = (f"{base64.b64encode(piece).decode()} {i - first}\n" for piece, i in ranked)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "encoding.tiktoken")
        file.write_text("".join(lines))
        encode = _encoder(lambda library: library.Tokenizer.from_tiktoken(file, scheme, {}))
    return encode if first == 0 else lambda text: encode(text) + np.uint32(first)


def _encoder(build: Callable) -> Encoder:
    try:
        import gigatoken
    except ImportError as error:
        raise UserError("a faster one is gigatoken: pip install gigatoken") from error
    try:
        encode = build(gigatoken).encode
    except Exception as error:  # whatever it says of an encoding that it does not do
        raise UserError(f"gigatoken does not do this tokenizer ({error})") from error
    return lambda text: encode(text.encode("utf-8"))
