"""Tokenizers behind one small interface.

A tokenizer here is a table of byte strings, one per id, and a way to cut a text into ids. The
table makes decoding exact (concatenate the bytes) and says how many bytes each id stands for, so
that bits per byte can be computed for any set of predicted tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megalong.errors import UserError

if TYPE_CHECKING:
    import numpy as np

SENTENCEPIECE_SPACE = "\u2581"  # SentencePiece writes a space as this character
EOD_PIECE = "<eod>"
MASK_PIECE = "<mask>"

# What a tokenizer meant for raw text must give back unchanged.
_LOSSLESS_PROBE = " a  b\tc\n\n    d\r\n e\u0301 \u00e9\u3042\U0001f600\u2581\u2047\0 "


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None = None, with_mask: bool = False
) -> Tokenizer:
    """Builds a tokenizer.

    tokenizer_type: "SentencePieceTokenizer" (tokenizer_model: the .model file),
        "HuggingFaceTokenizer" (tokenizer_model: a local folder) or "ByteTokenizer" (no model).
    with_mask: with a mask token, as a masked-language model's is (`Tokenizer.with_mask`).
    Raises UserError for an unknown type, for a model that is missing or unusable, and where
    transformers is needed and not installed.
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
    tokenizer = TOKENIZERS[tokenizer_type](tokenizer_model)
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

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id is in [0, vocab_size)."""
        return len(self.pieces)

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
        larger = copy.copy(self)
        larger.pieces, larger._mask = [*self.pieces, b""], self.vocab_size
        return larger

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


_CUT_CHARACTERS = 4096
_WORD_END = re.compile("[^ ] ")
_WORD_END_BYTES = re.compile(b"[^ ] ")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file, as tools/train_tokenizer.py writes it."""

    def __init__(self, model_file: str) -> None:
        import sentencepiece

        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--tokenizer-model {model_file}: not a SentencePiece model ({error})"
            ) from error
        self._model = model
        eod = model.eos_id()
        if eod < 0:
            eod = model.piece_to_id(EOD_PIECE)
            if model.is_unknown(eod):
                raise UserError(
                    f"--tokenizer-model {model_file}: the model has neither an end-of-sentence "
                    f"token nor a piece {EOD_PIECE} to end documents with"
                )
        bos = model.bos_id() if model.bos_id() >= 0 else None
        mask = model.piece_to_id(MASK_PIECE)
        super().__init__(
            [self._piece_bytes(i) for i in range(model.get_piece_size())],
            eod,
            bos,
            mask if model.is_control(mask) else None,
        )
        self._mask_piece = None if model.is_unknown(mask) else mask
        # The library takes the space's stand-in for a space, so that this one character is
        # spelled with byte tokens instead (where the model has them).
        self._stand_in = [
            model.piece_to_id(f"<0x{byte:02X}>") for byte in SENTENCEPIECE_SPACE.encode()
        ]
        self._has_bytes = all(model.is_byte(i) for i in self._stand_in)
        # A model whose pieces never go on after a word and its space, and that leaves spaces as
        # they are, gives the same ids for a text cut between words.
        spaces = b"".join(self.pieces[i] for i in model.encode(" a  b "))
        self._may_cut = spaces == b" a  b " and not any(map(_WORD_END_BYTES.search, self.pieces))

    def with_mask(self) -> Tokenizer:
        """As of any tokenizer, but that a piece `<mask>`, a user-defined one say, is the mask token
        of the copy, and stands for no text there. Texts with this word still have its id."""
        if self._mask is not None or self._mask_piece is None:
            return super().with_mask()
        copied = copy.copy(self)
        copied._mask, copied.pieces = self._mask_piece, list(self.pieces)
        copied.pieces[self._mask_piece] = b""
        return copied

    def encode(self, text: str) -> list[int]:
        text.encode("utf-8")  # a UnicodeEncodeError that says where, unlike the library's
        if SENTENCEPIECE_SPACE not in text or not self._has_bytes:
            return self._encode(text)
        first, *rest = text.split(SENTENCEPIECE_SPACE)
        ids = self._encode(first)
        for part in rest:
            ids += self._stand_in + self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        """The library's time grows faster than the text, so that long documents are cut."""
        if len(text) <= _CUT_CHARACTERS or not self._may_cut:
            return self._model.encode(text)
        ids: list[int] = []
        start = 0
        while start < len(text):
            end = _WORD_END.search(text, start + _CUT_CHARACTERS)
            stop = end.start() + 1 if end else len(text)
            ids += self._model.encode(text[start:stop])
            start = stop
        return ids

    def _joins(self) -> bytes:
        import numpy as np

        scores = [self._model.get_score(i) for i in range(self._model.get_piece_size())]
        return np.array(scores, dtype="<f4").tobytes()

    def _piece_bytes(self, i: int) -> bytes:
        model = self._model
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            return b""
        piece = model.id_to_piece(i)
        if model.is_byte(i):
            return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
        return piece.replace(SENTENCEPIECE_SPACE, " ").encode("utf-8")


