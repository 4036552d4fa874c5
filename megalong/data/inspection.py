"""What .bin/.idx pairs hold: counts, lengths, whether they are sound, and their text again.

`tools/inspect_dataset.py` prints it. Findings are plain dicts, as they are written as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from megalong.data import loss_mask
from megalong.data.indexed import Pair, check_megatron_core
from megalong.data.samples import BOUNDS, short
from megalong.data.shards import is_sharded, pair_prefixes
from megalong.data.stream import Documents
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.utils.errors import UserError, counted

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
CONTEXT = "\u27e6{}\u27e7"  # in white square brackets: what does not count in the loss
_SCANNED = 1 << 24  # tokens at a time


def open_pairs(path: str) -> list[Pair]:
    """The pair of a prefix, or those of a folder or pattern. Raises UserError."""
    prefixes = pair_prefixes(path, path) if is_sharded(path) else [path]
    return [Pair.open(prefix, path) for prefix in prefixes]


def describe(documents: Documents, pairs: list[Pair]) -> dict[str, Any]:
    """Counts, lengths and provenance; reads no tokens, and of loss masks those that no .json
    describes. documents: those of the pairs."""
    lengths, tokens = documents.lengths, int(documents.lengths.sum())
    quantiles = np.quantile(lengths, QUANTILES, method="lower")
    found = {
        "prefix": documents.prefix,
        "pairs": len(pairs),
        "documents": len(lengths),
        "tokens": tokens,
        "dtype": " and ".join(sorted({pair.index.dtype.name for pair in pairs})),
        "bytes": sum(pair.bytes for pair in pairs),
        "empty_documents": int((lengths == 0).sum()),
        "sequences": sum(len(pair.index.sequence_lengths) for pair in pairs),
        "lengths": {
            "shortest": int(lengths.min()),
            "mean": float(lengths.mean()),
            "longest": int(lengths.max()),
            "quantiles": {f"{q:g}": int(x) for q, x in zip(QUANTILES, quantiles, strict=True)},
        },
        "histogram": histogram(lengths),
        "share_of_tokens_in_documents_of_at_least": {
            short(bound): float(lengths[lengths >= bound].sum()) / tokens for bound in BOUNDS
        },
        "loss_mask": counted_tokens(pairs),
        "sidecar": pairs[0].description or None if len(pairs) == 1 else None,
    }
    found["remarks"] = list(_remarks(found, pairs))
    return found


def counted_tokens(pairs: list[Pair]) -> dict[str, int] | None:
    """How many pairs have a loss mask, and how many tokens of all pairs count in the loss; None:
    all tokens do, for there is no mask."""
    masked = [pair for pair in pairs if pair.masks_loss]
    if not masked:
        return None
    tokens = 0
    for pair in pairs:
        if not pair.masks_loss:
            tokens += int(pair.index.sequence_lengths.sum(dtype=np.int64))
        else:
            made = pair.description.get(loss_mask.KEY) or loss_mask.description(pair.mask_path)
            tokens += made["tokens"]
    return {"pairs": len(masked), "tokens": tokens}


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


def _remarks(found: dict[str, Any], pairs: list[Pair]) -> Iterator[str]:
    """What training takes and is worth knowing."""
    without = [pair.prefix for pair in pairs if not pair.description]
    if without:
        more = f" (and of {len(without) - 1:,} more)" if len(without) > 1 else ""
        yield (
            f"there is no {without[0]}.json{more}: whether the tokenizer is the right one cannot be"
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
    pairs: list[Pair], vocab_size: int | None, eod: int | None, progress: tqdm
) -> dict[str, Any]:
    """Read all tokens, and loss masks. progress: is told of the bytes.

    vocab_size: ids beyond it are an error; None: that of the sidecars. eod: the token that ends
    documents, whose ends are counted; None: that of the sidecars, where they say it.
    Raises UserError that names the file and what is wrong in it.
    """
    found = [_verify(pair, vocab_size, eod, progress) for pair in pairs if pair.bytes]
    ends = [one["documents_ending_with_eod"] for one in found]
    return {
        "smallest_id": min(one["smallest_id"] for one in found),
        "largest_id": max(one["largest_id"] for one in found),
        "documents_ending_with_eod": None if None in ends else sum(ends),
        "megatron_core": found[0]["megatron_core"],
        "loss_masks": sum(_verify_mask(pair, progress) for pair in pairs),
    }


def _verify_mask(pair: Pair, progress: tqdm) -> bool:
    """Whether there is a loss mask of a pair, and then a sound one."""
    if not pair.masks_loss:
        return False
    made = loss_mask.description(pair.mask_path, progress.update)
    told = pair.description.get(loss_mask.KEY, made)
    for what in ("tokens", "sha256"):
        if told.get(what) != made[what]:
            raise UserError(
                f"{pair.mask_path}: {what} {made[what]}, and {pair.prefix}.json says"
                f" {told.get(what)}: the files are not of one run, or it was changed"
            )
    return True


def _verify(pair: Pair, vocab_size: int | None, eod: int | None, progress: tqdm) -> dict[str, Any]:
    vocab_size = pair.description.get("vocab_size") if vocab_size is None else vocab_size
    eod = pair.description.get("eod") if eod is None else eod
    path, dtype = pair.prefix + ".bin", pair.index.dtype
    tokens = np.memmap(path, dtype, mode="r")
    smallest, largest = np.iinfo(dtype).max, np.iinfo(dtype).min
    for begin in range(0, len(tokens), _SCANNED):
        part = np.array(tokens[begin : begin + _SCANNED])
        low, high = int(part.min()), int(part.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            _name_wrong_id(pair, part, begin, vocab_size)
        smallest, largest = min(smallest, low), max(largest, high)
        progress.update(part.nbytes)
    known = pair.description.get("max_token_id")
    if known is not None and known != largest:
        raise UserError(
            f"{path}: its largest token id is {largest}, and {pair.prefix}.json says {known}: the"
            " files are not of one run, or it was changed"
        )
    ending = None
    if eod is not None:
        lengths = pair.index.document_lengths()
        documents = np.flatnonzero(lengths)
        ends = tokens[np.cumsum(lengths)[documents] - 1] == eod
        ending = int(ends.sum())
        if pair.description.get("append_eod") and ending < len(documents):
            document = documents[np.flatnonzero(~ends)[0]]
            raise UserError(
                f"{path}: document {document} does not end with the end-of-document token {eod}, as"
                f" all do that {pair.prefix}.json describes: damaged"
            )
    return {
        "smallest_id": smallest,
        "largest_id": largest,
        "documents_ending_with_eod": ending,
        "megatron_core": check_megatron_core(pair.prefix, pair.index),
    }


def _name_wrong_id(pair: Pair, tokens: np.ndarray, begin: int, vocab_size: int | None) -> NoReturn:
    """tokens: from the place `begin` of the file on."""
    wrong = tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size)
    place = int(np.flatnonzero(wrong)[0])
    ends = np.cumsum(pair.index.document_lengths())
    document = int(np.searchsorted(ends, begin + place, side="right"))
    ids = "" if vocab_size is None else f", but the vocabulary has {vocab_size} ids"
    raise UserError(
        f"{pair.prefix}.bin: document {document} holds token id {tokens[place]} (token"
        f" {begin + place:,} of the file){ids}: damaged, or made with another tokenizer"
    )


def in_text(
    tokenizer: Tokenizer, ids: np.ndarray, starts: np.ndarray, limit: int, counts: np.ndarray
) -> Iterator[tuple[int, str]]:
    """Tokens as text, document by document: the place of the first token, and the text, of which
    the middle is left out where it is more than `limit` tokens.

    starts: where documents begin among the ids, ascending from 0. counts: which of the tokens count
    in the loss, bool (ids,); the others are shown as `CONTEXT`.
    """
    for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        part, kept = ids[begin:end], counts[begin:end]
        if len(part) <= limit:
            yield int(begin), _text(tokenizer, part, kept)
            continue
        half = max(limit // 2, 1)
        left_out = f"\n[... {len(part) - 2 * half:,} tokens ...]\n"
        head = _text(tokenizer, part[:half], kept[:half])
        yield int(begin), head + left_out + _text(tokenizer, part[-half:], kept[-half:])


def _text(tokenizer: Tokenizer, ids: np.ndarray, counts: np.ndarray) -> str:
    """Special tokens stand for nothing, and so are named."""
    special = {tokenizer.eod: "<eod>", tokenizer.bos: "<bos>"}
    pieces = [
        special.get(i, f"<{i}>").encode() if not tokenizer.pieces[i] else tokenizer.pieces[i]
        for i in ids.tolist()
    ]
    borders = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(pieces)]
    text = ""
    for begin, end in pairwise(borders):
        run = b"".join(pieces[begin:end]).decode("utf-8", errors="replace")
        text += run if end == begin or counts[begin] else CONTEXT.format(run)
    return text
