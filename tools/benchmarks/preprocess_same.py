"""Whether the contenders of `preprocess.py` have made the same tokens.

SentencePiece writes a space as U+2581, and so takes the character itself for a space: its ids of a
text with this character are those of another text. Ours spell the character with byte tokens and
give the text back. So with a SentencePiece model documents that have the character are told apart:
there, and nowhere else, the library itself and Megatron-LM, which calls it, may have other tokens,
and those of ours are decoded and compared with the text. All others have to be the same.
"""

from __future__ import annotations

import filecmp
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megalong.data.indexed import Pair
from megalong.data.tokenizers.tokenizer import SENTENCEPIECE_SPACE, Tokenizer
from megalong.utils.errors import UserError, counted

LIBRARYS_OWN = frozenset(("library", "megatron"))  # whose ids of such documents are the library's


def documents_apart(corpus: Path, tokenizer: Tokenizer) -> list[int]:
    """The documents of JSON lines, from 0, of which ours may have other ids than the library."""
    if getattr(tokenizer, "stand_in_ids", None) is None:
        return []
    with corpus.open() as lines:
        return [i for i, line in enumerate(lines) if SENTENCEPIECE_SPACE in _text(line)]


def counts(lengths: Sequence[int] | np.ndarray, apart: list[int], times: int) -> dict[str, int]:
    """Tokens of a contender, and those of the documents apart. lengths: of the documents, all of
    them `times` times over."""
    by_document = np.asarray(lengths, np.int64).reshape(times, -1)
    return {"tokens": int(by_document.sum()), "tokens_apart": int(by_document[:, apart].sum())}


def check_same(
    found: dict[str, tuple[float, float]],
    prefixes: dict[str, str],
    corpus: Path,
    apart: list[int],
    tokenizer: Tokenizer,
) -> Iterator[str]:
    """What is the same, in lines. Raises UserError where something else is not.

    found: by contender the tokens in all and those of the documents apart. prefixes: of their
    files, by contender. corpus: JSON lines. apart: `documents_apart`.
    """
    _check_counts(found)
    yield f"as many tokens: {', '.join(found)}" + _but_for(apart, found)
    alike = [name for name in prefixes if name not in LIBRARYS_OWN or not apart]
    for name, suffix in itertools.product(alike[1:], (".bin", ".idx")):
        files = [prefixes[other] + suffix for other in (alike[0], name)]
        if not filecmp.cmp(*files, shallow=False):
            raise UserError(f"{files[0]} and {files[1]} differ")
    if len(alike) > 1:
        yield f"identical files: {', '.join(alike)}"
    for name in alike[:1] if apart else ():
        _check_round_trip(prefixes[name], corpus, apart, tokenizer)
        yield f"{name}: the text of documents with U+2581 comes back"
        for other in prefixes.keys() & LIBRARYS_OWN:
            _check_elsewhere(prefixes[name], prefixes[other], apart)
            yield f"identical documents: {name}, {other}" + _but_for(apart, [other])


def _check_counts(found: dict[str, tuple[float, float]]) -> None:
    elsewhere = {name: tokens - apart for name, (tokens, apart) in found.items()}
    if len(set(elsewhere.values())) > 1:
        raise UserError(f"not the same number of tokens: {elsewhere}")
    for names in (LIBRARYS_OWN, found.keys() - LIBRARYS_OWN):
        theirs = {name: apart for name, (_, apart) in found.items() if name in names}
        if len(set(theirs.values())) > 1:
            raise UserError(f"not the same number of tokens in documents with U+2581: {theirs}")


def _but_for(apart: list[int], names: Iterable[str]) -> str:
    if not apart or not LIBRARYS_OWN.intersection(names):
        return ""
    return f" (of library and megatron but for {counted(len(apart), 'document')} with U+2581)"


def _check_round_trip(prefix: str, corpus: Path, apart: list[int], tokenizer: Tokenizer) -> None:
    tokens, ends = _opened(prefix)
    with corpus.open() as lines:
        for i, line in enumerate(lines):
            if i in apart and tokenizer.decode(tokens[ends[i] : ends[i + 1]]) != _text(line):
                raise UserError(f"{prefix}: document {i} does not give its text back")


def _check_elsewhere(prefix: str, other: str, apart: list[int]) -> None:
    (ours, our_ends), (theirs, their_ends) = _opened(prefix), _opened(other)
    if len(our_ends) != len(their_ends):
        raise UserError(f"{prefix} and {other}: not the same number of documents")
    borders = [-1, *apart, len(our_ends) - 1]
    for before, border in itertools.pairwise(borders):
        between = slice(before + 1, border + 1)
        a, b = our_ends[between], their_ends[between]
        same = np.array_equal(a - a[:1], b - b[:1])
        if not same or not np.array_equal(ours[a[0] : a[-1]], theirs[b[0] : b[-1]]):
            raise UserError(
                f"{prefix} and {other} differ between documents {before + 1} and {border}"
            )


def _opened(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens, and where documents end among them, a 0 before: int64 (documents + 1,)."""
    index = Pair.open(prefix, prefix).index
    ends = np.concatenate([[0], np.cumsum(index.document_lengths())])
    return np.memmap(prefix + ".bin", index.dtype, "r"), ends


def _text(line: str) -> str:
    return json.loads(line)["text"]
