"""What a .bin/.idx pair holds: counts, lengths, whether it is sound, and its text again.

`tools/inspect_dataset.py` prints it. Findings are plain dicts, as they are written as JSON.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from megalong.data.context import BOUNDS, short
from megalong.data.indexed import IndexedDocuments
from megalong.data.tokenizer import Tokenizer
from megalong.errors import UserError
from megalong.wording import counted

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_SCANNED = 1 << 24  # tokens at a time


def describe(documents: IndexedDocuments) -> dict[str, Any]:
    """Counts, lengths and provenance of a pair; reads its index alone."""
    index, lengths = documents.index, documents.lengths
    sequences = len(index.sequence_lengths)
    found = {
        "prefix": documents.prefix,
        "documents": len(lengths),
        "tokens": documents.num_tokens,
        "dtype": index.dtype.name,
        "bytes": os.path.getsize(documents.prefix + ".bin"),
        "empty_documents": int((lengths == 0).sum()),
        "sequences": sequences,
        "lengths": {
            "shortest": int(lengths.min()),
            "mean": float(lengths.mean()),
            "longest": int(lengths.max()),
            "quantiles": {
                f"{q:g}": int(value)
                for q, value in zip(
                    QUANTILES, np.quantile(lengths, QUANTILES, method="lower"), strict=True
                )
            },
        },
        "histogram": histogram(lengths),
        "share_of_tokens_in_documents_of_at_least": {
            short(bound): float(lengths[lengths >= bound].sum()) / documents.num_tokens
            for bound in BOUNDS
        },
        "sidecar": documents.description or None,
    }
    found["remarks"] = list(_remarks(found, documents.description))
    return found


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents and their tokens by length, in buckets from a power of two to the next; empty
    documents in a bucket of their own. Buckets before the first and behind the last are left out.
    """
    bucket = np.zeros(len(lengths), np.int64)
    bucket[lengths > 0] = np.floor(np.log2(lengths[lengths > 0])).astype(np.int64) + 1
    documents, tokens = np.bincount(bucket), np.bincount(bucket, lengths)
    return [
        {
            "from": 1 << b - 1 if b else 0,
            "to": (1 << b) - 1,
            "documents": int(documents[b]),
            "tokens": int(tokens[b]),
        }
        for b in range(int(bucket.min()), len(documents))
    ]


def _remarks(found: dict[str, Any], sidecar: dict[str, Any]) -> Iterator[str]:
    """What training takes and is worth knowing."""
    if not sidecar:
        yield (
            f"there is no {found['prefix']}.json: whether the tokenizer is the right one cannot be"
            " known"
        )
    if found["empty_documents"]:
        number = found["empty_documents"]
        is_it = "is empty: it is" if number == 1 else "are empty: they are"
        yield f"{counted(number, 'document')} {is_it} passed over"
    if found["sequences"] != found["documents"]:
        yield (
            f"the documents are {found['sequences']:,} sequences, each of which Megatron-LM takes"
            " for a document"
        )


def verify(
    documents: IndexedDocuments, vocab_size: int | None, eod: int | None, progress: tqdm
) -> dict[str, Any]:
    """Read all tokens of a pair. progress: is told of the bytes.

    vocab_size: ids beyond it are an error; None: nothing is known of it. eod: the token that ends
    documents, whose ends are counted then.
    Raises UserError that names the file and what is wrong in it.
    """
    index, path = documents.index, documents.prefix + ".bin"
    tokens = np.memmap(path, index.dtype, mode="r")
    smallest, largest = np.iinfo(index.dtype).max, np.iinfo(index.dtype).min
    for begin in range(0, len(tokens), _SCANNED):
        part = np.array(tokens[begin : begin + _SCANNED])
        low, high = int(part.min()), int(part.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            _name_wrong_id(documents, part, begin, vocab_size)
        smallest, largest = min(smallest, low), max(largest, high)
        progress.update(part.nbytes)
    known = documents.max_token_id
    if known is not None and known != largest:
        raise UserError(
            f"{path}: its largest token id is {largest}, and {documents.prefix}.json says {known}:"
            " the files are not of one run, or it was changed"
        )
    found = {"smallest_id": smallest, "largest_id": largest}
    if eod is not None:
        ends = np.cumsum(documents.lengths)[documents.lengths > 0] - 1
        found["documents_ending_with_eod"] = int((np.asarray(tokens[ends]) == eod).sum())
    found["megatron_core"] = documents.check_megatron_core()
    return found


def _name_wrong_id(
    documents: IndexedDocuments, tokens: np.ndarray, begin: int, vocab_size: int | None
) -> NoReturn:
    """tokens: from the place `begin` of the file on."""
    wrong = tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size)
    place = int(np.flatnonzero(wrong)[0])
    ends = np.cumsum(documents.lengths)
    document = int(np.searchsorted(ends, begin + place, side="right"))
    ids = "" if vocab_size is None else f", but the vocabulary has {vocab_size} ids"
    raise UserError(
        f"{documents.prefix}.bin: document {document} holds token id {tokens[place]} (token"
        f" {begin + place:,} of the file){ids}: damaged, or made with another tokenizer"
    )


def in_text(
    tokenizer: Tokenizer, ids: np.ndarray, starts: np.ndarray, limit: int
) -> Iterator[tuple[int, str]]:
    """Tokens as text, document by document: the place of the first token, and the text, of which
    the middle is left out where it is more than `limit` tokens.

    starts: where documents begin among the ids, ascending from 0.
    """
    for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        part = ids[begin:end]
        if len(part) <= limit:
            yield int(begin), _text(tokenizer, part)
            continue
        half = max(limit // 2, 1)
        left_out = f"\n[... {len(part) - 2 * half:,} tokens ...]\n"
        yield (
            int(begin),
            _text(tokenizer, part[:half]) + left_out + _text(tokenizer, part[-half:]),
        )


def _text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Special tokens stand for nothing, and so are named."""
    special = {tokenizer.eod: "<eod>", tokenizer.bos: "<bos>"}
    pieces = [
        special.get(i, f"<{i}>").encode() if not tokenizer.pieces[i] else tokenizer.pieces[i]
        for i in ids.tolist()
    ]
    return b"".join(pieces).decode("utf-8", errors="replace")
