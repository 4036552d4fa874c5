"""Which library cuts texts into tokens: the usual one, or a faster one that is proven to give the
same ids on a sample of the very texts, before it is used."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from megalong.data.text.documents import Reading
from megalong.data.text.files import is_stream, shown
from megalong.data.text.sample import sample_texts
from megalong.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer
from megalong.errors import UserError
from megalong.wording import counted

if TYPE_CHECKING:
    import numpy as np

# What libraries differ in, if in anything.
_PROBES = (
    "",
    " a  b\tc\n\n    d\r\n e\u0301 \u00e9\u3042\U0001f600\u2581\u2047\0 ",
    "It's 1234567 o'clock, THEY'LL say; don't\n\n\n  if (x) {\r\n\r\n\t\treturn -1.5e-3;  }\n",
    "<eod> <unk> <s></s> <mask> <pad> <0x0A> [MASK] <|endoftext|><|im_start|> <|begin_of_text|>",
    "aaaaaaaaaaaaaaaaaaaaaaa ==================== .................... ((((((((\\\\\\\\",
    "\u00a0\u2003 \u3000\u2028\u200b\ufeff \u0130\u01c5\u2160\u0661\u00b2 \u0e01\u0e33 \ud55c",
)

BACKENDS = ("auto", "fast", "usual")
_SAMPLE_BYTES = 3 << 20
# What the fast library remembers of texts has no bound, so that it is begun anew from time to time.
_REMEMBERED = 1 << 27  # bytes that this process may grow by
_LOOKED_AT_AFTER = 1 << 24  # characters


class FastTokenizer(Tokenizer):
    """A tokenizer whose texts another library cuts into the same ids."""

    def __init__(self, usual: Tokenizer) -> None:
        """Raises UserError where there is no such library for it."""
        super().__init__(usual.pieces, usual.eod, usual.bos, usual.mask)
        self.usual = usual
        self._renew()

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        if self._encoder is None:
            self._renew()
        self._characters += len(text)
        if self._characters > _LOOKED_AT_AFTER:
            self._characters = 0
            if _resident_bytes() > self._resident + _REMEMBERED:
                self._renew()
        return self._encoder(text)

    def _joins(self) -> bytes:
        return self.usual._joins()

    def rest(self) -> None:
        """Gives back the library's memory, until it is needed again."""
        self._encoder = None

    def _renew(self) -> None:
        self.rest()
        self._encoder = self.usual.fast_encoder()
        self._characters, self._resident = 0, _resident_bytes()

    def __getstate__(self) -> dict:
        """A copy in another process makes its own."""
        return self.__dict__ | {"_encoder": None}


def _resident_bytes() -> int:
    """Memory of this process; 0 on systems that do not have it in /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def with_backend(
    tokenizer: Tokenizer,
    backend: str,
    files: list[str],
    reading: Reading,
    say: Callable[[str], object],
) -> Tokenizer:
    """The tokenizer, or a fast one with the same ids.

    backend: "usual", "fast", or "auto" for whichever there is. say: hears which it is, and why.
    Raises UserError where "fast" cannot be had.
    """
    if backend == "usual" or isinstance(tokenizer, ByteTokenizer):
        return tokenizer
    try:
        fast = FastTokenizer(tokenizer)
        documents, size = _prove_same(fast, tokenizer, files, reading)
        fast.rest()  # where there are workers, this process makes no tokens
    except UserError as error:
        if backend == "fast":
            raise UserError(f"--tokenizer-backend fast: {error}") from error
        say(f"tokenizer backend: the usual library; {error}")
        return tokenizer
    say(
        f"tokenizer backend: gigatoken, which gives the usual library's ids for"
        f" {counted(documents, 'document')} of the input, {size:,} bytes"
    )
    return fast


def _prove_same(
    fast: Tokenizer, usual: Tokenizer, files: list[str], reading: Reading
) -> tuple[int, int]:
    """Documents and bytes that both cut alike. Raises UserError for one that they do not."""
    stream = next(filter(is_stream, files), None)
    if stream is not None:
        raise UserError(
            f"{shown(stream)} cannot be read twice, to compare the ids of both libraries"
        )
    documents = size = 0
    for text in [*_PROBES, *usual.special_names, *_random_texts()]:
        _compare(fast, usual, text, "a probe")
    for place, text in sample_texts(files, reading, _SAMPLE_BYTES):
        _compare(fast, usual, text, place)
        documents, size = documents + 1, size + len(text.encode("utf-8"))
    return documents, size


def _compare(fast: Tokenizer, usual: Tokenizer, text: str, place: str) -> None:
    ids, expected = fast.encode_array(text), usual.encode_array(text)
    if ids.tolist() != expected.tolist():
        raise UserError(f"gigatoken gives other ids than the usual library for {place}")


def _random_texts() -> list[str]:
    """Characters of all kinds, spaces among them."""
    draw = random.Random(0)
    kinds = [range(0x20, 0x7F), range(0xA1, 0x250), range(0x370, 0x600), range(0x3041, 0x9000)]
    texts = []
    for _ in range(200):
        characters = [chr(draw.choice(draw.choice(kinds))) for _ in range(40)]
        spaces = draw.choices(["", "", "", " ", "\n", "  \t"], k=40)
        texts.append("".join(map("".join, zip(characters, spaces, strict=True))))
    return texts
