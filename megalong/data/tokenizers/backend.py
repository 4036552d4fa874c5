"""gigatoken, a faster library for byte-pair encodings, in the place of the usual ones.

It is used where it gives the same ids for a sample of the texts that are to be tokenized. It takes
the names of special tokens in a text for these tokens, and ours never do, so it is given an
encoding without any.
"""

from __future__ import annotations

import base64
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megalong.data.formats import raw_documents, texts
from megalong.data.text.documents import BrokenDocument, Reading
from megalong.data.text.files import is_stream, shown
from megalong.data.tokenizers.tokenizer import SENTENCEPIECE_SPACE, ByteTokenizer, Tokenizer
from megalong.utils.errors import UserError, counted
from megalong.utils.machine import give_back_memory, resident_bytes

BACKENDS = ("auto", "fast", "usual")

# What libraries differ in, if in anything.
_PROBES = (
    "",
    " a  b\tc\n\n    d\r\n e\u0301 \u00e9\u3042\U0001f600\u2581\u2047\0 ",
    "It's 1234567 o'clock, THEY'LL say; don't\n\n\n  if (x) {\r\n\r\n\t\treturn -1.5e-3;  }\n",
    "<eod> <unk> <s></s> <mask> <pad> <0x0A> [MASK] <|endoftext|><|im_start|> <|begin_of_text|>",
    "aaaaaaaaaaaaaaaaaaaaaaa ==================== .................... ((((((((\\\\\\\\",
    "\u00a0\u2003 \u3000\u2028\u200b\ufeff \u0130\u01c5\u2160\u0661\u00b2 \u0e01\u0e33 \ud55c",
)
_SAMPLE_BYTES = 1 << 20
_SAMPLE_FILES = 32
_SAMPLE_TEXT = 1 << 16  # characters of a text
# What the library remembers of texts has no bound, so that it is begun anew from time to time.
_REMEMBERED = 1 << 27  # bytes that this process may grow by
_LOOKED_AT_AFTER = 1 << 22  # characters


class FastTokenizer(Tokenizer):
    """A tokenizer whose texts another library cuts into the same ids."""

    def __init__(self, usual: Tokenizer) -> None:
        """Raises UserError where there is no such library for it."""
        super().__init__(usual.pieces, usual.eod, usual.bos, usual.mask)
        self.usual = usual
        self._encoder = usual.fast_encoder()
        self.rest()

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        if self._begun_with is None:
            self._encoder("")  # loads the library's tables, which are not what it remembers
            self._begun_with = resident_bytes()
        ids = self._encoder(text)
        self._characters += len(text)
        if self._characters > _LOOKED_AT_AFTER:
            self._characters = 0
            if resident_bytes() > self._begun_with + _REMEMBERED:
                self.rest()
        return ids

    def agrees(self, text: str) -> bool:
        """Tell whether both libraries have the same ids for a text, and neither fails."""
        try:
            return self.encode_array(text).tolist() == self.usual.encode_array(text).tolist()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # such as a panic of Rust, which is no Exception
            return False

    def rest(self) -> None:
        """Give back the library's memory, until it is needed again."""
        self._encoder.forget()
        give_back_memory()
        self._characters, self._begun_with = 0, None

    def _joins(self) -> bytes:
        return self.usual._joins()

    def __getstate__(self) -> dict:
        """A copy in another process begins anew."""
        return self.__dict__ | {"_characters": 0, "_begun_with": None}


def choose_backend(
    tokenizer: Tokenizer,
    backend: str,
    files: list[str],
    reading: Reading,
    say: Callable[[str], object],
) -> Tokenizer:
    """Return the tokenizer, or a fast one that cuts probes and a sample of the files' texts alike.

    Args:
        backend: one of BACKENDS.
        say: hears which it is, and why it is not the fast one.

    Raises:
        UserError: "fast" cannot be had, or what reading the files raises.
    """
    if backend == "usual" or isinstance(tokenizer, ByteTokenizer):
        return tokenizer
    try:
        fast = FastTokenizer(tokenizer)
        stream = next(filter(is_stream, files), None)
        problem = None
        if stream is not None:
            problem = f"{shown(stream)} cannot be read twice, to compare the ids of both libraries"
    except UserError as error:
        problem = str(error)
    if problem is None:
        documents = size = 0
        for place, text in _sample(files, reading, [*_PROBES, *tokenizer.special_names]):
            if not fast.agrees(text):
                problem = f"gigatoken gives other ids than the usual library for {place}"
                break
            documents, size = documents + 1, size + len(text.encode())
    if problem is None:
        say(
            "tokenizer backend: gigatoken, which gives the usual library's ids for"
            f" {counted(documents, 'text')} of probes and of the input, {size:,} bytes"
        )
        fast.rest()
        return fast
    if backend == "fast":
        raise UserError(f"--tokenizer-backend fast: {problem}")
    say(f"tokenizer backend: the usual library; {problem}")
    return tokenizer


def _sample(files: list[str], reading: Reading, probes: list[str]) -> Iterator[tuple[str, str]]:
    """Yield probes and texts, each with its place: those at the beginning of some of the files."""
    yield from (("a probe", probe) for probe in probes)
    chosen = files[:: -(-len(files) // _SAMPLE_FILES) or 1]
    for file in chosen:
        size = 0
        for document in raw_documents(file, reading, lambda line: None):
            try:
                values = texts(document, reading).values()
            except BrokenDocument:
                continue
            for text in values:
                if isinstance(text, str):
                    yield document.place, text[:_SAMPLE_TEXT]
                    size += len(text)
            if size >= _SAMPLE_BYTES // len(chosen):
                break


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
        """Args:
            load: makes a tokenizer of the library; can be pickled.
            offset: is added to all ids.
            stand_in: the ids of SentencePiece's stand-in for a space, where a text has that
                character itself.

        Raises:
            UserError: why there is none.
        """
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
        """Give back the library's memory, until it is needed again."""
        self._encode = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_encode": None}


def of_tokenizer_json(content: str) -> GigatokenEncoder:
    """Return the encoder of Transformers' tokenizer.json. Raises UserError, as all of these do."""
    described = json.loads(content)
    described["added_tokens"] = [t for t in described["added_tokens"] if not t["special"]]
    described["post_processor"] = None
    return GigatokenEncoder(functools.partial(_of_json, json.dumps(described)))


def of_sentencepiece(model: bytes, stand_in_ids: list[int] | None) -> GigatokenEncoder:
    """Return the encoder of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    proto = protobuf.ModelProto()
    proto.ParseFromString(model)
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
    return GigatokenEncoder(load, stand_in=stand_in_ids)


def _can_be_merged(piece: str, others: set[str]) -> bool:
    return any(piece[:i] in others and piece[i:] in others for i in range(1, len(piece)))


def of_ranks(ranks: dict[bytes, int], scheme: str) -> GigatokenEncoder:
    """Return the encoder of byte pairs and their ranks. scheme: how the library names the way to
    split a text."""
    ranked = sorted(ranks.items(), key=lambda pair: pair[1])
    first = ranked[0][1]
    lines = (f"{base64.b64encode(piece).decode()} {i - first}\n" for piece, i in ranked)
    return GigatokenEncoder(functools.partial(_of_lines, "".join(lines), scheme), offset=first)


def _of_json(content: str, library: ModuleType) -> Any:
    return library.Tokenizer.from_json(content)


def _of_model(content: bytes, library: ModuleType) -> Any:
    return library.Tokenizer.from_sentencepiece(content)


def _of_lines(lines: str, scheme: str, library: ModuleType) -> Any:
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
