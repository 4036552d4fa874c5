"""Tokenizers behind one small interface.

A tokenizer here is a table of byte strings, one per id, and a way to cut a text into ids. The
table makes decoding exact (concatenate the bytes) and says how many bytes each id stands for, so
that bits per byte can be computed for any set of predicted tokens.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING

from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

SENTENCEPIECE_SPACE = "\u2581"  # SentencePiece writes a space as this character
EOD_PIECE = "<eod>"
MASK_PIECE = "<mask>"

# A kind of tokenizer is a class in a file of its own, imported when it is needed. Its only argument
# is `tokenizer_model`, but for that of bytes.
TOKENIZERS = MappingProxyType(
    {
        "SentencePieceTokenizer": f"{__package__}.sentencepiece_tokenizer:SentencePieceTokenizer",
        "HuggingFaceTokenizer": f"{__package__}.huggingface_tokenizer:HuggingFaceTokenizer",
        "TikTokenizer": f"{__package__}.tiktoken_tokenizer:TiktokenTokenizer",
        "ByteTokenizer": f"{__package__}.tokenizer:ByteTokenizer",
    }
)

# What a tokenizer meant for raw text must give back unchanged.
_LOSSLESS_PROBE = " a  b\tc\n\n    d\r\n e\u0301 \u00e9\u3042\U0001f600\u2581\u2047\0 "


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None = None, with_mask: bool = False
) -> Tokenizer:
    """Builds a tokenizer.

    tokenizer_type: "SentencePieceTokenizer" (tokenizer_model: the .model file),
        "HuggingFaceTokenizer" (tokenizer_model: a local folder), "TikTokenizer" (tokenizer_model:
        a .tiktoken file, or a .json that describes an encoding) or "ByteTokenizer" (no model).
    with_mask: with a mask token, as a masked-language model's is (`Tokenizer.with_mask`).
    Raises UserError for an unknown type, for a model that is missing or unusable, and where
    transformers or tiktoken is needed and not installed.
    """
    tokenizer = _build_tokenizer(tokenizer_type, tokenizer_model)
    return tokenizer.with_mask() if with_mask else tokenizer


def _build_tokenizer(tokenizer_type: str, tokenizer_model: str | None) -> Tokenizer:
    if tokenizer_type not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise UserError(f"--tokenizer-type {tokenizer_type}: unknown, choose one of {known}")
    if tokenizer_type == "ByteTokenizer":
        return ByteTokenizer()
    if not tokenizer_model:
        raise UserError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    if not Path(tokenizer_model).exists():
        raise UserError(f"--tokenizer-model {tokenizer_model}: no such file or folder")
    tokenizer = resolve_name(TOKENIZERS[tokenizer_type])(tokenizer_model)
    if tokenizer.decode(tokenizer.encode(_LOSSLESS_PROBE)) != _LOSSLESS_PROBE:
        warnings.warn(
            f"--tokenizer-model {tokenizer_model} does not give every text back unchanged (it "
            "normalizes, adds a prefix, or has no byte fallback): bits per byte are approximate",
            stacklevel=2,
        )
    return tokenizer


class Tokenizer(ABC):
    """Text to ids and back. `pieces[i]` is what id i stands for; special tokens: b""."""

    def __init__(
        self, pieces: list[bytes], eod: int, bos: int | None = None, mask: int | None = None
    ) -> None:
        self.pieces = pieces
        self._eod = eod
        self._bos = bos
        self._mask = mask

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text. No special token is added, and none can be smuggled in by the text.

        Raises UnicodeEncodeError for text that UTF-8 cannot express (lone surrogates).
        """

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as an array of integers."""
        import numpy as np

        return np.array(self.encode(text), dtype=np.int32)

    def fast_encoder(self) -> Callable[[str], np.ndarray]:
        """`encode_array` by a faster library, which cuts texts into the same ids as far as is
        known (`backend` has it proven). Raises UserError: why there is none."""
        raise UserError(f"{type(self).__name__} has no faster library")

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id is in [0, vocab_size)."""
        return len(self.pieces)

    @property
    def text_ids(self) -> list[int]:
        """The ids that stand for text, and not for something special."""
        return [token for token, piece in enumerate(self.pieces) if piece]

    @property
    def special_names(self) -> list[str]:
        """How special tokens are written, where they are known; in a text that is text."""
        return []

    @property
    def eod(self) -> int:
        """The id that ends a document."""
        return self._eod

    @property
    def bos(self) -> int | None:
        """The id that begins a document in data made with --prepend-bos, if there is one."""
        return self._bos

    @property
    def mask(self) -> int | None:
        """The id that stands where a masked-language model has to tell the token, if there is
        one."""
        return self._mask

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides about the ids of a text: the vocabulary, how its pieces are
        joined, and the end of a document. The same wherever the tokenizer's files are."""
        digest = hashlib.sha256(str(self._eod).encode())
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        digest.update(self._joins())
        return digest.hexdigest()

    def _joins(self) -> bytes:
        """What besides the pieces decides how a text is cut: merges, or scores."""
        return b""

    def with_mask(self) -> Tokenizer:
        """This tokenizer, or where it has no mask token a copy that has one more id for it, behind
        all others: texts have the same ids. Raises UserError where none can be added."""
        if self._mask is not None:
            return self
        return self.masking_with(self.vocab_size, [*self.pieces, b""])

    def masking_with(self, mask: int, pieces: list[bytes]) -> Tokenizer:
        """A copy with this mask token, and these pieces."""
        copied = copy.copy(self)
        copied.pieces, copied._mask = pieces, mask
        return copied

    def decode(self, ids) -> str:
        """The text of any sequence of ids. Special tokens are dropped; bytes that are not UTF-8
        (a character cut in two) become U+FFFD. Raises IndexError for an id out of range."""
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:  # Python would count from the end of the table
            raise IndexError(f"token id {min(ids)} is negative")
        return b"".join([self.pieces[i] for i in ids]).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): the number of UTF-8 bytes that each id stands for."""
        import numpy as np

        return np.array([len(piece) for piece in self.pieces], dtype=np.int32)


class ByteTokenizer(Tokenizer):
    """The 256 byte values, and 256 as the end of a document. Needs no model file."""

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)] + [b""], eod=256)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_array(self, text: str) -> np.ndarray:
        import numpy as np

        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
