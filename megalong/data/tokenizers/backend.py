"""Which library cuts texts into tokens: the usual one, or a faster one that is proven to give the
same ids on a sample of the very texts, before it is used."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from megalong.data.text.documents import Reading
from megalong.data.text.files import is_stream, shown
from megalong.data.text.sample import sample_texts
from megalong.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer
from megalong.utils.errors import UserError, counted
from megalong.utils.machine import give_back_memory, resident_bytes

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
_LOOKED_AT_AFTER = 1 << 22  # characters


class NotProven(UserError):
    """The fast library has other ids, or it cannot be seen that it has the same."""


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
        """Whether both libraries have the same ids for a text, and neither fails."""
        try:
            return self.encode_array(text).tolist() == self.usual.encode_array(text).tolist()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # such as a panic of Rust, which is no Exception
            return False

    def rest(self) -> None:
        """Gives back the library's memory, until it is needed again."""
        self._encoder.forget()
        give_back_memory()
        self._characters, self._begun_with = 0, None

    def _joins(self) -> bytes:
        return self.usual._joins()

    def __getstate__(self) -> dict:
        """A copy in another process begins anew."""
        return self.__dict__ | {"_characters": 0, "_begun_with": None}


def perhaps_fast(tokenizer: Tokenizer, backend: str, say: Callable[[str], object]) -> Tokenizer:
    """The tokenizer, or a fast one, which is to be `proven` before it is used.

    backend: "usual", "fast", or "auto" for whichever there is. say: hears why there is none.
    Raises UserError where "fast" cannot be had.
    """
    if backend == "usual" or isinstance(tokenizer, ByteTokenizer):
        return tokenizer
    try:
        return FastTokenizer(tokenizer)
    except UserError as error:
        _refuse(error, backend, say)
        return tokenizer


def proven(
    tokenizer: Tokenizer,
    backend: str,
    files: list[str],
    reading: Reading,
    say: Callable[[str], object],
    agree: Callable[[list[str]], Iterable[bool]] | None = None,
) -> Tokenizer:
    """What `perhaps_fast` gave, if both libraries cut probes and a sample of the files' texts
    alike; else the usual tokenizer.

    agree: `FastTokenizer.agrees` of texts, wherever it is done; None: here.
    Raises UserError where "fast" cannot be had, and what `agree` and reading the files raise.
    """
    if not isinstance(tokenizer, FastTokenizer):
        return tokenizer
    if agree is None:
        agree = functools.partial(map, tokenizer.agrees)
    try:
        documents, size = _prove_same(tokenizer.usual, files, reading, agree)
    except NotProven as error:
        _refuse(error, backend, say)
        return tokenizer.usual
    say(
        f"tokenizer backend: gigatoken, which gives the usual library's ids for"
        f" {counted(documents, 'document')} of the input, {size:,} bytes"
    )
    return tokenizer


def _refuse(error: UserError, backend: str, say: Callable[[str], object]) -> None:
    if backend == "fast":
        raise UserError(f"--tokenizer-backend fast: {error}") from error
    say(f"tokenizer backend: the usual library; {error}")


def _prove_same(
    usual: Tokenizer,
    files: list[str],
    reading: Reading,
    agree: Callable[[list[str]], Iterable[bool]],
) -> tuple[int, int]:
    """Documents and bytes that both cut alike. Raises NotProven for one that they do not."""
    stream = next(filter(is_stream, files), None)
    if stream is not None:
        raise NotProven(
            f"{shown(stream)} cannot be read twice, to compare the ids of both libraries"
        )
    probes = [*_PROBES, *usual.special_names, *_random_texts()]
    sample = list(sample_texts(files, reading, _SAMPLE_BYTES))
    places = ["a probe"] * len(probes) + [place for place, _ in sample]
    texts = probes + [text for _, text in sample]
    for place, same in zip(places, agree(texts), strict=True):
        if not same:
            raise NotProven(f"gigatoken gives other ids than the usual library for {place}")
    return len(sample), sum(len(text.encode("utf-8")) for _, text in sample)


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
