"""What .bin/.idx pairs hold: counts, lengths, whether they are sound, and their text again.

`tools/inspect_dataset.py` prints it. Findings are plain dicts, as they are written as JSON.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from megalong.data import loss_mask
from megalong.data.document_samples import DocumentSamples
from megalong.data.indexed import (
    IndexedDocuments,
    Pair,
    check_megatron_core,
    is_sharded,
    pair_prefixes,
)
from megalong.data.samples import BOUNDS, short
from megalong.data.sources import LengthUpsampling
from megalong.data.stream import TokenStream, check_tokenizer, split_documents
from megalong.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalong.utils.errors import UserError, counted

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
CONTEXT = "\u27e6{}\u27e7"  # in white square brackets: what does not count in the loss
_SCANNED = 1 << 24  # tokens at a time


@dataclass(frozen=True)
class TrainingFlags:
    """The flags of a training that decide about its samples."""

    seq_length: int
    split: str
    seed: int
    length_upsampling: LengthUpsampling | None


class Dataset:
    """The pair of a prefix, or those of a folder or pattern. Raises UserError."""

    def __init__(self, path: str) -> None:
        prefixes = pair_prefixes(path, path) if is_sharded(path) else [path]
        self.pairs = [Pair.open(prefix, path) for prefix in prefixes]
        self.documents = IndexedDocuments(path, place=path)
        self.prefix = self.documents.prefix

    def describe(self) -> dict[str, Any]:
        """Return counts, lengths and provenance. Reads no tokens, and of loss masks those that no
        .json describes."""
        pairs, lengths = self.pairs, self.documents.lengths
        tokens = int(lengths.sum())
        quantiles = np.quantile(lengths, QUANTILES, method="lower")
        found = {
            "prefix": self.prefix,
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
            "loss_mask": self._counted_tokens(),
            "sidecar": pairs[0].description or None if len(pairs) == 1 else None,
        }
        found["remarks"] = list(self._remarks(found))
        return found

    def describe_training(self, flags: TrainingFlags, modes: Sequence[str]) -> dict[str, Any]:
        """Return what training makes of the data in these sample modes."""
        found: dict[str, Any] = {"seq_length": flags.seq_length, "split": flags.split, "modes": {}}
        for mode in modes:
            samples = self.samples(flags, mode)
            report = samples.context_report()
            found["documents"] = len(samples.document_range)
            found["tokens_per_epoch"] = samples.tokens_per_epoch
            if flags.length_upsampling is not None:
                found["length_upsampling"] = flags.length_upsampling.shares(samples.lengths)
            bounds = list(map(str, report.bounds))
            found["modes"][mode] = {
                "samples_per_epoch": samples.samples_per_epoch,
                "with_context": dict(zip(bounds, report.with_context, strict=True)),
                "uncut": dict(zip(bounds, report.uncut, strict=True)),
                "mean_context": report.mean,
                "in_words": report.in_words(),
            }
        return found

    def samples(self, flags: TrainingFlags, mode: str) -> TokenStream | DocumentSamples:
        """Return the samples of a training on this data alone."""
        stream = TokenStream(
            self.documents,
            split_documents(self.documents.num_documents, flags.split)[0],
            flags.seq_length,
            flags.seed,
            upsampling=flags.length_upsampling,
        )
        return stream if mode == "stream" else DocumentSamples(stream)

    def tokenizer(self, kind: str | None, model: str | None) -> Tokenizer:
        """Build the tokenizer of the flags, or else the one that made the data, where it is there.

        Raises:
            UserError: it is not the one that made the data, or none is known.
        """
        made = self.pairs[0].description
        kind = kind or made.get("tokenizer_type")
        if kind is None:
            raise UserError(
                f"{self.pairs[0].prefix}: nothing says which tokenizer made it: give"
                " --tokenizer-type and --tokenizer-model"
            )
        there = made.get("tokenizer_model")
        if model is None and isinstance(there, str) and os.path.exists(there):
            model = there
        tokenizer = build_tokenizer(kind, model)
        named = f"--tokenizer-type {kind}" if model is None else f"--tokenizer-model {model}"
        check_tokenizer(self.documents, tokenizer, named, self.prefix)
        return tokenizer

    def decoded(
        self, number: int, tokenizer: Tokenizer, limit: int, flags: TrainingFlags | None, mode: str
    ) -> dict[str, Any]:
        """Return a document, or with flags a sample of a training, as text.

        Args:
            limit: tokens of each document that are shown.

        Raises:
            UserError: there is no such one, or it is of another tokenizer.
        """
        if flags is None:
            if not 0 <= number < self.documents.num_documents:
                count = counted(self.documents.num_documents, "document")
                raise UserError(f"--decode {number}: {self.prefix} has {count}, numbered from 0")
            what, ids, starts = "document", self.documents.read(number), np.zeros(1, np.int64)
            counts = self.documents.loss_mask(number)
        else:
            if number < 0:
                raise UserError(f"--decode {number}: samples are numbered from 0")
            samples = self.samples(flags, mode)
            ids = samples.sample(number, 0, flags.seq_length)
            counts = samples.loss_mask(number, 0, flags.seq_length)
            what, starts = "sample", np.unique(samples.document_bounds(number)[0])
        if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"--decode {number}: token id {int(ids.max())} is not one of this tokenizer's"
                f" {tokenizer.vocab_size}: {self.prefix} was made with another"
            )
        parts = [
            {"token": int(begin), "text": _shortened(tokenizer, ids[run], counts[run], limit)}
            for begin, end in pairwise([*starts, len(ids)])
            for run in [slice(begin, end)]
        ]
        return {what: number, "tokens": len(ids), "parts": parts}

    @property
    def bytes_to_verify(self) -> int:
        """Bytes that `verify` reads."""
        masks = sum(os.path.getsize(pair.mask_path) for pair in self.pairs if pair.masks_loss)
        return sum(pair.bytes for pair in self.pairs) + masks

    def verify(self, vocab_size: int | None, eod: int | None, progress: tqdm) -> dict[str, Any]:
        """Read all tokens, and loss masks.

        Args:
            vocab_size: ids beyond it are an error; None: that of the sidecars.
            eod: the token that ends documents, whose ends are counted; None: that of the sidecars.
            progress: is told of the bytes.

        Raises:
            UserError: names the file and what is wrong in it.
        """
        found = [_verify(pair, vocab_size, eod, progress) for pair in self.pairs if pair.bytes]
        ends = [one["documents_ending_with_eod"] for one in found]
        return {
            "smallest_id": min(one["smallest_id"] for one in found),
            "largest_id": max(one["largest_id"] for one in found),
            "documents_ending_with_eod": None if None in ends else sum(ends),
            "megatron_core": found[0]["megatron_core"],
            "loss_masks": sum(_verify_mask(pair, progress) for pair in self.pairs),
        }

    def _counted_tokens(self) -> dict[str, int] | None:
        """Count loss masks, and tokens that count in the loss; None: all do, without a mask."""
        masked = [pair for pair in self.pairs if pair.masks_loss]
        if not masked:
            return None
        tokens = 0
        for pair in self.pairs:
            if not pair.masks_loss:
                tokens += int(pair.index.sequence_lengths.sum(dtype=np.int64))
            else:
                made = pair.description.get(loss_mask.KEY) or loss_mask.description(pair.mask_path)
                tokens += made["tokens"]
        return {"pairs": len(masked), "tokens": tokens}

    def _remarks(self, found: dict[str, Any]) -> Iterator[str]:
        without = [pair.prefix for pair in self.pairs if not pair.description]
        if without:
            more = f" (and of {len(without) - 1:,} more)" if len(without) > 1 else ""
            yield (
                f"there is no {without[0]}.json{more}: whether the tokenizer is the right one"
                " cannot be known"
            )
        if found["empty_documents"]:
            number = found["empty_documents"]
            is_it = "is empty: it is" if number == 1 else "are empty: they are"
            yield f"{counted(number, 'document')} {is_it} passed over"
        if found["sequences"] != found["documents"]:
            yield (
                f"the documents are {found['sequences']:,} sequences, each of which Megatron-LM"
                " takes for a document"
            )


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Count documents and their tokens by length, in buckets from a power of two to the next; empty
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


def _verify_mask(pair: Pair, progress: tqdm) -> bool:
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
    ends = np.cumsum(pair.index.document_lengths())
    smallest, largest = np.iinfo(dtype).max, np.iinfo(dtype).min
    for begin in range(0, len(tokens), _SCANNED):
        part = np.array(tokens[begin : begin + _SCANNED])
        low, high = int(part.min()), int(part.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            wrong = part < 0 if vocab_size is None else (part < 0) | (part >= vocab_size)
            place = begin + int(np.flatnonzero(wrong)[0])
            ids = "" if vocab_size is None else f", but the vocabulary has {vocab_size} ids"
            raise UserError(
                f"{path}: document {np.searchsorted(ends, place, side='right')} holds token id"
                f" {tokens[place]} (token {place:,} of the file){ids}: damaged, or made with"
                " another tokenizer"
            )
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
        documents = np.flatnonzero(pair.index.document_lengths())
        ended = tokens[ends[documents] - 1] == eod
        ending = int(ended.sum())
        if pair.description.get("append_eod") and ending < len(documents):
            document = documents[np.flatnonzero(~ended)[0]]
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


def _shortened(tokenizer: Tokenizer, ids: np.ndarray, counts: np.ndarray, limit: int) -> str:
    """Return tokens as text, without the middle where they are more than `limit`. Those that do not
    count in the loss, by `counts`, are shown as CONTEXT."""
    if len(ids) <= limit:
        return _text(tokenizer, ids, counts)
    half = max(limit // 2, 1)
    left_out = f"\n[... {len(ids) - 2 * half:,} tokens ...]\n"
    head = _text(tokenizer, ids[:half], counts[:half])
    return head + left_out + _text(tokenizer, ids[-half:], counts[-half:])


def _text(tokenizer: Tokenizer, ids: np.ndarray, counts: np.ndarray) -> str:
    special = {tokenizer.eod: "<eod>", tokenizer.bos: "<bos>"}  # which stand for nothing
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