class HuggingFaceTokenizer(Tokenizer):
    """A local folder that Transformers' AutoTokenizer loads as a fast tokenizer."""

    def __init__(self, folder: str) -> None:
        if Path(folder).is_file() and Path(folder).suffix == ".model":
            raise UserError(
                f"--tokenizer-model {folder}: a file of SentencePiece, not a folder of"
                " Transformers: set --tokenizer-type SentencePieceTokenizer"
            )
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(
                "--tokenizer-type HuggingFaceTokenizer needs the transformers package: "
                "pip install transformers"
            ) from error
        try:
            # Local files only: a job on a cluster must not depend on a download.
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--tokenizer-model {folder}: {error}") from error
        if not tokenizer.is_fast:
            raise UserError(f"--tokenizer-model {folder}: not a fast tokenizer (tokenizer.json)")
        if tokenizer.eos_token_id is None:
            raise UserError(f"--tokenizer-model {folder}: the tokenizer has no eos_token")
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True  # "<eos>" inside a text is just text
        self._backend.no_truncation()
        self._backend.no_padding()
        pieces = _huggingface_pieces(self._backend, set(tokenizer.all_special_ids), folder)
        ids = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id
        super().__init__(pieces, *ids)
        self._folder = str(folder)

    def with_mask(self) -> Tokenizer:
        if self._mask is None:
            raise UserError(
                f"--objective mlm: the tokenizer in {self._folder} has no mask_token: add one"
                " with Transformers' add_special_tokens, save it, and preprocess the text again"
            )
        return self

    def __setstate__(self, state: dict) -> None:
        """A copy in another process needs the package tokenizers only."""
        self.__dict__ |= state
        self._backend.encode_special_tokens = True  # which the library does not keep in a pickle

    def encode(self, text: str) -> list[int]:
        text.encode("utf-8")
        return self._backend.encode(text, add_special_tokens=False).ids

    def _joins(self) -> bytes:
        # Earlier versions of the library write a merge as "a b", later ones as ["a", "b"].
        model = json.loads(self._backend.to_str())["model"]
        merges = model.get("merges", ())
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        scores = [piece[1] for piece in model["vocab"]] if isinstance(model["vocab"], list) else []
        return json.dumps([pairs, scores]).encode()


def _huggingface_pieces(backend, special_ids: set[int], folder: str) -> list[bytes]:
    """The bytes of every id of a fast tokenizer, from the two ways such vocabularies spell bytes:
    GPT-2's alphabet of 256 printable characters, or SentencePiece's "<0x0A>", with or without its
    "\u2581" for a space."""
    decoder = str(json.loads(backend.to_str())["decoder"])
    if "ByteLevel" in decoder:
        spell = _byte_level_bytes
    elif SENTENCEPIECE_SPACE in decoder:
        spell = _sentencepiece_bytes
    elif "ByteFallback" in decoder:
        spell = _byte_fallback_bytes
    else:
        raise UserError(
            f"--tokenizer-model {folder}: how its tokens spell bytes is unknown (neither "
            "byte-level nor SentencePiece-like), so that bits per byte cannot be computed"
        )
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
        if i in added:  # stored as plain text, whatever the alphabet of the others
            pieces[i] = b"" if added[i].special or i in special_ids else piece.encode("utf-8")
        elif i not in special_ids:
            pieces[i] = spell(piece)
    return pieces


def _byte_level_bytes(piece: str) -> bytes:
    return bytes(_BYTE_OF_CHARACTER[character] for character in piece)


def _sentencepiece_bytes(piece: str) -> bytes:
    return _byte_fallback_bytes(piece.replace(SENTENCEPIECE_SPACE, " "))


def _byte_fallback_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.encode("utf-8")


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the other
    bytes, in order, for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHARACTER = byte_level_alphabet()

TOKENIZERS = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "ByteTokenizer": ByteTokenizer,
}
